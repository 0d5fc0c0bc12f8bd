"""The facts about a model that budgets and profiles depend on, read once for each model."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from evolkv.errors import ModelError
from evolkv.models.identity import fingerprint
from evolkv.models.layers import KVLayer, OtherLayer, layers_of, read_layers
from evolkv.models.rotary import kinds

UNBOUNDED_CONTEXT = 2**31 - 1


@dataclass(frozen=True)
class ModelInfo:
    """The facts about a decoder-only model that decide which budgets fit it.

    Attributes:
        name: alias, Hugging Face id, or name of the folder or file the model came from.
        num_layers: L, the number of layers with a KV cache; in a hybrid model the others do not count.
        num_kv_heads: H, the number of KV heads of each of these layers.
        num_heads: the number of query heads of each.
        head_dim: channels of one head.
        max_context: the longest context the model declares, in tokens; 2³¹ − 1 if it declares none.
        fingerprint: 16 hex digits that identify architecture and weights; see `evolkv.models.identity.fingerprint`.
    """

    name: str
    num_layers: int
    num_kv_heads: int
    num_heads: int
    head_dim: int
    max_context: int
    fingerprint: str


@dataclass(frozen=True)
class ModelFacts:
    """The facts that a model's config states; unlike `ModelInfo` they need no look at the weights.

    Attributes:
        kv_layers: the decoder's layers with a key-value cache, in order.
        other_layers: the others.
        num_layers, num_kv_heads, num_heads, head_dim, max_context: as of `ModelInfo`.
        model_type: transformers' name of the architecture.
    """

    kv_layers: tuple[KVLayer, ...]
    other_layers: tuple[OtherLayer, ...]
    num_kv_heads: int
    num_heads: int
    head_dim: int
    max_context: int
    model_type: str

    @property
    def num_layers(self) -> int:
        """L, the number of layers with a KV cache."""
        return len(self.kv_layers)

    @property
    def sliding_windows(self) -> list[int | None]:
        """The sliding window in tokens of each layer with a KV cache, None where a layer sees everything."""
        return [layer.sliding_window for layer in self.kv_layers]

    def most_held(self, tokens: int) -> NDArray[np.int64]:
        """Return the most entries that a head of each layer with a KV cache can hold of a text, ``[L]``.

        Args:
            tokens: length of the text.
        """
        return np.array([tokens if window is None else min(tokens, window) for window in self.sliding_windows])


_facts: weakref.WeakKeyDictionary[nn.Module, tuple[list[dict[str, Any]], ModelFacts]] = weakref.WeakKeyDictionary()


def model_facts(model: nn.Module) -> ModelFacts:
    """Return the facts about a transformers model, read again only when its config has changed.

    Args:
        model: a decoder-only transformers model.

    Raises:
        ModelError: the model cannot be compressed (see `evolkv.models.layers`), or its layers differ in their number
            of KV heads.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ModelError(f"expected a transformers model, got {type(model).__name__}; use load_model() to get one")
    text = config.get_text_config(decoder=True)
    # generate() may run fewer layers for a while: it drafts with the first ones and changes the config for that.
    state = [_state(config), _state(text)]
    state_then, facts = _facts.get(model, (None, None))
    if facts is None or state != state_then:
        facts = _read(model, text)
        _facts[model] = state, facts
    return facts


def cache_shape(config: Any) -> tuple[str, int, int]:
    """Return the name, L and H of the model that a config describes; see `ModelInfo`. The weights need not be there.

    Raises:
        ModelError: as `model_facts`, as far as the config tells.
    """
    text = config.get_text_config(decoder=True)
    kv_layers, _ = layers_of(config, str(text.model_type))
    num_heads = _same_for_all_layers(text, "num_attention_heads", "query heads")
    return _name(config), len(kv_layers), _num_kv_heads(text, num_heads)


def longest_context(text: Any) -> int:
    """Return the longest context that the config of a language model declares, in tokens; see `ModelInfo`.

    Of a config that somebody has given YaRN's factor, as Qwen's model cards say, that is more than the number in it.
    """
    declared = getattr(text, "max_position_embeddings", None) or 0
    yarn = [each for each in kinds(text) if each["rope_type"] == "yarn"]
    stretched = [
        int((each.get("factor") or 1) * (each.get("original_max_position_embeddings") or declared)) for each in yarn
    ]
    return max(int(declared), *stretched, 0) or UNBOUNDED_CONTEXT


def _state(config: Any) -> dict[str, Any]:
    """Return a config's fields, without its attention implementation, which caches change as they come and go."""
    return {
        name: list(value) if isinstance(value, (list, tuple)) else value
        for name, value in vars(config).items()
        if "attn_implementation" not in name
    }


def _read(model: Any, text: Any) -> ModelFacts:
    kv_layers, other_layers = read_layers(model)
    num_heads = _same_for_all_layers(text, "num_attention_heads", "query heads")
    has_head_dim = bool(_field(text, "head_dim"))
    return ModelFacts(
        kv_layers=tuple(kv_layers),
        other_layers=tuple(other_layers),
        num_kv_heads=_num_kv_heads(text, num_heads),
        num_heads=num_heads,
        head_dim=_same_for_all_layers(text, "head_dim", "channels") if has_head_dim else text.hidden_size // num_heads,
        max_context=longest_context(text),
        model_type=text.model_type,
    )


def describe_model(model: nn.Module) -> ModelInfo:
    """Return the facts about a transformers model that decide which budgets fit it, its fingerprint included.

    Args:
        model: a decoder-only transformers model, on any device and in any dtype.

    Raises:
        ModelError: as `model_facts`.
    """
    facts = model_facts(model)
    shape = {
        "num_layers": facts.num_layers,
        "num_kv_heads": facts.num_kv_heads,
        "num_heads": facts.num_heads,
        "head_dim": facts.head_dim,
    }
    return ModelInfo(
        name=_name(model.config),
        max_context=facts.max_context,
        fingerprint=fingerprint(model, {"type": facts.model_type, **shape}),
        **shape,
    )


def _name(config: Any) -> str:
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name:
        return str(config.model_type)
    path = Path(name)
    # A path says where the model lies on one machine, not what it is.
    return path.resolve().name if path.is_absolute() or path.is_dir() else name


def _field(text: Any, field: str) -> Any:
    """Return a field of a config; a list by layer if it differs from layer to layer."""
    try:
        return getattr(text, field, None)
    except RuntimeError:  # what transformers raises for a field that has no one value
        return [getattr(layer, field, None) for layer in text.per_layer_config]


def _same_for_all_layers(text: Any, field: str, what: str) -> int:
    value = _field(text, field)
    numbers = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(numbers) > 1:
        raise ModelError(
            f"model type {text.model_type!r} has layers with different numbers of {what} "
            f"({', '.join(map(str, sorted(numbers, key=str)))}); EvolKV needs the same number in every layer"
        )
    number = numbers.pop() if numbers else None
    if not isinstance(number, int):
        raise ModelError(f"the config of model type {text.model_type!r} does not say how many {what} it has")
    return number


def _num_kv_heads(text: Any, num_heads: int) -> int:
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    for field in ("num_key_value_heads", "num_kv_heads"):
        if _field(text, field) is not None:
            number = _same_for_all_layers(text, field, "KV heads")
            for elsewhere in ("num_global_key_value_heads", "swa_num_key_value_heads"):
                if (other := getattr(text, elsewhere, None)) not in (None, number):
                    raise ModelError(
                        f"model type {text.model_type!r} has layers with different numbers of KV heads "
                        f"({number}, {other}); EvolKV needs the same number in every layer"
                    )
            return number
    return num_heads
