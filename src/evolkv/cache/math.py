"""Attention over keys that are stored per KV head, with the query heads of a group folded into the query axis."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evolkv.errors import ModelError

# What models pass along with their queries that changes the attention logits in a way we do not compute.
_UNKNOWN_TERMS = ("s_aux", "position_bias", "alibi")


def extra_term(kwargs: dict[str, Any]) -> str | None:
    """The name of what a model passes along that changes its attention logits in a way we do not compute, if any."""
    return next((name for name in _UNKNOWN_TERMS if kwargs.get(name) is not None), None)


def check_plain_logits(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises `ModelError` if the attention of `module` adds terms (sinks, biases) that we would leave out."""
    if (name := extra_term(kwargs)) is not None:
        raise ModelError(
            f"{type(module).__name__} adds {name!r} to its attention, which ragged or replayed caches do "
            "not compute; use layer-wise budgets and engine 'naive'"
        )


def scaling_of(query: Tensor, kwargs: dict[str, Any]) -> float:
    """The factor on the attention logits that the model asked for."""
    scaling = kwargs.get("scaling")
    return float(scaling) if scaling is not None else query.shape[-1] ** -0.5


def attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """Softmax attention of each row to its own keys.

    Args:
        query: ``[rows, queries, head_dim]``.
        key: ``[rows, keys, head_dim]``.
        value: ``[rows, keys, value_dim]``.
        visible: bool, broadcastable to ``[rows, queries, keys]``; None for all.
        scaling: factor on the logits.
        softcap: Gemma 2's cap on the logits, or None.

    Returns:
        ``[rows, queries, value_dim]``.
    """
    if softcap is None:
        mask = None if visible is None else visible[:, None]
        return F.scaled_dot_product_attention(
            query[:, None], key[:, None], value[:, None], attn_mask=mask, scale=scaling
        )[:, 0]
    logits = (query @ key.transpose(1, 2)).float() * scaling
    logits = torch.tanh(logits / softcap) * softcap
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    return logits.softmax(dim=-1).to(query.dtype) @ value
