"""What budgets and profiles need to know about a model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evolkv.errors import ModelError
from evolkv.models.layers import cached_layers

UNBOUNDED_CONTEXT = 2**31 - 1
_SAMPLED_ROWS = 8
_SAMPLED_COLUMNS = 64


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
        fingerprint: 16 hex digits that identify architecture and weights; see `fingerprint`.
    """

    name: str
    num_layers: int
    num_kv_heads: int
    num_heads: int
    head_dim: int
    max_context: int
    fingerprint: str


def describe_model(model: nn.Module) -> ModelInfo:
    """The facts about a transformers model that decide which budgets fit it.

    Args:
        model: a decoder-only transformers model, on any device and in any dtype.

    Raises:
        ModelError: the model cannot be compressed (see `evolkv.models.layers`), or its layers differ in their number
            of KV heads.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ModelError(f"expected a transformers model, got {type(model).__name__}; use load_model() to get one")
    kept, _ = cached_layers(model)
    text = config.get_text_config(decoder=True)
    num_heads = _same_for_all_layers(text, "num_attention_heads", "query heads")
    has_head_dim = bool(_field(text, "head_dim"))
    head_dim = _same_for_all_layers(text, "head_dim", "channels") if has_head_dim else text.hidden_size // num_heads
    info = {
        "num_layers": len(kept),
        "num_kv_heads": _num_kv_heads(text, num_heads),
        "num_heads": num_heads,
        "head_dim": head_dim,
    }
    context = getattr(text, "max_position_embeddings", None)
    return ModelInfo(
        name=_name(config),
        max_context=int(context) if context and context > 0 else UNBOUNDED_CONTEXT,
        fingerprint=fingerprint(model, {"type": text.model_type, **info}),
        **info,
    )


@torch.no_grad()
def fingerprint(model: nn.Module, architecture: dict[str, Any]) -> str:
    """16 hex digits that identify a model's architecture and weights, in a few tens of milliseconds.

    Digested are the architecture, the shape of every parameter, and the signs of a fixed sample of each
    matrix (64 columns of 8 rows). The sign is what float32, bfloat16 and float16 agree on to the last weight:
    rounding never changes it, not even where float16 underflows to zero. So the digest does not depend on the
    dtype, nor on device (weights that accelerate has offloaded included), attention implementation or path. Two models
    trained apart differ in about half of the signs; one that was fine-tuned so lightly that no sampled weight crossed
    zero is not told apart. Of quantized weights only the shape counts, so that a quantized model has a fingerprint of
    its own.
    """
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, held in model.named_parameters():
        digest.update(str(_shape(model, name, held.data)).encode())
        parameter = _offloaded(model, name) if held.is_meta else held.data
        if parameter is not None and parameter.ndim >= 2 and not _is_quantized(parameter):
            rows = parameter.reshape(-1, parameter.shape[-1])
            step = max(1, len(rows) // _SAMPLED_ROWS)
            signs = torch.signbit(rows[::step][:_SAMPLED_ROWS, :_SAMPLED_COLUMNS].float())
            digest.update(signs.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def is_quantized(model: nn.Module) -> bool:
    """Whether some weights are held in another form than as floating-point numbers."""
    return any(_is_quantized(parameter.data) for parameter in model.parameters())


def _is_quantized(weight: torch.Tensor) -> bool:
    # Quantization libraries bring tensor types of their own, or pack several weights into one integer.
    return type(weight) is not torch.Tensor or not weight.is_floating_point()


def _shape(model: nn.Module, name: str, weight: torch.Tensor) -> tuple[int, ...]:
    """The shape of a weight, however it is packed: bitsandbytes packs some anew at the first forward call."""
    if _is_quantized(weight):
        module, own = _owner(model, name)
        if own == "weight" and isinstance(module, nn.Linear):
            return module.out_features, module.in_features
    return tuple(weight.shape)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a parameter belongs to, and the parameter's name there."""
    module, _, own = name.rpartition(".")
    return model.get_submodule(module), own


def _offloaded(model: nn.Module, name: str) -> torch.Tensor | None:
    """A weight that accelerate keeps on disk or in main memory until it is needed; None if there is no such."""
    module, own = _owner(model, name)
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        weights = getattr(each, "weights_map", None)
        if weights is not None:
            found: torch.Tensor = weights[own]
            return found
    return None


def _name(config: Any) -> str:
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name:
        return str(config.model_type)
    path = Path(name)
    # A path says where the model lies on one machine, not what it is.
    return path.resolve().name if path.is_absolute() or path.is_dir() else name


def _field(text: Any, field: str) -> Any:
    """A field of a config; a list by layer if it differs from layer to layer."""
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
