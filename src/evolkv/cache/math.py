"""Attention over keys that are stored per KV head, with the query heads of a group folded into the query axis."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evolkv.errors import ModelError
from evolkv.selectors.prompt import PromptAttention, softmax_with_sinks

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


class LogitTerms(NamedTuple):
    """What a model does to the products of queries and keys before the softmax.

    Attributes:
        scaling: factor on the logits.
        softcap: Gemma 2's cap on the logits, or None.
        sinks: logits that only enter the softmax's denominator, as if each were of one more key whose value is zero
            (GPT-OSS): of each query head, ``[heads]``, or, once folded, of each query, ``[rows, queries]``. Or None.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def folded(self, kv_heads: int, queries: int, repeats: int = 1) -> LogitTerms:
        """Return those of queries folded per KV head: sinks ``[kv_heads, repeats * queries_per_kv_head * queries]``."""
        if self.sinks is None:
            return self
        shape = (kv_heads, repeats, len(self.sinks) // kv_heads, queries)
        return self._replace(sinks=self.sinks.view(kv_heads, 1, -1, 1).expand(shape).flatten(1))

    def of_rows(self, rows: Tensor | slice) -> LogitTerms:
        """Return those of some rows of folded queries."""
        return self if self.sinks is None else self._replace(sinks=self.sinks[rows])


def logit_terms(query: Tensor, kwargs: dict[str, Any]) -> LogitTerms:
    """Return the terms of a model's attention call."""
    scaling, sinks = kwargs.get("scaling"), kwargs.get("s_aux")
    return LogitTerms(
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        kwargs.get("softcap"),
        None if sinks is None else sinks.flatten(),
    )


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, terms: LogitTerms) -> Tensor:
    """Return the softmax attention of each row to its own keys.

    Args:
        query: ``[rows, queries, head_dim]``.
        key: ``[rows, keys, head_dim]``.
        value: ``[rows, keys, value_dim]``.
        visible: bool, broadcastable to ``[rows, queries, keys]``; None for all.
        terms: of the logits, sinks folded.

    Returns:
        ``[rows, queries, value_dim]``.
    """
    if terms.softcap is None and terms.sinks is None:
        mask = None if visible is None else visible[:, None]
        return F.scaled_dot_product_attention(
            query[:, None], key[:, None], value[:, None], attn_mask=mask, scale=terms.scaling
        )[:, 0]
    return attention_weights(query, key, visible, terms).to(query.dtype) @ value


def attention_weights(query: Tensor, key: Tensor, visible: Tensor | None, terms: LogitTerms) -> Tensor:
    """Return the attention probabilities of each row over its own keys, ``[rows, queries, keys]`` float32.

    Args: see `attention`.
    """
    logits = (query @ key.transpose(1, 2)).float() * terms.scaling
    if terms.softcap is not None:
        logits = torch.tanh(logits / terms.softcap) * terms.softcap
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    return softmax_with_sinks(logits, terms.sinks)


def continue_prompt(prompt: PromptAttention) -> Tensor:
    """Return the attention of the end of a prompt to all of it, ``[1, queries, heads, dim]``, in blocks of queries.

    A mask over the whole prompt would have every query look at every later token only to drop it; a block looks no
    further than its own end. And the query heads of a KV head are folded, so that keys are not repeated for them.
    """
    key, value, heads = prompt.key[0], prompt.value[0], prompt.key.shape[1]
    device, terms = key.device, LogitTerms(prompt.scaling, prompt.softcap, prompt.sinks)
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
        output = attention(folded, key[:, :stop], value[:, :stop], visible, terms.folded(heads, stop - start))
        outputs.append(output.view(heads * fold, stop - start, -1))
    return torch.cat(outputs, dim=1).transpose(0, 1)[None].contiguous()
