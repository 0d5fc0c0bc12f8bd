"""Budgets that do not rise from layer to layer: the nearest to any given ones, with the same total."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def non_increasing(budgets: ArrayLike) -> NDArray[np.int64]:
    """Return the budgets nearest to given ones among those that do not rise, with the same total.

    Neighbours that rise are pooled and share their sum, until nothing rises (isotonic regression by pooling adjacent
    violators: Barlow et al. 1972, "Statistical Inference under Order Restrictions"). No budget leaves the range of the
    given ones.

    Args:
        budgets: whole numbers, ``[layers]``.

    Returns:
        int64 budgets, ``[layers]``.
    """
    pools: list[tuple[int, int]] = []
    for budget in np.asarray(budgets).tolist():
        total, size = budget, 1
        while pools and pools[-1][0] * size < total * pools[-1][1]:
            above, layers = pools.pop()
            total, size = total + above, size + layers
        pools.append((total, size))
    shared = [total // size + (place < total % size) for total, size in pools for place in range(size)]
    # Rounding may leave neighbouring pools a step apart in the wrong order.
    return np.array(sorted(shared, reverse=True), dtype=np.int64)
