"""Which weights a model has: a fingerprint that files carry."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED_ROWS = 8
_SAMPLED_COLUMNS = 64


@torch.no_grad()
def fingerprint(model: nn.Module, architecture: dict[str, Any]) -> str:
    """Return 16 hex digits that identify a model's architecture and weights, in a few milliseconds.

    Digested are the architecture, the shape of every parameter, and the signs of a fixed sample of each
    matrix (64 columns of 8 rows). The sign is what float32, bfloat16 and float16 agree on to the last weight:
    rounding never changes it, not even where float16 underflows to zero. So the digest does not depend on the
    dtype, nor on device (weights that accelerate has offloaded included), attention implementation or path. Two models
    trained apart differ in about half of the signs; one that was fine-tuned so lightly that no sampled weight crossed
    zero is not told apart. Of quantized weights only the shape counts, so that a quantized model has a fingerprint of
    its own.
    """
    # Sampled first and digested afterwards: one conversion (on a GPU one transfer) for all weights of a shape.
    shapes: list[tuple[tuple[int, ...], Tensor | None]] = []
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for name, held in model.named_parameters():
        parameter = _offloaded(model, name) if held.is_meta else held.data
        sample = None if parameter is None or parameter.ndim < 2 or _is_quantized(parameter) else _sample(parameter)
        shapes.append((_shape(model, name, held.data), sample))
        if sample is not None:
            alike[_kind(sample)].append(sample)
    signs = {kind: iter(torch.stack(samples).float().signbit().cpu().numpy()) for kind, samples in alike.items()}
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for shape, sample in shapes:
        digest.update(str(shape).encode())
        if sample is not None:
            digest.update(next(signs[_kind(sample)]).tobytes())
    return digest.hexdigest()[:16]


def _sample(weight: Tensor) -> Tensor:
    """Return a view of 64 columns of 8 rows spread over a matrix, or over all matrices of a stack."""
    rows = weight if weight.ndim == 2 else weight.reshape(-1, weight.shape[-1])
    return rows[:: max(1, len(rows) // _SAMPLED_ROWS)][:_SAMPLED_ROWS, :_SAMPLED_COLUMNS]


def _kind(sample: Tensor) -> tuple[torch.dtype, torch.device, torch.Size]:
    return sample.dtype, sample.device, sample.shape


def is_quantized(model: nn.Module) -> bool:
    """Whether some weights are held in another form than as floating-point numbers."""
    return any(_is_quantized(parameter.data) for parameter in model.parameters())


def _is_quantized(weight: Tensor) -> bool:
    # Quantization libraries bring tensor types of their own, or pack several weights into one integer.
    return type(weight) is not Tensor or not weight.is_floating_point()


def _shape(model: nn.Module, name: str, weight: Tensor) -> tuple[int, ...]:
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


def _offloaded(model: nn.Module, name: str) -> Tensor | None:
    """A weight that accelerate keeps on disk or in main memory until it is needed; None if there is no such."""
    module, own = _owner(model, name)
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        weights = getattr(each, "weights_map", None)
        if weights is not None:
            found: Tensor = weights[own]
            return found
    return None
