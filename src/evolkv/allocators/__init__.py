"""How many entries each layer (and KV head) keeps, decided without search.

`ALLOCATORS` maps a name to the function that lays out budgets under a mean budget, the same for every prompt;
`complete`, `expand` and `project` bring budgets that are already there, or weights, to an exact total. Allocators that
decide for each prompt anew are in `evolkv.allocators.adaptive`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evolkv.allocators.complete import complete, expand
from evolkv.allocators.project import project
from evolkv.allocators.pyramid import pyramid
from evolkv.allocators.uniform import uniform
from evolkv.registry import Registry

ALLOCATORS: Registry[Callable[..., Any]] = Registry(
    "allocator", {"uniform": uniform, "pyramid": pyramid}, "evolkv.allocators"
)

__all__ = ["ALLOCATORS", "complete", "expand", "project", "pyramid", "uniform"]
