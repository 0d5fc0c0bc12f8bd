"""Evaluation: engines that score candidates, and methods compared side by side. ``evolkv.evaluate(...)`` compares."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from evolkv.evaluate.engine import Engine
from evolkv.evaluate.evaluation import Evaluation, EvaluationProgress, check_request, evaluate, run_evaluation
from evolkv.evaluate.naive import NaiveEngine
from evolkv.evaluate.replay import ReplayEngine
from evolkv.evaluate.significance import PairedComparison, paired_comparison
from evolkv.methods import Method, get_method

__all__ = [
    "Engine",
    "Evaluation",
    "EvaluationProgress",
    "Method",
    "NaiveEngine",
    "PairedComparison",
    "ReplayEngine",
    "check_request",
    "evaluate",
    "get_method",
    "paired_comparison",
    "run_evaluation",
]


class _CallablePackage(ModuleType):
    """Lets ``evolkv.evaluate`` be both this package and the function it is named after."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
