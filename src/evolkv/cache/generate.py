"""Checks of what `generate` brings to a cache that holds a text already; inputs of prompts, and of what follows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from evolkv.cache.chunks import outgrown
from evolkv.errors import UsageError
from evolkv.models.forward import check_no_learned_tokens, check_token_ids, given_cache, input_device
from evolkv.models.rotary import stretching

_WATCHED = "_evolkv_watched"


def watch_generate(model: nn.Module, decoder: nn.Module) -> None:
    """Have the classes around a decoder show our caches the text that `generate` goes on from; nothing else changes.

    A forward call brings new tokens only. The one place that sees the whole text is the model's public
    `prepare_inputs_for_generation`, and a method of the class takes no part in copies and pickles of a model.
    """
    # Wrappers (of adapters, of a compiled model) come before what they wrap, whose `generate` it is.
    for module in itertools.takewhile(lambda module: module is not decoder, model.modules()):
        _watch_class(type(module))


def _watch_class(kind: Any) -> None:
    own = getattr(kind, "prepare_inputs_for_generation", None)
    if own is None or hasattr(own, _WATCHED):
        return

    @functools.wraps(own)
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = given_cache(kwargs)
        if not hasattr(cache, "begin_generation"):
            return own(self, *args, **kwargs)
        ids: Any = args[0] if args else kwargs.get("input_ids")
        if kwargs.get("is_first_iteration"):
            cache.begin_generation(ids, kwargs.get("attention_mask"), kwargs.get("next_sequence_length"))
        inputs = own(self, *args, **kwargs)
        # Phi-3 reads a text anew that outgrows its short rotary embedding. Only a block has another cache for that.
        seen = cache.get_seq_length()
        if seen == 0:
            inputs["cache"] = cache
        elif given_cache(inputs) is None and cache.block is None:
            kind, limit = next(iter(stretching(self.config)), ("unknown", seen))
            raise outgrown(kind, limit, seen, ids.shape[1])
        return inputs

    setattr(prepare_inputs_for_generation, _WATCHED, True)
    kind.prepare_inputs_for_generation = prepare_inputs_for_generation


def check_text(read: Tensor | None, seen: int, ids: Any, mask: Tensor | None, new: int | None) -> None:
    """Raises `UsageError` unless a text goes on from what a cache has seen.

    Args:
        read: ids of the text so far, ``[batch, tokens]``; None where they are not known.
        seen: how many tokens the cache has seen.
        ids: what `generate` was given, ``[batch, tokens]``.
        mask: its attention mask, ``[batch, tokens]``, or None.
        new: how many of `ids` are new; None where only new ones were given.
    """
    if new is None or not isinstance(ids, Tensor):
        return
    if new <= 0:
        raise UsageError(
            f"the cache has seen {seen} tokens, but the text has {ids.shape[1]}; give generate() the whole text so far "
            "with new tokens behind it, as cache.followed_by(ids) does, or an empty cache for another text"
        )
    if read is None or len(read) != len(ids):
        return
    length = min(seen, read.shape[1])
    differs = read[:, :length] != ids[:, :length].to(read.device)
    if mask is not None and mask.ndim == 2:
        differs &= mask[:, :length].to(read.device).bool()
    if bool(differs.any()):
        raise UsageError(
            f"the text differs from what the cache has read at token {int(differs.any(dim=0).nonzero()[0])}; give "
            "generate() the same text with new tokens behind it, as cache.followed_by(ids) does, or an empty cache"
        )


def check_ids(input_ids: Any) -> None:
    """Raises `UsageError` for what is no tensor of token ids."""
    if isinstance(input_ids, Tensor):
        if input_ids.ndim == 2 and not (input_ids.is_floating_point() or input_ids.is_complex()):
            return
        found = f"a tensor of {input_ids.dtype} and shape {list(input_ids.shape)}"
    else:
        found = type(input_ids).__name__
    raise UsageError(
        f"input_ids is {found}; expected a tensor of token ids [batch, tokens], as tokenizer(text, "
        "return_tensors='pt').input_ids is"
    )


def check_mask(attention_mask: Any, shapes: Mapping[torch.Size, str]) -> None:
    """Raises `UsageError` unless a mask has one of some shapes, which are named in words."""
    found = attention_mask.shape if isinstance(attention_mask, Tensor) else None
    if found not in shapes:
        expected = " or ".join(f"{list(shape)} ({name})" for shape, name in shapes.items())
        given = type(attention_mask).__name__ if found is None else f"of shape {list(found)}"
        raise UsageError(f"attention_mask is {given}; expected a tensor of shape {expected}")


def prompt_inputs(model: PreTrainedModel, input_ids: Any, attention_mask: Any) -> dict[str, Tensor]:
    """Return what a decoder reads prompts from: ids, mask and positions, ``[batch, tokens]`` each.

    Args:
        model: the model around it.
        input_ids: the prompts, ``[batch, tokens]``.
        attention_mask: ``[batch, tokens]``, 0 for padding; None where there is none.

    Raises:
        UsageError: for what is no such tensor, or no token.
        ModelError: for ids that the model has no embeddings for, or a model that reads more than them.
    """
    check_no_learned_tokens(model)
    check_ids(input_ids)
    if not input_ids.numel():
        raise UsageError(f"input_ids is empty, of shape {list(input_ids.shape)}; give at least one token to read")
    check_token_ids(model, input_ids)
    if attention_mask is not None:
        check_mask(attention_mask, {input_ids.shape: "that of input_ids"})
    ids = input_ids.to(input_device(model)).long()
    # As transformers reads masks; a sum of small floats would not reach the length of the prompt.
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids.device).bool().long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    # Not every model counts from 0: PaliGemma does from 1.
    wanted = model.prepare_inputs_for_generation(ids, attention_mask=mask, position_ids=places, is_first_iteration=True)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": wanted.get("position_ids", places)}


def filled_up(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the padding that `generate` put behind rows that ended before others, ``[batch, tokens]``."""
    settings = model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    # What generate() takes, too.
    pad = settings.pad_token_id if settings.pad_token_id is not None else ends[0]
    # Nothing is put behind the longest row, and so behind a single one.
    if pad is None or len(ids) == 1:
        return torch.zeros_like(ids, dtype=torch.bool)
    run = (ids == pad).flip(1).cumprod(dim=1).flip(1).bool()
    if pad in ends:
        # The first of the run is the row's own end.
        run = run & F.pad(run[:, :-1], (1, 0))
    return run


def whole_text(
    model: PreTrainedModel, layers: Sequence[Any], read: Tensor, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the ids of a text with what comes next, and their mask, each ``[batch, tokens]``; layers note the padding.

    Args:
        model: the model.
        layers: those of the cache, which have seen `read` or its first part.
        read: ids of the text so far, ``[batch, tokens]``.
        input_ids: what comes next, ``[batch or 1, new]``.
        attention_mask: 0 for padding, of what comes next or of the whole text; None for no padding in what comes next.

    Raises:
        UsageError: for a mask of another shape.
    """
    first, known = layers[0], read.shape[1]
    seen, after = first.get_seq_length(), first.prompt_width
    new = input_ids.to(read.device).expand(len(read), -1)
    ids = torch.cat([read, new], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :seen] = first.real_tokens().to(ids.device)
    mask[:, after:known] *= ~filled_up(model, read)[:, after:]
    if attention_mask is not None:
        shapes = {ids.shape: "the whole text", new.shape: "all rows", input_ids.shape: "that of input_ids"}
        check_mask(attention_mask, shapes)
        mask[:, -attention_mask.shape[1] :] = attention_mask.to(mask.device).bool()
    for layer in layers:
        layer.note_padding(mask[:, after:seen].bool())
    return ids, mask
