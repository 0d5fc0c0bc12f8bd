"""Models: loading one by name, path or alias, and the facts about it that budgets depend on."""

from __future__ import annotations

from evolkv.models.aliases import ALIASES, ModelRow, PackagedModel, list_models
from evolkv.models.facts import ModelFacts, ModelInfo, cache_shape, describe_model, model_facts
from evolkv.models.identity import adapters_in_use, is_quantized, weights_checksum
from evolkv.models.loading import Origin, load_model, loaded_from

__all__ = [
    "ALIASES",
    "ModelFacts",
    "ModelInfo",
    "ModelRow",
    "Origin",
    "PackagedModel",
    "adapters_in_use",
    "cache_shape",
    "describe_model",
    "is_quantized",
    "list_models",
    "load_model",
    "loaded_from",
    "model_facts",
    "weights_checksum",
]
