"""The identity of the weights that a model computes with: a quick fingerprint that files carry, and an exact checksum.

Both look at the weights in use. Of adapter layers as PEFT makes them (LoRA and its kin) these are the layer's own and
those of its active adapters; without any, or where adapters are disabled, a model is the one that it was made from.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import operator
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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
    # One walk, since the names of hundreds of modules take as long as the rest.
    modules = list(model.named_modules())
    in_use, skipped = _adapters(modules)
    for path, module in modules:
        for name, held in module._parameters.items():
            if held is None or id(held) in skipped:
                continue
            # Tied weights count once.
            skipped.add(id(held))
            name = f"{path}.{name}" if path else name
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
    if in_use:
        # Not the names, which are only labels.
        digest.update(str([factor for _, used in in_use for _, factor in used]).encode())
    return digest.hexdigest()[:16]


def _sample(weight: Tensor) -> Tensor:
    """Return a view of 64 columns of 8 rows spread over a matrix, or over all matrices of a stack."""
    rows = weight if weight.ndim == 2 else weight.reshape(-1, weight.shape[-1])
    return rows[:: max(1, len(rows) // _SAMPLED_ROWS)][:_SAMPLED_ROWS, :_SAMPLED_COLUMNS]


def _kind(sample: Tensor) -> tuple[torch.dtype, torch.device, torch.Size]:
    return sample.dtype, sample.device, sample.shape


#: For each layer that computes with adapters: its name, theirs, and the factor of each.
AdaptersInUse = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]


def adapters_in_use(model: nn.Module) -> AdaptersInUse:
    """Return which adapters the layers of a model compute with; none for a model without adapters."""
    return _adapters(model.named_modules())[0]


def _adapters(modules: Iterable[tuple[str, Any]]) -> tuple[AdaptersInUse, set[int]]:
    """Return the adapters in use, and the ids of the parameters that take no part in what a model computes."""
    in_use: list[tuple[str, tuple[tuple[str, Any], ...]]] = []
    idle: set[int] = set()
    for name, layer in modules:
        # By the class, since PEFT's wrappers pass on what the modules inside them have.
        if not (hasattr(type(layer), "disable_adapters") and hasattr(type(layer), "adapter_layer_names")):
            continue
        wanted = [] if layer.disable_adapters else [*layer.active_adapters, *getattr(layer, "merged_adapters", ())]
        factors, held = getattr(layer, "scaling", {}), set()
        for adapter, part in (item for kind in layer.adapter_layer_names for item in _items(layer, kind)):
            held.add(adapter)
            if adapter not in wanted:
                idle.update(map(id, part.parameters() if isinstance(part, nn.Module) else [part]))
        used = [adapter for adapter in dict.fromkeys(wanted) if adapter in held]
        if used:
            in_use.append((name, tuple((adapter, factors.get(adapter)) for adapter in used)))
        # A trained copy of a whole module takes the place of the original.
        if used and "original_module" in layer._modules:
            idle.update(map(id, layer.original_module.parameters()))
    return tuple(in_use), idle


def _items(layer: nn.Module, kind: str) -> list[tuple[str, Any]]:
    """Return the parts of one kind that an adapter layer has, by the adapter's name."""
    try:
        parts: Any = operator.attrgetter(kind)(layer)
    except AttributeError:
        return []
    return list(parts.items()) if isinstance(parts, (nn.ModuleDict, nn.ParameterDict)) else []


@torch.no_grad()
def weights_checksum(model: nn.Module, attention: str) -> str | None:
    """Return a digest of all that decides what a model computes, or None if it has weights that cannot be read.

    Digested are every bit of every parameter and buffer, their names, the modules' classes, plain attributes (the
    active adapters are some) and hooks, and the config. So two models with the same checksum compute the same; models
    with different ones may do so, too. It takes about a second per gigabyte and core.

    Args:
        model: a transformers model.
        attention: its attention implementation, which the config does not say while a compressed cache is in use.
    """
    description: list[Any] = [attention]
    for part in ("config", "generation_config"):
        held = getattr(model, part, None)
        description.append(None if held is None else json.loads(held.to_json_string(use_diff=False)))
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        others = [each for each in map(_qualified_name, hooks) if not each.startswith("evolkv.")]
        description.append([name, _qualified_name(type(module)), others])
        for attribute, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{attribute}"] = value
            elif callable(value) and not isinstance(value, nn.Module):
                description.append([attribute, _qualified_name(value)])
            # Hooks are named above, without those that live with a compressed cache.
            elif "hooks" not in attribute and not attribute.startswith("_evolkv"):
                with contextlib.suppress(TypeError, ValueError):
                    description.append([attribute, json.dumps(value, sort_keys=True)])
    distinct: dict[int, tuple[int, Tensor]] = {}
    for name, tensor in tensors.items():
        weight = _offloaded(model, name) if tensor.is_meta else tensor.data
        if type(weight) is not Tensor:
            return None
        number, _ = distinct.setdefault(id(tensor), (len(distinct), weight))
        description.append([name, str(weight.dtype), list(weight.shape), number])
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for sha256 in threads.map(_sha256, (tensor for _, tensor in distinct.values())):
            digest.update(sha256)
    return digest.hexdigest()


def _sha256(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data).digest()


def _qualified_name(value: Any) -> str:
    value = value.func if isinstance(value, functools.partial) else value
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def is_quantized(model: nn.Module) -> bool:
    """Return whether some weights are held in another form than as floating-point numbers."""
    return any(_is_quantized(parameter.data) for parameter in model.parameters())


def _is_quantized(weight: Tensor) -> bool:
    # Quantization libraries bring tensor types of their own, or pack several weights into one integer.
    return type(weight) is not Tensor or not weight.is_floating_point()


def _shape(model: nn.Module, name: str, weight: Tensor) -> tuple[int, ...]:
    """Return the shape of a weight, however it is packed: bitsandbytes packs some anew at the first forward call."""
    if _is_quantized(weight):
        module, own = _owner(model, name)
        if own == "weight" and isinstance(module, nn.Linear):
            return module.out_features, module.in_features
    return tuple(weight.shape)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that a parameter belongs to, and the parameter's name there."""
    module, _, own = name.rpartition(".")
    return model.get_submodule(module), own


def _offloaded(model: nn.Module, name: str) -> Tensor | None:
    """Return a weight that accelerate keeps on disk or in main memory until it is needed; None if there is no such."""
    module, own = _owner(model, name)
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        weights = getattr(each, "weights_map", None)
        if weights is not None:
            weight: Tensor = weights[own]
            return weight
    return None
