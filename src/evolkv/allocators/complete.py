"""Completion and expansion of budgets (arXiv 2509.08315, sec. 3): another total, the same proportions."""

from __future__ import annotations

import operator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv.allocators.project import project
from evolkv.errors import BudgetError


def complete(budgets: ArrayLike, target_total: int, floor: ArrayLike, ceiling: ArrayLike) -> NDArray[np.int64]:
    """Bring budgets k of total A to a total T: b = k + (k / A) · (T − A), within floor and ceiling.

    That is k · T / A: the proportions stay. What the floor or the ceiling cuts off is shared among the free
    entries in proportion, and the result is rounded by largest remainder. Order is kept (k_i ≥ k_j gives
    b_i ≥ b_j, entries of equal k differing by at most 1) among entries with the same floor and ceiling.
    Budgets within the bounds whose total is already T come back unchanged.

    Args:
        budgets: non-negative numbers of any shape, (L,) or (L, H) as a rule, not all zero.
        target_total: T, in cache entries.
        floor: the least an entry may get, an int or an array that broadcasts to `budgets`.
        ceiling: the most an entry may get, likewise (arrays serve layers with a sliding window of their own).

    Returns:
        int64 budgets in the same shape, with sum exactly `target_total`.

    Raises:
        BudgetError: T out of reach of the bounds; budgets that are empty, negative, not finite, or all zero
            (zeros have no proportions: `uniform` is the allocation for that).
    """
    return project(budgets, target_total, floor, ceiling)


def expand(budgets: ArrayLike, budget: int, floor: ArrayLike, ceiling: ArrayLike) -> NDArray[np.int64]:
    """Carry budgets found at one mean budget to another, by the rule of `complete`.

    Args:
        budgets: as for `complete`.
        budget: the new mean budget c′; the total becomes c′ times the number of entries.
        floor: as for `complete`.
        ceiling: as for `complete`.

    Returns:
        int64 budgets in the same shape, with mean exactly `budget`.

    Raises:
        BudgetError: as for `complete`.
    """
    try:
        mean = operator.index(budget)
    except TypeError:
        raise BudgetError(f"the budget must be a whole number of cache entries, got {budget!r}") from None
    return complete(budgets, mean * np.size(budgets), floor, ceiling)
