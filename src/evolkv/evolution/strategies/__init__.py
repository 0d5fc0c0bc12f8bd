"""Strategies by name: who proposes the candidates of a search."""

from __future__ import annotations

from evolkv.evolution.strategies.base import Strategy
from evolkv.evolution.strategies.grouped import GroupedCMA
from evolkv.evolution.strategies.joint import JointCMA
from evolkv.evolution.strategies.random_search import RandomSearch
from evolkv.evolution.strategies.start_only import GradientOnly, StartOnly
from evolkv.registry import Registry

#: The strategies by the name that `--strategy` takes.
STRATEGIES: Registry[type[Strategy]] = Registry(
    "strategy",
    {
        "joint": JointCMA,
        "gradient": GradientOnly,
        "start": StartOnly,
        "evolkv": GroupedCMA,
        "random": RandomSearch,
    },
)

__all__ = ["STRATEGIES", "GradientOnly", "GroupedCMA", "JointCMA", "RandomSearch", "StartOnly", "Strategy"]
