"""Completion of budgets (arXiv 2509.08315, sec. 3): integers with an exact total, within floor and ceiling."""

from __future__ import annotations

import operator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv.errors import BudgetError


def complete(budgets: ArrayLike, target_total: int, floor: ArrayLike, ceiling: ArrayLike) -> NDArray[np.int64]:
    """Bring budgets k of total A to the total T, in proportion: b = k + (k / A) · (T − A), within floor and ceiling.

    That is k · T / A, and a projection onto {Σ b = T, floor ≤ b ≤ ceiling}: the real solution is
    b = clip(s · k, floor, ceiling) for the one scale s that meets the total. What clipping takes or gives is shared
    among the free entries in proportion. The solution is then rounded by largest remainder. Order is kept among
    entries with the same floor and ceiling: a larger budget never becomes the smaller one. Equal budgets differ by at
    most 1 afterwards, the earlier ones being larger. Budgets within the bounds whose total is already T come back
    unchanged.

    Args:
        budgets: budgets, or weights: non-negative numbers of any shape, at least one of them positive. Zeros stay at
            their floor as long as the others can hold the total, and share the rest equally when they cannot.
        target_total: T, the sum of the result, in cache entries.
        floor: the least an entry may get, a non-negative int or an array that broadcasts to `budgets`.
        ceiling: the most an entry may get, likewise.

    Returns:
        int64 budgets in the shape of `budgets`, with sum exactly `target_total`.

    Raises:
        BudgetError: budgets that are empty, negative, not finite or all zero (zeros have no proportions: `uniform` is
            the allocation for that); bounds that are not whole numbers or cross; a total below the sum of the floors
            or above the sum of the ceilings.
    """
    w = np.asarray(budgets)
    shape = w.shape
    w = _checked_weights(w)
    low, high = (bound.ravel() for bound in broadcast_bounds(shape, floor, ceiling))
    target = check_total(target_total, low, high)
    real = _water_fill(w, float(target), low.astype(np.float64), high.astype(np.float64))
    whole = np.floor(real).astype(np.int64)
    missing = target - int(whole.sum())
    if missing > 0:
        by_remainder = np.lexsort((-w, whole - real))
        whole[by_remainder[:missing]] += 1
    return whole.reshape(shape)


def check_total(total: int, low: NDArray[np.int64], high: NDArray[np.int64]) -> int:
    """Return a total of budgets as an int.

    Raises:
        BudgetError: if it is no whole number, or not between the sums of floors and ceilings.
    """
    try:
        target = operator.index(total)
    except TypeError:
        raise BudgetError(f"the total must be a whole number of cache entries, got {total!r}") from None
    least, most = int(low.sum()), int(high.sum())
    if not least <= target <= most:
        side = (
            f"below the sum of the floors ({least}); raise the budget or lower the floor"
            if target < least
            else f"above the sum of the ceilings ({most}); lower the budget or raise the ceiling"
        )
        raise BudgetError(f"a total of {target} over {low.size} entries is {side}")
    return target


def broadcast_bounds(
    shape: tuple[int, ...], floor: ArrayLike, ceiling: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return floor and ceiling as int64 arrays of `shape`.

    Raises:
        BudgetError: bounds that are not whole numbers, do not broadcast to `shape`, or do not keep
            0 <= floor <= ceiling.
    """
    low, high = broadcast_bound("floor", floor, shape), broadcast_bound("ceiling", ceiling, shape)
    for least, most in np.stack([low, high], axis=-1)[(low < 0) | (low > high)][:1]:
        raise BudgetError(f"floor {least} and ceiling {most} do not fit: expected 0 <= floor <= ceiling")
    return low, high


def broadcast_bound(name: str, bound: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return a bound as an int64 array of `shape`; see `broadcast_bounds`."""
    array = np.asarray(bound)
    if array.dtype.kind not in "iu":
        given = f"an array of {array.dtype}" if array.ndim else repr(array.item())
        raise BudgetError(f"{name} must be a whole number of cache entries, got {given}")
    try:
        return np.full(shape, array, dtype=np.int64)
    except ValueError:
        raise BudgetError(f"{name} of shape {array.shape} does not fit budgets of shape {shape}") from None


def _checked_weights(weights: NDArray) -> NDArray[np.float64]:
    try:
        w = weights.astype(np.float64).ravel()
    except (TypeError, ValueError):
        raise BudgetError("budgets and weights must be numbers") from None
    if w.size == 0:
        raise BudgetError("there is nothing to allocate: the budgets are empty")
    # max and min are NaN if any entry is.
    largest = w.max()
    if not (w.min() >= 0 and largest < np.inf):
        raise BudgetError("budgets and weights must be finite and not negative")
    if largest == 0:
        raise BudgetError("budgets and weights that are all zero have no proportions to keep")
    return w / largest


def _water_fill(
    w: NDArray[np.float64], total: float, low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return clip(s · w, low, high) for the s at which it sums to `total` (reachable within low and high)."""
    real = np.empty_like(w)
    free = np.arange(w.size)
    # Where clipping adds more than it takes, s is too large, so what lies below its floor would stay there:
    # it is settled, and likewise at the ceiling. Every round settles an entry, so there are at most n rounds.
    while True:
        weight = w.sum()
        share = w * (total / weight) if weight > 0 else np.full(w.size, total / w.size)
        kept = np.minimum(np.maximum(share, low), high)
        off = kept - share
        surplus = off.sum()
        settled = off > 0 if surplus > 0 else off < 0
        if surplus == 0 or not settled.any() or settled.all():
            real[free] = kept
            return real
        real[free[settled]] = kept[settled]
        total -= kept[settled].sum()
        rest = ~settled
        free, w, low, high = free[rest], w[rest], low[rest], high[rest]
