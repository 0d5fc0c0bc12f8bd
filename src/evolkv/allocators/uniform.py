"""The same budget for every layer and head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evolkv.errors import BudgetError
from evolkv.numbers import is_whole


def uniform(num_layers: int, budget: int, num_kv_heads: int | None = None) -> NDArray[np.int64]:
    """Give every layer, or every head of every layer, `budget` entries.

    Args:
        num_layers: L, at least 1.
        budget: cache entries per KV head, at least 1.
        num_kv_heads: H, or None for a layer-wise vector.

    Returns:
        int64 budgets of shape (L,), or (L, H) when `num_kv_heads` is given.

    Raises:
        BudgetError: a number that is not a positive int.
    """
    check_counts(num_layers=num_layers, budget=budget, num_kv_heads=1 if num_kv_heads is None else num_kv_heads)
    shape = (num_layers,) if num_kv_heads is None else (num_layers, num_kv_heads)
    return np.full(shape, budget, dtype=np.int64)


def check_counts(**counts: int) -> None:
    """Raise `BudgetError` for the first of the named counts that is not a positive int."""
    for name, count in counts.items():
        if not is_whole(count) or count < 1:
            raise BudgetError(f"{name} must be a whole number of at least 1, got {count!r}")
