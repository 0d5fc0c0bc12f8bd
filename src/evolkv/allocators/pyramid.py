"""PyramidKV's allocation (arXiv 2406.02069, sec. 4): lower layers keep more, on a straight line."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evolkv.allocators.complete import complete
from evolkv.allocators.uniform import check_counts
from evolkv.errors import BudgetError


def pyramid(
    num_layers: int,
    budget: int,
    beta: float = 20,
    window: int = 32,
    floor: int | None = None,
    ceiling: int | None = None,
    num_kv_heads: int | None = None,
) -> NDArray[np.int64]:
    """Lay budgets on a straight line from the lowest layer (most) to the highest (least).

    With m = budget − window, the mean number of entries besides the window, the highest layer keeps
    min = m / beta of them, the lowest max = 2m − min, layer l keeps max − l · (max − min) / (L − 1), and
    every layer keeps the window on top. Where max + window would exceed the ceiling, the lowest layer gets
    the ceiling and min = 2m − max, as in the authors' code; a floor lifts min in the same way.

    Args:
        num_layers: L, at least 1.
        budget: mean cache entries per KV head, at least `window`.
        beta: how steep the line is, at least 1 (1 is flat); the authors' code uses 20.
        window: last prompt tokens, always kept and counted in the budget; 0 for a selector without one.
        floor: the least a layer may keep. Default: the window, or 1 without a window.
        ceiling: the most a layer may keep, the prompt's length as a rule. Default: no limit.
        num_kv_heads: H, or None for a layer-wise vector; the heads of a layer keep the same number.

    Returns:
        int64 budgets of shape (L,), or (L, H) when `num_kv_heads` is given, with mean exactly `budget`.

    Raises:
        BudgetError: a number out of its range, or a budget outside window, floor and ceiling.
    """
    check_counts(num_layers=num_layers, budget=budget, num_kv_heads=1 if num_kv_heads is None else num_kv_heads)
    if not beta >= 1:
        raise BudgetError(f"beta must be at least 1, got {beta!r}")
    if window < 0 or budget < window:
        raise BudgetError(f"a pyramid needs 0 <= window <= budget, got window {window} and budget {budget}")
    least = max(window, 1) if floor is None else floor
    most = 2 * budget if ceiling is None else ceiling
    if not least <= budget <= most:
        raise BudgetError(f"a mean budget of {budget} is outside floor {least} and ceiling {most}")

    spare = budget - window
    low = max(spare / beta, least - window)
    high = 2 * spare - low
    if high > most - window:
        high = most - window
        low = 2 * spare - high
    line = window + np.linspace(high, low, num_layers) if num_layers > 1 else np.array([float(budget)])
    budgets = complete(line, budget * num_layers, least, most)
    if num_kv_heads is None:
        return budgets
    return np.repeat(budgets[:, None], num_kv_heads, axis=1)
