"""Search: strategies that propose budgets, the objective, and the loop. ``evolkv.search(...)`` runs one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evolkv.evolution.strategies import STRATEGIES, GroupedCMA, JointCMA, RandomSearch
from evolkv.on_demand import from_homes

if TYPE_CHECKING:
    from evolkv.evolution.config import OneBudget, SearchConfig, SeveralBudgets
    from evolkv.evolution.curve import CurveResult
    from evolkv.evolution.keywords import search, search_curve
    from evolkv.evolution.progress import SearchProgress
    from evolkv.evolution.result import SearchResult

# Strategies are listed also where transformers is too old for the cache, which searches need.
_HOMES = {
    "CurveResult": "evolkv.evolution.curve",
    "OneBudget": "evolkv.evolution.config",
    "SearchConfig": "evolkv.evolution.config",
    "SearchProgress": "evolkv.evolution.progress",
    "SearchResult": "evolkv.evolution.result",
    "SeveralBudgets": "evolkv.evolution.config",
    "search": "evolkv.evolution.keywords",
    "search_curve": "evolkv.evolution.keywords",
}

__all__ = [
    "STRATEGIES",
    "CurveResult",
    "GroupedCMA",
    "JointCMA",
    "OneBudget",
    "RandomSearch",
    "SearchConfig",
    "SearchProgress",
    "SearchResult",
    "SeveralBudgets",
    "search",
    "search_curve",
]

__getattr__ = from_homes(__name__, _HOMES)
