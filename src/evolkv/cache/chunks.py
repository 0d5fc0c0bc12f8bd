"""Reading a long call in pieces: for caches that evict as they go, and for states that go on by a token only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from evolkv.errors import UsageError
from evolkv.models.forward import by_name, given_cache

# Arguments with a column for each new token, and which dimension it is, counted from the last.
_BY_TOKEN = {"input_ids": 1, "inputs_embeds": 2, "position_ids": 1}
# Further outputs, with an entry for each layer, or each token in one.
_BY_LAYER = ("output_hidden_states", "output_attentions", "output_router_logits")


def lengths_of_chunks(tokens: int, chunk: int) -> list[int]:
    """Lengths of the pieces of a call: as few as there can be, and as equal, the longest first."""
    pieces = -(-tokens // chunk)
    return [tokens // pieces + (i < tokens % pieces) for i in range(pieces)]


def read_all_but_last(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Has a decoder read all pieces of a call but the last, where its cache wants pieces, and return the last one.

    A cache wants them if its ``most_tokens`` is a number. Caches of ours are told where a call begins and ends.
    """
    kwargs = by_name(module, args, kwargs)
    cache = given_cache(kwargs)
    if not hasattr(cache, "begin_call"):
        return None
    cache.begin_call(module, kwargs)
    if kwargs.get("use_cache") is False:
        raise UsageError(
            "this call brings a compressed cache and says use_cache=False; generate() would then read the whole text "
            "again at every step, behind what the cache holds; call generate(use_cache=True), or leave out the cache"
        )
    if cache.get_seq_length() > 0 and "output_attentions" in outputs_by_layer(module, kwargs):
        raise UsageError(
            "output_attentions cannot be had of tokens that follow a compressed prompt, since each head attends to "
            "tokens of its own; leave it out, or ask for it in the call that reads the prompt"
        )
    _check_rotary(cache, kwargs)
    _check_mask(cache, kwargs)
    chunk = cache.most_tokens
    pieces = [] if chunk is None else lengths_of_chunks(_num_tokens(kwargs), chunk)
    if len(pieces) < 2:
        cache.read_ahead(kwargs)
        return None
    tokens = sum(pieces)
    past, start, states = cache.get_seq_length(), 0, []
    _check(module, cache, kwargs, past + pieces[0], past + tokens)
    try:
        for piece in pieces[:-1]:
            output = module(**{**_columns(kwargs, start, start + piece, past), "return_dict": True})
            states.append(output.last_hidden_state)
            start += piece
    finally:
        # Between the pieces all layers agree, but the call is not over.
        cache.unfinished |= start > 0
    cache.states_of_chunks = states
    last = _columns(kwargs, start, tokens, past)
    cache.read_ahead(last)
    return (), last


def put_together(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Return the output of one call for the pieces that were read: the last hidden state of every token."""
    kwargs = by_name(module, args, kwargs)
    cache = given_cache(kwargs)
    if not hasattr(cache, "end_call"):
        return None
    last = output[0] if isinstance(output, tuple) else output.last_hidden_state
    whole, states = cache.end_call(kwargs, last), cache.states_of_chunks
    if states:
        cache.states_of_chunks = None
        whole = torch.cat([*states, whole], dim=1)
    if whole is last:
        return None
    if isinstance(output, tuple):
        return whole, *output[1:]
    output.last_hidden_state = whole
    return output


def _num_tokens(kwargs: dict[str, Any]) -> int:
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    return int(inputs.shape[1])


def other_by_token(kwargs: dict[str, Any]) -> str | None:
    """Return the name of an argument of a decoder with a place for each token that nobody here can cut; else None."""
    unknown = {name: value for name, value in kwargs.items() if name not in _BY_TOKEN and name != "attention_mask"}
    tokens = _num_tokens(kwargs)
    found = (name for name, value in unknown.items() if isinstance(value, Tensor) and tokens in value.shape)
    return next(found, None)


def _check_rotary(cache: Any, kwargs: dict[str, Any]) -> None:
    """Raises `UsageError` for a call after which a cache would hold keys that were turned in two ways."""
    past = cache.get_seq_length()
    for kind, limit in cache.rotary_limits:
        # Beyond its limit a dynamic embedding turns each new token in a way of its own, with any cache.
        if kind != "longrope" or past == 0 or past + (tokens := _num_tokens(kwargs)) <= limit:
            continue
        positions = kwargs.get("position_ids")
        # Padding takes no position; the longest sequence decides for all.
        start = past if positions is None else int(positions[..., 0].max())
        stop = past + tokens if positions is None else int(positions.max()) + 1
        if start <= limit < stop:
            raise outgrown(kind, limit, start, stop)


def outgrown(kind: str, limit: int, start: int, stop: int) -> UsageError:
    """Return the error for a text that outgrows the limit of a rotary embedding from token `start` to `stop`."""
    return UsageError(
        f"this model's rotary embedding ({kind}) turns keys otherwise in texts of more than {limit} tokens, so "
        f"that a cache that holds {start} tokens cannot take it to {stop}; read the whole text as one prompt, "
        f"or stop at {limit} tokens (with Phi-3, generate() in a compress() block reads it anew by itself)"
    )


def _check_mask(cache: Any, kwargs: dict[str, Any]) -> None:
    """Raises `UsageError` for a mask of another length than the text has with the tokens of a call."""
    mask, seen = kwargs.get("attention_mask"), cache.get_seq_length()
    if seen and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] != seen + (new := _num_tokens(kwargs)):
        raise UsageError(
            f"attention_mask covers {mask.shape[1]} tokens, but the cache has seen {seen} and this call brings {new}; "
            "expected a mask of the whole text, as cache.followed_by(ids) gives it, or an empty cache for another text"
        )


def outputs_by_layer(decoder: nn.Module, kwargs: dict[str, Any]) -> list[str]:
    """Return which further outputs by layer a call of a decoder asks for, or else its config."""
    asked = {name: kwargs.get(name) for name in _BY_LAYER}
    return [name for name, said in asked.items() if (getattr(decoder.config, name, False) if said is None else said)]


def _check(module: nn.Module, cache: Any, kwargs: dict[str, Any], first: int, last: int) -> None:
    """Raises `UsageError` for a call that means something else in pieces, of which the first and last end there."""
    for kind, limit in cache.rotary_limits:
        # A dynamic embedding turns each piece in a way of its own.
        if last > limit and (first <= limit or kind != "longrope"):
            raise UsageError(
                f"this model's rotary embedding ({kind}) uses other rotary angles beyond {limit} tokens, "
                f"and the first pieces of a text of {last} tokens cannot know that; leave out prefill_chunk, or "
                f"read at most {limit} tokens"
            )
    if (name := other_by_token(kwargs)) is not None:
        raise UsageError(
            f"a call that is read in pieces cannot take {name!r} apart, which has a place for each token (as "
            "images have in a prompt); leave it out, or prefill_chunk"
        )
    for name in outputs_by_layer(module, kwargs):
        raise UsageError(
            f"{name} cannot be had of a call that is read in pieces (prefill_chunk, or a model that goes on by one "
            "token at a time); leave it out"
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UsageError(
            "a call that is read in pieces needs an attention mask [batch, tokens], or none; "
            "this call brings a prepared one; leave it out, or prefill_chunk"
        )


def _columns(kwargs: dict[str, Any], start: int, stop: int, past: int) -> dict[str, Any]:
    """Return the arguments of a call for some of its tokens."""
    part = dict(kwargs)
    for name, dimension in _BY_TOKEN.items():
        value = kwargs.get(name)
        if isinstance(value, Tensor):
            part[name] = value.narrow(value.ndim - dimension, start, stop - start)
    if kwargs.get("attention_mask") is not None:
        part["attention_mask"] = kwargs["attention_mask"][:, : past + stop]
    return part
