"""Allocators that lay out budgets for each prompt anew, from its attention.

A new one is one file with one dataclass, and one line in `ADAPTIVE`.
"""

from __future__ import annotations

from evolkv.allocators.adaptive.adakv import AdaKV
from evolkv.allocators.adaptive.base import (
    AdaptiveAllocator,
    HeadAllocator,
    LayerAllocator,
    Observations,
    Observer,
    rank_and_observe,
)
from evolkv.allocators.adaptive.cake import CAKE
from evolkv.allocators.adaptive.dynamickv import DynamicKV
from evolkv.registry import Registry

ADAPTIVE: Registry[type[AdaptiveAllocator]] = Registry(
    "adaptive allocator", {cls.name: cls for cls in (AdaKV, CAKE, DynamicKV)}
)

__all__ = [
    "ADAPTIVE",
    "CAKE",
    "AdaKV",
    "AdaptiveAllocator",
    "DynamicKV",
    "HeadAllocator",
    "LayerAllocator",
    "Observations",
    "Observer",
    "rank_and_observe",
]
