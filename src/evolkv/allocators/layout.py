"""Lay out budgets at an exact mean: by the name of an allocator, or in the proportions of other budgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv.allocators.complete import broadcast_bound, complete
from evolkv.allocators.cosine import cosine
from evolkv.allocators.pyramid import pyramid
from evolkv.allocators.uniform import uniform
from evolkv.budgets import read_entries
from evolkv.errors import UsageError
from evolkv.registry import Registry
from evolkv.selectors.base import Selector

#: The allocators that need no calibration and no prompt, by name.
ALLOCATORS: Registry[Callable[..., Any]] = Registry(
    "allocator", {"uniform": uniform, "pyramid": pyramid, "cosine": cosine}, "evolkv.allocators"
)


def layout(
    allocator: str,
    shape: tuple[int, ...],
    budget: int,
    selector: Selector,
    ceilings: ArrayLike,
    floor: int | None = None,
) -> NDArray[np.int64]:
    """Lay out budgets by a named allocator, as far as the layers can hold them.

    Args:
        allocator: a name in `ALLOCATORS`.
        shape: ``(layers,)`` or ``(layers, kv_heads)``.
        budget: mean cache entries per KV head.
        selector: what the budgets are for; its window counts in the budget of a pyramid.
        ceilings: the most a head of each layer can hold, ``[layers]``: its sliding window, or the context.
        floor: the least a head may get. Default: what the selector always keeps.

    Returns:
        Budgets in `shape`. Their mean is exactly `budget`, unless the layers cannot hold that much: then each gets at
        least what it can hold.

    Raises:
        UsageError: an unknown allocator, or one that does not give one number per layer.
        BudgetError: a budget that the allocator cannot lay out.
    """
    layers, limits = shape[0], np.asarray(ceilings)
    if allocator == "pyramid":
        window = min(selector.window, budget - 1)
        column = pyramid(layers, budget, window=window, ceiling=max(budget, int(limits.max())))
    elif allocator == "cosine":
        column = cosine(layers, budget, ceiling=max(budget, int(limits.max())))
    else:
        column = np.asarray(ALLOCATORS[allocator](layers, budget))
        if column.shape != (layers,):
            raise UsageError(
                f"allocator {allocator!r} gave {column.shape} budgets; expected one for each of {layers} layers"
            )
    budgets = np.broadcast_to(column if len(shape) == 1 else column[:, None], shape)
    if budget > limits.mean():
        return np.maximum(budgets, _by_entry(limits, len(shape)))
    return expand(budgets, budget, selector.min_budget if floor is None else floor, limits)


def expand(budgets: ArrayLike, budget: int, floor: ArrayLike, ceiling: ArrayLike) -> NDArray[np.int64]:
    """Carry budgets to another mean, in the same proportions, by the rule of `complete`.

    A layer that can hold less than the floor gets its ceiling: a sliding window may be smaller than what the selector
    always keeps, and such a layer holds its window.

    Args:
        budgets: as for `complete`, ``[layers]`` or ``[layers, kv_heads]``.
        budget: the new mean budget c′; the total becomes c′ times the number of entries.
        floor: the least an entry should get, an int, or one for each layer or entry.
        ceiling: the most an entry can hold, likewise.

    Returns:
        int64 budgets in the same shape, with mean exactly `budget`.

    Raises:
        BudgetError: as for `complete`.
    """
    return complete(budgets, read_entries(budget) * np.size(budgets), *_bounds(budgets, floor, ceiling))


def fit(budgets: ArrayLike, total: int, floor: ArrayLike, ceiling: ArrayLike) -> NDArray[np.int64]:
    """Bring budgets to a total as `expand` does, or as near to it as floors and ceilings allow.

    Args:
        budgets, floor, ceiling: as for `expand`.
        total: the total to reach, in cache entries. One below the sum of the floors becomes that, and one above the sum
            of the ceilings becomes that.

    Raises:
        BudgetError: budgets or bounds that `complete` cannot use.
    """
    low, high = _bounds(budgets, floor, ceiling)
    return complete(budgets, min(max(total, int(low.sum())), int(high.sum())), low, high)


def _bounds(budgets: ArrayLike, floor: ArrayLike, ceiling: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    least, most = (
        broadcast_bound(name, _by_entry(bound, np.ndim(budgets)), np.shape(budgets))
        for name, bound in (("floor", floor), ("ceiling", ceiling))
    )
    return np.minimum(least, most), most


def _by_entry(bound: ArrayLike, dimensions: int) -> NDArray[Any]:
    """Return a bound of each layer as one that broadcasts over its heads."""
    array = np.asarray(bound)
    return array[:, None] if array.ndim == 1 and dimensions == 2 else array
