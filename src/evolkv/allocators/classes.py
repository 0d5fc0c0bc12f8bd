"""Budgets brought to a few classes of layers, or of heads: some engines keep a table for each budget that occurs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv.allocators.complete import complete
from evolkv.budgets import MAX_BUDGET
from evolkv.errors import UsageError
from evolkv.numbers import is_whole


def in_classes(
    budgets: ArrayLike, count: int, total: int, floors: ArrayLike, what: str = "layers"
) -> NDArray[np.int64]:
    """Give layers with neighbouring budgets one budget, near the mean of theirs, in classes of one size.

    Of all classes of one size these change the budgets least. The order of the layers by budget stays.

    Args:
        budgets: of the layers, ``[layers]``; or of whatever else `what` says.
        count: classes; it must divide the number of layers.
        total: the sum of the result; what does not fill each class evenly is left out.
        floors: the least that each layer may get, ``[layers]``.
        what: "layers" or "heads", for messages.

    Returns:
        int64 budgets, ``[layers]``.

    Raises:
        UsageError: a count that does not divide the number of layers.
        BudgetError: a total that does not leave each layer its floor.
    """
    budgets = np.asarray(budgets)
    number = len(budgets)
    if not is_whole(count) or not 1 <= count <= number or number % count:
        fitting = ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)
        raise UsageError(f"{count!r} classes of {number} {what} cannot be of one size; expected one of {fitting}")
    size = number // count
    members = np.argsort(-budgets, kind="stable").reshape(count, size)
    least = np.asarray(floors)[members].max(axis=1)
    found = np.empty(number, dtype=np.int64)
    found[members] = complete(budgets[members].mean(axis=1), total // size, least, MAX_BUDGET)[:, None]
    return found
