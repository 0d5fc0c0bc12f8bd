"""PyramidKV's allocation (arXiv 2406.02069, sec. 4): lower layers keep more, on a straight line."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evolkv.allocators.complete import complete
from evolkv.allocators.uniform import check_counts
from evolkv.errors import BudgetError

#: How steep the line is: the authors' code's beta.
_BETA = 20


def pyramid(num_layers: int, budget: int, window: int = 32, ceiling: int | None = None) -> NDArray[np.int64]:
    """Lay budgets on a straight line from the lowest layer (most) to the highest (least).

    With m = budget − window, the mean number of entries besides the window, the highest layer keeps
    min = m / 20 of them, the lowest max = 2m − min, layer l keeps max − l · (max − min) / (L − 1), and
    every layer keeps the window on top. Where max + window would exceed the ceiling, the lowest layer gets
    the ceiling and min = 2m − max, as in the authors' code. No layer keeps less than 1.

    Args:
        num_layers: L, at least 1.
        budget: mean cache entries per KV head, at least `window`.
        window: last prompt tokens, always kept and counted in the budget; 0 for a selector without one.
        ceiling: the most a layer may keep, the prompt's length as a rule. Default: no limit.

    Returns:
        int64 budgets of shape (L,), with mean exactly `budget`.

    Raises:
        BudgetError: a number out of its range, or a budget below the window or above the ceiling.
    """
    check_counts(num_layers=num_layers, budget=budget)
    if window < 0 or budget < window:
        raise BudgetError(f"a pyramid needs 0 <= window <= budget, got window {window} and budget {budget}")
    least, most = max(window, 1), 2 * budget if ceiling is None else ceiling
    if budget > most:
        raise BudgetError(f"a mean budget of {budget} is above the ceiling of {most}")

    spare = budget - window
    low = max(spare / _BETA, least - window)
    high = 2 * spare - low
    if high > most - window:
        high = most - window
        low = 2 * spare - high
    line = window + np.linspace(high, low, num_layers) if num_layers > 1 else np.array([float(budget)])
    return complete(line, budget * num_layers, least, most)
