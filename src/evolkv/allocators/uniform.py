"""The same budget for every layer and head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evolkv.errors import BudgetError
from evolkv.numbers import is_whole


def uniform(num_layers: int, budget: int) -> NDArray[np.int64]:
    """Give every layer `budget` entries.

    Args:
        num_layers: L, at least 1.
        budget: cache entries per KV head, at least 1.

    Returns:
        int64 budgets of shape (L,).

    Raises:
        BudgetError: a number that is not a positive int.
    """
    check_counts(num_layers=num_layers, budget=budget)
    return np.full(num_layers, budget, dtype=np.int64)


def check_counts(**counts: int) -> None:
    """Raise `BudgetError` for the first of the named counts that is not a positive int."""
    for name, count in counts.items():
        if not is_whole(count) or count < 1:
            raise BudgetError(f"{name} must be a whole number of at least 1, got {count!r}")
