"""LU-KV's allocation: each further entry goes to the head in which it is worth most."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv.allocators.complete import broadcast_bounds, check_total


def lukv(utility: ArrayLike, total: int, floor: ArrayLike, ceiling: ArrayLike) -> NDArray[np.int64]:
    """Give each further entry to the layer or head in which its calibrated utility is highest.

    The paper discards, from all heads together, the cheapest last-ranked entry until the total is met. That leaves the
    entries of the highest `marginal_utility`, which are taken here at once. Of equals those of the better rank come
    first.

    LU-KV (arXiv 2602.08585), the allocation. Ours meets the total exactly, for one utility that is the sum over the
    calibration examples; the paper solves for each example and averages the ratios.

    Args:
        utility: of the entry at each rank of each layer or head, ``[..., ranks]``, not negative, from the first rank
            on; see `evolkv.cache.utility`. Entries beyond are worth nothing.
        total: of all budgets, in cache entries.
        floor: the least a budget may be, an int or an array that broadcasts to ``[...]``.
        ceiling: the most a budget may be, likewise.

    Returns:
        int64 budgets ``[...]``, with sum exactly `total`.

    Raises:
        BudgetError: for bounds that cross, or between which the total is not.
    """
    worth = np.asarray(utility, dtype=np.float64)
    low, high = broadcast_bounds(worth.shape[:-1], floor, ceiling)
    check_total(total, low, high)
    missing = max(0, int(high.max()) - worth.shape[-1])
    worth = np.pad(worth, [(0, 0)] * low.ndim + [(0, missing)])
    by_rank = np.moveaxis(marginal_utility(worth, low, high), -1, 0).ravel()
    taken = np.argsort(-by_rank, kind="stable")[: total - int(low.sum())] % low.size
    return low + np.bincount(taken, minlength=low.size).reshape(low.shape)


def marginal_utility(
    utility: NDArray[np.float64], floor: NDArray[np.int64], ceiling: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return what each further entry of a budget is worth, so that it is never more than the one before.

    These are the slopes of the least concave function above the cumulative utility between floor and ceiling: the
    paper's lower convex hull of the utility lost from the worst rank up, seen from the other end. An entry that is
    worth little but stands before one that is worth much counts as half-way to it.

    Args:
        utility: of the entry at each rank, ``[..., ranks]``.
        floor: ``[...]``; entries below it are always kept.
        ceiling: ``[...]``, at most the number of ranks.

    Returns:
        ``[..., ranks]``; minus infinity below the floor and from the ceiling on.
    """
    rank = np.arange(utility.shape[-1])
    inside = (rank >= floor[..., None]) & (rank < ceiling[..., None])
    owner = np.broadcast_to(np.arange(floor.size).reshape(floor.shape)[..., None], inside.shape)[inside]
    sums, counts = utility[inside], np.ones(len(owner), dtype=np.int64)
    while True:
        means = sums / counts
        rising = (means[1:] > means[:-1]) & (owner[1:] == owner[:-1])
        if not rising.any():
            break
        # Pooled in whichever order, what rises comes to the same.
        starts = np.flatnonzero(np.append(True, ~rising))
        sums, counts = np.add.reduceat(sums, starts), np.add.reduceat(counts, starts)
        owner = owner[starts]
    marginal = np.full(utility.shape, -np.inf)
    marginal[inside] = np.repeat(means, counts)
    return marginal
