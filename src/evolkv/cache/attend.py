"""Attention of new tokens to the rows that a cache layer holds, each at its own length."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from evolkv.cache.hook import Attention
from evolkv.cache.math import LogitTerms, attention, extra_term, logit_terms
from evolkv.cache.rows import RowGroup, RowOrder
from evolkv.errors import UsageError

#: Attention of folded queries to group number `i`: takes the number, then the queries and what follows the values in
#: `attention`.
GroupAttention = Callable[[int, Tensor, Tensor | None, LogitTerms], Tensor]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attend_as_model(
    own: Attention, module: nn.Module, query: Tensor, group: RowGroup, kv_heads: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Return the model's own attention of one new token to all that a single group holds."""
    shape = (query.shape[0], kv_heads)
    return own(module, query, group.keys.unflatten(0, shape), group.values.unflatten(0, shape), None, **kwargs)


def folding_is_equal(own: Attention, kwargs: dict[str, Any]) -> bool:
    """Return whether `attend_groups` gives what the model's own attention gives.

    It is cheaper: for one query sdpa reads every key once for each of its query heads on a CPU.
    """
    return own is sdpa_attention_forward and extra_term(kwargs) is None and not kwargs.get("dropout")


def attend_groups(
    query: Tensor,
    groups: Sequence[RowGroup],
    order: RowOrder | None,
    visible: Sequence[Tensor | None] | None,
    kv_heads: int,
    kwargs: dict[str, Any],
    attend: GroupAttention | None = None,
) -> Tensor:
    """Attend group by group, without padding any row to another's length.

    Args:
        query: ``[batch, heads, queries, head_dim]``.
        groups: the rows.
        order: of the rows; None for a single group.
        visible: for each group, which entries each query sees, ``[group, queries, entries]``, or None for all; None
            where all queries see all entries.
        kv_heads: KV heads of the layer.
        kwargs: what the model says of its attention.
        attend: attends to one group; None for `attention` to all of it.

    Returns:
        ``[batch, queries, heads, value_dim]``.
    """
    batch, heads, queries, head_dim = query.shape
    fold = heads // kv_heads
    rows = query.reshape(batch * kv_heads, fold * queries, head_dim)
    terms = logit_terms(query, kwargs).folded(kv_heads, queries)
    outputs = []
    for i, asking in enumerate((rows,) if order is None else order.by_group(rows)):
        group, shown = groups[i], None if visible is None else visible[i]
        if shown is not None and queries > 1:
            shown = shown.repeat(1, fold, 1)
        own = terms if terms.sinks is None else terms.of_rows(group.rows % kv_heads)
        if attend is None:
            outputs.append(attention(asking, group.keys, group.values, shown, own))
        else:
            outputs.append(attend(i, asking, shown, own))
    output = outputs[0] if order is None else order.in_order(outputs)
    if queries == 1:
        return output.reshape(batch, 1, heads, -1)
    # [batch * kv_heads, fold * queries, dim] -> [batch, queries, heads, dim]
    return output.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous()


def attend_in_turn(
    attend: Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Any]],
    ends: Sequence[int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
) -> tuple[Tensor, None]:
    """Attend to the pieces of a call that end there, with the result of a call for each.

    Args:
        attend: attends to one piece: queries, keys, values and their mask.
        ends: the number of tokens at the end of each piece.
        query: ``[batch, heads, tokens, head_dim]``; keys and values likewise.
        key: of the call.
        value: of the call.
        mask: of the call, in two or four dimensions; or None.
    """
    outputs = []
    for start, end in zip((0, *ends), ends, strict=False):
        part, piece = mask, slice(start, end)
        if mask is not None:
            seen = mask.shape[-1] - key.shape[2] + end
            part = mask[:, :seen] if mask.ndim == 2 else mask[..., piece, :seen]
        outputs.append(attend(query[:, :, piece], key[:, :, piece], value[:, :, piece], part)[0])
    return torch.cat(outputs, dim=1), None


def visible_in_group(
    group: RowGroup, queries: int, visible: Tensor | None, kv_heads: int, window: int | None, *, padded: bool
) -> Tensor | None:
    """Return which entries each query of a group sees, ``[group, queries, entries]``; None for all.

    Args:
        group: the rows.
        queries: new tokens.
        visible: which columns after the prompt each new token sees, ``[batch or 1, 1, queries, columns]``, or None.
        kv_heads: KV heads of the layer.
        window: tokens that a query sees by position, or None for all that are held.
        padded: whether there is padding after the prompt.
    """
    entries, shown = group.keys.shape[1], None
    if visible is not None:
        sequences = group.rows // kv_heads if visible.shape[0] > 1 else torch.zeros_like(group.rows)
        newest = visible[sequences, 0][..., -entries:]
        held = entries - newest.shape[-1]
        shown = torch.cat([newest.new_ones((*newest.shape[:2], held)), newest], dim=-1)
    if window is not None:
        # The newest tokens' positions stand last in every row.
        inside = group.positions[:, None] > group.positions[:, -queries:, None] - window
        shown = inside if shown is None else shown & inside
    if shown is None or not padded:
        return shown
    # Padding that sees nothing would come out as no number, and spoil what it is multiplied with.
    return shown | ~shown.any(dim=-1, keepdim=True)


def triton_kernels(query: Tensor) -> ModuleType | None:
    """Return the Triton kernels if EVOLKV_TRITON=1 asks for them: on a GPU, or in Triton's interpreter, for tests.

    Raises:
        UsageError: if Triton is not installed.
    """
    if os.environ.get("EVOLKV_TRITON") != "1":
        return None
    # The interpreter cannot read what is on a GPU.
    if query.is_cuda == (os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    try:
        from evolkv.cache import kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise UsageError("EVOLKV_TRITON=1 needs Triton; pip install triton, or unset EVOLKV_TRITON") from error
    return kernels


def suits_kernels(groups: Sequence[RowGroup], parts: Sequence[Tensor], kwargs: dict[str, Any]) -> bool:
    """Return whether the kernels compute all of a step: in one number format that they know, without a gradient.

    Args:
        groups: the rows.
        parts: queries, keys and values of the new token.
        kwargs: what the model says of its attention.
    """
    parts = [*parts, *(held for group in groups for held in (group.keys, group.values))]
    alike = all(part.dtype == parts[0].dtype for part in parts) and parts[0].dtype in _KERNEL_DTYPES
    sinks = kwargs.get("s_aux")
    asked = parts if sinks is None else [*parts, sinks]
    gradient = torch.is_grad_enabled() and any(part.requires_grad for part in asked)
    return alike and not gradient and extra_term(kwargs) is None


def attend_with_kernels(
    kernels: ModuleType,
    table: Any,
    query: Tensor,
    new: tuple[Tensor, Tensor],
    groups: Sequence[RowGroup],
    kv_heads: int,
    window: int | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attend with one new token to all rows at once, each at its length.

    Args:
        kernels: `evolkv.cache.kernels`, which also write the new entries, for which all groups have been extended.
        table: the layer's `RowTable`.
        query: ``[batch, heads, 1, head_dim]``.
        new: keys ``[rows, head_dim]`` and values ``[rows, value_dim]`` of the token.
        groups: the rows.
        kv_heads: KV heads of the layer.
        window: tokens that the query sees by position, or None for all that are held.
        kwargs: what the model says of its attention.

    Returns:
        ``[batch, 1, heads, value_dim]``.
    """
    batch, heads, _, head_dim = query.shape
    places, since, aligned = table.of(groups)
    output: Tensor = kernels.decode(
        query.reshape(batch * kv_heads, heads // kv_heads, head_dim).contiguous(),
        new[0].contiguous(),
        new[1].contiguous(),
        places,
        since,
        max(group.keys.shape[1] for group in groups),
        aligned=aligned,
        kv_heads=kv_heads,
        window=window,
        **logit_terms(query, kwargs)._asdict(),
    )
    return output.reshape(batch, 1, heads, -1)
