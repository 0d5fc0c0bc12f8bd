"""Search: strategies that propose budgets, the objective, and the loop. ``evolkv.search(...)`` runs one."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from evolkv.search.curve import CurveResult, search_curve
from evolkv.search.progress import SearchProgress
from evolkv.search.result import SearchResult
from evolkv.search.session import search
from evolkv.search.strategies import STRATEGIES, GroupedCMA, JointCMA, RandomSearch

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


class _CallablePackage(ModuleType):
    """Lets ``evolkv.search`` be both this package and the function it is named after."""

    def __call__(self, *args: Any, **kwargs: Any) -> SearchResult:
        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
