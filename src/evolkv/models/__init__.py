"""Models: loading one by name, path or alias, and the facts about it that budgets depend on."""

from __future__ import annotations

from evolkv.models.aliases import ALIASES, ModelRow, PackagedModel, list_models
from evolkv.models.facts import ModelFacts, ModelInfo, describe_model, model_facts
from evolkv.models.loading import load_model

__all__ = [
    "ALIASES",
    "ModelFacts",
    "ModelInfo",
    "ModelRow",
    "PackagedModel",
    "describe_model",
    "list_models",
    "load_model",
    "model_facts",
]
