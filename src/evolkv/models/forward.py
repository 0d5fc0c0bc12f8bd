"""Forward calls: devices, ids, and the name of the cache (``past_key_values`` before transformers 5.24)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from evolkv.errors import ModelError

_NAMES = ("cache", "past_key_values")


def cache_keyword(module: nn.Module) -> str:
    """Return the name under which the forward call of a model takes its cache."""
    name = _keyword(type(module).forward)
    get_decoder: Any = getattr(module, "get_decoder", None)
    if name is None and get_decoder is not None:
        # A wrapper that passes everything on (of adapters, of a compiled model): its decoder's name it is.
        name = _keyword(type(get_decoder()).forward)
    return name or _NAMES[1]


@lru_cache(maxsize=256)
def _keyword(forward: Callable[..., Any]) -> str | None:
    return next((name for name in _NAMES if name in inspect.signature(forward).parameters), None)


def given_cache(kwargs: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Return the name and the cache that a forward call brings; the name is None if it has neither."""
    name = next((name for name in _NAMES if kwargs.get(name) is not None), None)
    if name is None:
        name = next((name for name in _NAMES if name in kwargs), None)
    return name, None if name is None else kwargs[name]


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward call, those given by position too, under the module's names for them."""
    if not args:
        return dict(kwargs)
    # The wrapper of a compiled model passes everything on.
    inner = getattr(module, "_orig_mod", module)
    names = list(inspect.signature(type(inner).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def input_device(model: Any) -> torch.device:
    """Return where a model takes its token ids: on the device of its embeddings."""
    place: torch.device = model.device
    return place if place.type != "meta" else execution_device(model.get_input_embeddings(), torch.device("cpu"))


def execution_device(module: nn.Module, default: torch.device) -> torch.device:
    """Return where a module computes: where its weights are, or are brought to if accelerate offloads them."""
    place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if place is None:
        parameter = next(module.parameters(), None)
        place = default if parameter is None or parameter.is_meta else parameter.device
    return torch.device(place)


def check_token_ids(model: Any, ids: torch.Tensor) -> None:
    """Raise `ModelError` for token ids that a model has no embeddings for."""
    embeddings = model.get_input_embeddings().weight.shape[0]
    if ids.numel() and int(ids.max()) >= embeddings:
        raise ModelError(
            f"the tokenizer gives token {int(ids.max())}, but the model has embeddings for {embeddings} tokens (0 to "
            f"{embeddings - 1}); use the tokenizer that belongs to the model, or resize the model's embeddings"
        )


def cache_in(output: Any) -> Any:
    """Return the cache that a model's output holds."""
    return getattr(output, _NAMES[0] if hasattr(output, _NAMES[0]) else _NAMES[1])
