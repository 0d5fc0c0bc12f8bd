"""Search: strategies that propose budgets, the objective, and the loop. ``evolkv.search(...)`` runs one."""

from __future__ import annotations

from evolkv.evolution.curve import CurveResult, search_curve
from evolkv.evolution.progress import SearchProgress
from evolkv.evolution.result import SearchResult
from evolkv.evolution.session import search
from evolkv.evolution.strategies import STRATEGIES, GroupedCMA, JointCMA, RandomSearch

__all__ = [
    "STRATEGIES",
    "CurveResult",
    "GroupedCMA",
    "JointCMA",
    "RandomSearch",
    "SearchProgress",
    "SearchResult",
    "search",
    "search_curve",
]
