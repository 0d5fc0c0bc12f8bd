"""Find the layers of a model that have a key-value cache, and refuse models that cannot be compressed.

Budgets are for layers that have a cache of keys and values. In a hybrid model the others keep a state of fixed size
(linear attention, a state-space model, a short convolution) or nothing; they have no budget and are not counted in L.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from evolkv.errors import ModelError

# What a modelling file that goes through transformers' attention interface has in its namespace.
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# Model types whose wiring no config tells, and what of it a compressed cache cannot give.
_WIRED_OTHERWISE = {
    "diffllama": "attends twice to what a layer holds, with other values each time; EvolKV needs one attention a layer",
    "doge": "masks tokens by the values that a layer holds of all of them; EvolKV needs masks that no value decides",
    "jetmoe": "repeats its keys and values for each expert between cache and attention; EvolKV needs keys that go to "
    "attention as the cache returned them",
    "mimo_v2_flash": "has layers with different numbers of KV heads: sliding ones have twice as many as full ones; "
    "EvolKV needs the same number in every layer",
    "recurrent_gemma": "does not give its cache back with its outputs, so that generate() would take each step for a "
    "prompt; EvolKV needs outputs that hold the cache",
    "mllama_text_model": "has cross-attention layers, which read an image's keys and values back from the cache; "
    "EvolKV needs self-attention in every layer",
}


@dataclass(frozen=True)
class KVLayer:
    """A decoder layer with a key-value cache.

    Attributes:
        index: its number in the decoder, from 0; other layers count.
        sliding_window: how many tokens a query sees, or None for all.
    """

    index: int
    sliding_window: int | None


@dataclass(frozen=True)
class OtherLayer:
    """A decoder layer without a key-value cache.

    Attributes:
        index: its number in the decoder, from 0.
        states: how many recurrent states it keeps; 0 for a layer that keeps nothing.
    """

    index: int
    states: int


def read_layers(model: PreTrainedModel) -> tuple[list[KVLayer], list[OtherLayer]]:
    """Return the layers of a decoder that have a key-value cache, and the others, each in order.

    `evolkv.models.model_facts` does so once for each model.

    Raises:
        ModelError: if the model cannot be compressed.
    """
    refuse(model)
    return layers_of(model.config, type(model).__name__)


def layers_of(config: Any, name: str) -> tuple[list[KVLayer], list[OtherLayer]]:
    """Return what `read_layers` does for the model of that name which a config describes.

    Raises:
        ModelError: if a layer cannot be compressed.
    """
    kept: list[KVLayer] = []
    others: list[OtherLayer] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicSlidingWindowLayer:
            kept.append(KVLayer(index, int(layer.sliding_window)))
        elif type(layer) is DynamicLayer:
            kept.append(KVLayer(index, None))
        elif type(layer) is LinearAttentionLayer:
            others.append(OtherLayer(index, layer.number_of_states))
        elif not isinstance(layer, (CacheLayerMixin, LinearAttentionCacheLayerMixin)):
            others.append(OtherLayer(index, 0))
        elif isinstance(layer, LinearAttentionCacheLayerMixin):
            raise ModelError(
                f"layer {index} of {name} has attention and a recurrent state at once; EvolKV compresses hybrid "
                "models in which a layer has the one or the other"
            )
        else:
            raise ModelError(
                f"layer {index} of {name} keeps a {type(layer).__name__}, not just keys and values per token; EvolKV "
                "compresses layers with full or sliding-window attention"
            )
    return kept, others


def continues_by_token(model: PreTrainedModel) -> bool:
    """Return whether a model can go on from its recurrent states by a single token only.

    In a call of several tokens transformers' state-space mixers (Mamba) start from an empty state, whatever the cache
    holds.
    """
    return any(hasattr(module, "ssm_state_size") for module in model.get_decoder().modules())


def looks_ahead(model: PreTrainedModel) -> bool:
    """Return whether tokens of a prompt attend to later ones, as PaliGemma's do: then a prefix depends on the rest."""
    return any(not getattr(module, "is_causal", True) for module in model.get_decoder().modules())


def refuse(model: PreTrainedModel) -> None:
    """Raises `ModelError` for a model whose kind of attention cannot be compressed, and says why."""
    config: Any = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; EvolKV needs a decoder-only language model")
    text = config.get_text_config(decoder=True)
    kind = f"model type {text.model_type!r}"
    if text.model_type in _WIRED_OTHERWISE:
        raise ModelError(f"{kind} {_WIRED_OTHERWISE[text.model_type]}")
    if getattr(text, "kv_lora_rank", None):
        raise ModelError(
            f"{kind} has latent attention: it keeps one vector per token, from which the keys and values of all heads "
            "are made; EvolKV needs a cache of keys and values for each KV head"
        )
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()) or (
        getattr(text, "layer_types", None) is None and getattr(text, "attention_chunk_size", None)
    ):
        raise ModelError(
            f"{kind} has chunked attention, in which a new chunk no longer sees any of the one before it; "
            "EvolKV needs full or sliding-window attention"
        )
    if getattr(text, "num_kv_shared_layers", 0) or "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        raise ModelError(
            f"{kind} has layers that share one KV cache; EvolKV needs a cache of its own for every layer with attention"
        )
    if not any(isinstance(layer, CacheLayerMixin) for layer in DynamicCache(config=text).layers):
        raise ModelError(f"no layer of {name} has a key-value cache; there is nothing for EvolKV to compress")
    files = sorted({type(module).__module__ for module in model.get_decoder().modules()})
    caches = [cache for file in files for cache in _own_caches(file)]
    if caches:
        raise ModelError(f"{kind} brings a cache class of its own ({caches[0]}); EvolKV needs transformers'")
    if not any(hasattr(sys.modules[file], _INTERFACE) for file in files):
        raise ModelError(
            f"{kind} does not go through transformers' attention interface; EvolKV needs it to see queries and keys"
        )


@lru_cache(maxsize=256)
def _own_caches(file: str) -> list[str]:
    """Return the cache classes that a modelling file defines."""
    classes = [each for each in vars(sys.modules[file]).values() if isinstance(each, type)]
    return [each.__name__ for each in classes if issubclass(each, Cache) and each.__module__ == file]
