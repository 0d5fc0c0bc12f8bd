"""Allocators that lay out budgets for each prompt anew, from its attention.

A new one is one file with one dataclass, and one line in `ADAPTIVE`.
"""

from __future__ import annotations

from evolkv.allocators.adaptive.adakv import AdaKV
from evolkv.allocators.adaptive.base import AdaptiveAllocator, HeadAllocator, LayerAllocator
from evolkv.allocators.adaptive.cake import CAKE
from evolkv.allocators.adaptive.dynamickv import DynamicKV
from evolkv.registry import Registry, with_parameters
from evolkv.specs import parse_named

#: The allocators that decide for each prompt anew, by name.
ADAPTIVE: Registry[type[AdaptiveAllocator]] = Registry(
    "adaptive allocator",
    {cls.name: cls for cls in (AdaKV, CAKE, DynamicKV)},
    "evolkv.adaptive_allocators",
    AdaptiveAllocator,
)


def get_adaptive(text: str) -> AdaptiveAllocator:
    """Return the allocator that a text describes: ``name`` or ``name:parameter=value,parameter=value``.

    Args:
        text: such as ``"cake:window=8"``.

    Raises:
        UsageError: for an unknown name or parameter, or a value that is out of range.
    """
    spec = parse_named(text, "allocator", ADAPTIVE)
    return with_parameters(ADAPTIVE[spec.pop("name")], spec)


__all__ = [
    "ADAPTIVE",
    "CAKE",
    "AdaKV",
    "AdaptiveAllocator",
    "DynamicKV",
    "HeadAllocator",
    "LayerAllocator",
    "get_adaptive",
]
