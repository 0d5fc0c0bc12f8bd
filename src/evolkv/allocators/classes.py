"""Budgets brought to a few classes of layers, or of heads: some engines keep a table for each budget that occurs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv.allocators.complete import complete
from evolkv.budgets import MAX_BUDGET
from evolkv.errors import UsageError
from evolkv.numbers import is_whole


def in_classes(
    budgets: ArrayLike,
    count: int,
    floors: ArrayLike,
    windows: Sequence[int | None],
    granularity: Literal["layer", "head"] = "layer",
) -> NDArray[np.int64]:
    """Give layers, or heads, with neighbouring budgets one budget, near the mean of theirs, in classes of one size.

    Of all classes of one size these change the budgets least. The order by budget stays. Layers with a sliding window
    keep what they have (by layer, the mean of their heads, rounded down), because an engine gives them their window,
    whatever the budget.

    Args:
        budgets: ``[layers, kv_heads]``.
        count: classes; it must divide the number of layers without a sliding window, or of their heads.
        floors: the least that a head of each layer may get, ``[layers]``.
        windows: the sliding window of each layer in tokens, None where it sees everything, ``[layers]``.
        granularity: "layer", where each layer counts with its mean, or "head".

    Returns:
        int64 budgets, ``[layers, kv_heads]``. The layers without a sliding window have the same total; where that is no
        multiple of a class's size, the next lower one.

    Raises:
        UsageError: a count that does not divide the number of layers, or of heads.
        BudgetError: a total that does not leave each layer its floor.
    """
    matrix = np.asarray(budgets)
    parts = matrix if granularity == "head" else matrix.mean(axis=1, keepdims=True)
    full = np.array([window is None for window in windows])
    given = parts[full].reshape(-1)
    number, what = len(given), f"{granularity}s" + ("" if full.all() else " without a sliding window")
    if not is_whole(count) or not 1 <= count <= number or number % count:
        fitting = ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)
        expected = f"expected one of {fitting}" if number else "leave the profile as it is"
        raise UsageError(f"{count!r} classes of {number} {what} cannot be of one size; {expected}")
    size = number // count
    members = np.argsort(-given, kind="stable").reshape(count, size)
    least = np.repeat(np.asarray(floors)[full], parts.shape[1])[members].max(axis=1)
    total = int(matrix[full].sum()) * number // matrix[full].size
    found = np.empty(number, dtype=np.int64)
    found[members] = complete(given[members].mean(axis=1), total // size, least, MAX_BUDGET)[:, None]
    result = parts.astype(np.int64)
    result[full] = found.reshape(-1, parts.shape[1])
    return np.broadcast_to(result, matrix.shape).copy()
