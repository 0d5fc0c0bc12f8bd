"""Forward calls: their arguments, their cache, devices and ids."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from evolkv.errors import ModelError


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache that a forward call brings, under its name or the deprecated one; None if it brings none."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward call, those given by position too, under the module's names for them."""
    if not args:
        return dict(kwargs)
    # The wrapper of a compiled model passes everything on.
    inner = getattr(module, "_orig_mod", module)
    names = list(inspect.signature(type(inner).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Have a model compute as it does after training; each of its modules is then left in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def input_device(model: Any) -> torch.device:
    """Return where a model takes its token ids: on the device of its embeddings."""
    place: torch.device = model.device
    return place if place.type != "meta" else execution_device(model.get_input_embeddings(), torch.device("cpu"))


def offset_keeper(model: Any) -> nn.Module | None:
    """Return the module around a decoder that keeps how far images moved the positions of a text; None if none does.

    In Qwen-VL and its relatives an image takes fewer positions than tokens. Later tokens are placed by the difference,
    `rope_deltas` ``[batch, 1]``. It belongs to the text, but there is one for the whole model: that of the latest.
    """
    decoder = model.get_decoder()
    around = itertools.takewhile(lambda module: module is not decoder, model.modules())
    return next((module for module in around if "rope_deltas" in vars(module)), None)


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
    unknown = ids[(ids < 0) | (ids >= embeddings)].tolist()
    if unknown:
        raise ModelError(
            f"the tokenizer gives token {max(unknown)}, but the model has embeddings for {embeddings} tokens (0 to "
            f"{embeddings - 1}); use the tokenizer that belongs to the model, or resize the model's embeddings"
        )


def check_no_learned_tokens(model: Any) -> None:
    """Raise `ModelError` for a model that reads learned tokens before each text, as PEFT's prompt tuning has it."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError(
            f"{type(model).__name__} reads learned tokens before each text, which would be left out here; generate in "
            "a compress() block, or train an adapter of the weights, such as LoRA"
        )
