"""Attention over keys that are stored per KV head, with the query heads of a group folded into the query axis."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evolkv.errors import ModelError
from evolkv.selectors.base import PromptAttention, softmax_with_sinks

# Queries in a block when a prompt is continued; measured fastest of 100, 200 and 400 on a CPU.
_BLOCK = 200

# What models pass along with their queries that changes the attention logits in a way we do not compute.
_UNKNOWN_TERMS = ("position_bias", "alibi")


def extra_term(kwargs: dict[str, Any]) -> str | None:
    """Return the name of an argument that changes the attention logits in a way we do not compute, or None."""
    for name in _UNKNOWN_TERMS:
        if kwargs.get(name) is not None:
            return name
    return None


def check_plain_logits(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise `ModelError` if the attention of `module` adds terms (biases by position) that we would leave out."""
    if (name := extra_term(kwargs)) is not None:
        raise ModelError(
            f"{type(module).__name__} adds {name!r} to its attention, which ragged or replayed caches do "
            "not compute; use layer-wise budgets and engine 'naive'"
        )


def logit_terms(query: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return `scaling`, `softcap` and `sinks` of a model's attention call, as `PromptAttention` takes them.

    Sinks are a logit for each query head, ``[heads]``, or None. A sink takes part in the softmax as if it were one more
    key, whose value is zero (GPT-OSS).
    """
    scaling, sinks = kwargs.get("scaling"), kwargs.get("s_aux")
    return {
        "scaling": query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        "softcap": kwargs.get("softcap"),
        "sinks": None if sinks is None else sinks.flatten(),
    }


def fold_sinks(sinks: Tensor | None, kv_heads: int, queries: int, repeats: int = 1) -> Tensor | None:
    """Return sinks for queries that are folded per KV head, ``[kv_heads, repeats * queries_per_kv_head * queries]``."""
    if sinks is None:
        return None
    shape = (kv_heads, repeats, len(sinks) // kv_heads, queries)
    return sinks.view(kv_heads, 1, -1, 1).expand(shape).flatten(1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the softmax attention of each row to its own keys.

    Args:
        query: ``[rows, queries, head_dim]``.
        key: ``[rows, keys, head_dim]``.
        value: ``[rows, keys, value_dim]``.
        visible: bool, broadcastable to ``[rows, queries, keys]``; None for all.
        scaling: factor on the logits.
        softcap: Gemma 2's cap on the logits, or None.
        sinks: a logit for each query that only enters the softmax's denominator, ``[rows, queries]``, or None.

    Returns:
        ``[rows, queries, value_dim]``.
    """
    if softcap is None and sinks is None:
        mask = None if visible is None else visible[:, None]
        return F.scaled_dot_product_attention(
            query[:, None], key[:, None], value[:, None], attn_mask=mask, scale=scaling
        )[:, 0]
    return attention_weights(query, key, visible, scaling, softcap, sinks).to(query.dtype) @ value


def attention_weights(
    query: Tensor, key: Tensor, visible: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return the attention probabilities of each row over its own keys, ``[rows, queries, keys]`` float32.

    Args: see `attention`.
    """
    logits = (query @ key.transpose(1, 2)).float() * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    return softmax_with_sinks(logits, sinks)


def continue_prompt(prompt: PromptAttention) -> Tensor:
    """Return the attention of the end of a prompt to all of it, ``[1, queries, heads, dim]``, in blocks of queries.

    A mask over the whole prompt would have every query look at every later token only to drop it; a block looks no
    further than its own end. And the query heads of a KV head are folded, so that keys are not repeated for them.
    """
    key, value, heads = prompt.key[0], prompt.value[0], prompt.key.shape[1]
    device = key.device
    outputs = []
    for start in range(prompt.first_query, prompt.num_tokens, _BLOCK):
        stop = min(start + _BLOCK, prompt.num_tokens)
        rows = prompt.query[0, :, start - prompt.first_query : stop - prompt.first_query]
        fold = len(rows) // heads
        asking = torch.arange(start, stop, device=device)[:, None]
        position = torch.arange(stop, device=device)
        visible = position <= asking
        if prompt.sliding_window is not None:
            visible &= position > asking - prompt.sliding_window
        folded = rows.reshape(heads, fold * (stop - start), -1)
        visible = visible.repeat(fold, 1)[None]
        sinks = fold_sinks(prompt.sinks, heads, stop - start)
        output = attention(folded, key[:, :stop], value[:, :stop], visible, prompt.scaling, prompt.softcap, sinks)
        outputs.append(output.view(heads * fold, stop - start, -1))
    return torch.cat(outputs, dim=1).transpose(0, 1)[None].contiguous()
