"""Search: strategies that propose budgets, the objective, and the loop. ``evolkv.search(...)`` runs one."""

from __future__ import annotations

from evolkv.evolution.config import OneBudget, SearchConfig, SeveralBudgets
from evolkv.evolution.curve import CurveResult, run_curve
from evolkv.evolution.keywords import by_keyword
from evolkv.evolution.progress import SearchProgress
from evolkv.evolution.result import SearchResult
from evolkv.evolution.run import run_search
from evolkv.evolution.strategies import STRATEGIES, GroupedCMA, JointCMA, RandomSearch

search = by_keyword("search", OneBudget, run_search)
search_curve = by_keyword("search_curve", SeveralBudgets, run_curve)

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
