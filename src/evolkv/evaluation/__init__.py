"""Evaluation: engines that score candidates, and methods compared side by side. ``evolkv.evaluate(...)`` compares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evolkv.evaluation.certify import Certificate, certify
from evolkv.methods import Method, get_method
from evolkv.on_demand import from_homes
from evolkv.significance import PairedComparison, paired_comparison

if TYPE_CHECKING:
    from evolkv.evaluation.engine import Engine
    from evolkv.evaluation.evaluation import EvaluationInterrupted, EvaluationProgress, evaluate
    from evolkv.evaluation.naive_engine import NaiveEngine
    from evolkv.evaluation.replay_engine import ReplayEngine

# Records are read, compared and certified also where transformers is too old for the cache, which engines need.
_HOMES = {
    "Engine": "evolkv.evaluation.engine",
    "EvaluationInterrupted": "evolkv.evaluation.evaluation",
    "EvaluationProgress": "evolkv.evaluation.evaluation",
    "NaiveEngine": "evolkv.evaluation.naive_engine",
    "ReplayEngine": "evolkv.evaluation.replay_engine",
    "evaluate": "evolkv.evaluation.evaluation",
}

__all__ = [
    "Certificate",
    "Engine",
    "EvaluationInterrupted",
    "EvaluationProgress",
    "Method",
    "NaiveEngine",
    "PairedComparison",
    "ReplayEngine",
    "certify",
    "evaluate",
    "get_method",
    "paired_comparison",
]

__getattr__ = from_homes(__name__, _HOMES)
