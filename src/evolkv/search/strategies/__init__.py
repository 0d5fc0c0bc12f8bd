"""Strategies by name: who proposes the candidates of a search."""

from __future__ import annotations

from collections.abc import Callable

from evolkv.registry import Registry
from evolkv.search.strategies.base import Strategy
from evolkv.search.strategies.grouped import GroupedCMA
from evolkv.search.strategies.joint import JointCMA
from evolkv.search.strategies.random_search import RandomSearch

STRATEGIES: Registry[Callable[..., Strategy]] = Registry(
    "strategy", {"joint": JointCMA, "evolkv": GroupedCMA, "random": RandomSearch}
)

__all__ = ["STRATEGIES", "GroupedCMA", "JointCMA", "RandomSearch", "Strategy"]
