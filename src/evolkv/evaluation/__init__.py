"""Evaluation: engines that score candidates, and methods compared side by side. ``evolkv.evaluate(...)`` compares."""

from __future__ import annotations

from evolkv.evaluation.certify import Certificate, certify
from evolkv.evaluation.engine import Engine
from evolkv.evaluation.evaluation import EvaluationInterrupted, EvaluationProgress, check_request, evaluate
from evolkv.evaluation.naive_engine import NaiveEngine
from evolkv.evaluation.replay_engine import ReplayEngine
from evolkv.methods import Method, get_method
from evolkv.significance import PairedComparison, paired_comparison

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
    "check_request",
    "evaluate",
    "get_method",
    "paired_comparison",
]
