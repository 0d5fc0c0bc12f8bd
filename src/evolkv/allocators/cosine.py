"""PyramidInfer's schedule (arXiv 2405.12532): along the layers less and less is kept, by a cosine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evolkv.allocators.complete import complete
from evolkv.allocators.uniform import check_counts
from evolkv.errors import BudgetError

# Halvings of the interval that holds the decay: more than a float64 can tell apart.
_HALVINGS = 60


def cosine(
    num_layers: int, budget: int, recent: float = 0.2, floor: int = 1, ceiling: int | None = None
) -> NDArray[np.int64]:
    """Lay budgets on PyramidInfer's schedule, whose decay is the one that gives the mean.

    Of the tokens that are not recent, layer l keeps the share (1 − d)(cos(πl/L) + 1)/2 + d of those that entered it. So
    budgets are the top budget times recent + (1 − recent) · the product of these shares up to l. The lowest layer keeps
    the top budget, which is twice the mean, or the ceiling if that is less. At half of a prompt it therefore keeps
    everything, as in the paper. The paper's decay d is 0.9; here bisection finds the d that gives the mean.
    Where there are few layers, even d = 0 may leave too much; all budgets are then scaled down to the mean.

    Args:
        num_layers: L, at least 1.
        budget: mean cache entries per KV head.
        recent: share of the top budget that every layer keeps.
        floor: the least a layer may keep.
        ceiling: the most a layer may keep, the prompt's length as a rule. Default: no limit.

    Returns:
        int64 budgets of shape (L,) that do not rise, with mean exactly `budget`.

    Raises:
        BudgetError: a number out of its range, or a budget outside floor and ceiling.
    """
    check_counts(num_layers=num_layers, budget=budget)
    if not 0 <= recent <= 1:
        raise BudgetError(f"recent must be a share from 0 to 1, got {recent!r}")
    most = max(2 * budget, 1) if ceiling is None else ceiling
    if not floor <= budget <= most:
        raise BudgetError(f"a mean budget of {budget} is outside floor {floor} and ceiling {most}")
    top = min(2 * budget, most)
    steepest, flattest = 0.0, 1.0
    for _ in range(_HALVINGS):
        decay = (steepest + flattest) / 2
        if top * _shares(num_layers, decay, recent).mean() < budget:
            steepest = decay
        else:
            flattest = decay
    return complete(top * _shares(num_layers, flattest, recent), budget * num_layers, floor, most)


def _shares(layers: int, decay: float, recent: float) -> NDArray[np.float64]:
    """Return what each layer keeps, as a share of what the lowest one keeps."""
    passing = (1 - decay) * (np.cos(np.pi * np.arange(layers) / layers) + 1) / 2 + decay
    return np.asarray(recent + (1 - recent) * np.cumprod(passing), dtype=np.float64)
