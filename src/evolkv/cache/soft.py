"""A replay whose cuts are soft, so that what a model computes has a derivative with respect to its budgets.

A budget keeps a prefix of a ranking. Here an entry of rank r, counted from 0, weighs

    w(r) = 1 / (1 + ((r + ½) / b)^k)

in the attention of a head with the budget b: near 1 well before the cut, ½ at it, and (b / r)^k far behind it. The
sharpness k says how much of what lies behind the cut is still seen. As k grows the cut becomes the hard one of
`evolkv.cache.replay`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.cache.math import LogitTerms
from evolkv.cache.replay import RankedPrompt, ReplayCache, ReplayLayer, _Candidates
from evolkv.selectors.prompt import softmax_with_sinks

#: Bytes of attention weights that are held at once. They are computed again on the way back, so that memory does not
#: grow with the number of layers.
BLOCK_BYTES = 2**26


class SoftReplayLayer(ReplayLayer):
    """One layer of a model that reads on under soft budgets, those of each prompt.

    Args:
        prompts: one row for each prompt, all of whose ranked entries are held.
        sliding_window: how many tokens a query sees, or None for all.
        budgets: of each prompt's KV heads, ``[prompts, kv_heads]`` float32.
        sharpness: k.
    """

    def __init__(self, prompts: list[_Candidates], sliding_window: int | None, budgets: Tensor, sharpness: float):
        super().__init__(prompts, sliding_window)
        self.budgets, self.sharpness = budgets, sharpness

    def _attend_prompt(self, part: _Candidates, at: slice, query: Tensor, terms: LogitTerms) -> Tensor:
        _, query_heads, queries, _ = query.shape
        heads, held = part.keys.shape[:2]
        fold = query_heads // heads
        rank = torch.arange(held, device=query.device) + 0.5
        log_weights = -F.softplus(self.sharpness * (rank.log() - self.budgets[at.start, :, None].log()))
        output = _SoftAttention.apply(
            query[0].reshape(heads, fold * queries, -1),
            self.new_keys[:, at].flatten(1, 2),
            self.new_values[:, at].flatten(1, 2),
            log_weights,
            part.keys,
            part.values,
            self._hidden(part, fold, queries),
            terms.folded(heads, queries),
        )
        return output.view(heads, fold, queries, -1).permute(2, 0, 1, 3).reshape(1, queries, query_heads, -1)

    def _hidden(self, part: _Candidates, fold: int, queries: int) -> tuple[Tensor | None, Tensor]:
        """Return which entries, and which new tokens, each query does not see.

        Returns:
            ``[kv_heads, fold * queries, held]`` or None, and ``[fold * queries, new]``.
        """
        new = self.new_keys.shape[2]
        asking = torch.arange(new - queries, new, device=part.keys.device)[:, None]
        step = torch.arange(new, device=part.keys.device)
        later, gone = step > asking, None
        if self.sliding_window is not None and part.tokens + new > self.sliding_window:
            later = later | (step <= asking - self.sliding_window)
            gone = part.positions[:, None] <= part.tokens + asking - self.sliding_window
            gone = gone.repeat(1, fold, 1)
        return gone, later.repeat(fold, 1)


class _SoftAttention(torch.autograd.Function):
    """Attention to weighted entries that are constants, and to new tokens.

    Everything is computed in float32, a block of queries at a time; nothing of the size of the attention weights is
    kept for the way back.

    Args of `apply`:
        query: ``[kv_heads, rows, head_dim]``.
        new_keys: ``[kv_heads, new, head_dim]``.
        new_values: ``[kv_heads, new, value_dim]``.
        log_weights: of the entries, ``[kv_heads, held]``.
        keys: ``[kv_heads, held, head_dim]``.
        values: ``[kv_heads, held, value_dim]``.
        hidden: see `SoftReplayLayer._hidden`.
        terms: of the logits, sinks folded.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, new_keys: Tensor, new_values: Tensor, log_weights: Tensor, *rest: Any) -> Any:
        ctx.save_for_backward(query, new_keys, new_values, log_weights)
        ctx.rest = rest
        _, values, *_ = rest
        held, outputs = values.shape[1], []
        for _, weights, _ in _blocks(query, new_keys, log_weights, *rest):
            outputs.append(weights[..., :held] @ values.float() + weights[..., held:] @ new_values.float())
        return torch.cat(outputs, dim=1).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (by_output,) = gradients
        query, new_keys, new_values, log_weights = ctx.saved_tensors
        keys, values, _, terms = ctx.rest
        keys, values, held = keys.float(), values.float(), keys.shape[1]
        by_query, by_weights = [], torch.zeros_like(log_weights)
        by_key, by_value = (torch.zeros_like(each, dtype=torch.float32) for each in (new_keys, new_values))
        for rows, weights, slope_of_cap in _blocks(query, new_keys, log_weights, *ctx.rest):
            given = by_output[:, rows].float()
            by_value += weights[..., held:].transpose(1, 2) @ given
            by_logit = torch.cat([given @ values.transpose(1, 2), given @ new_values.float().transpose(1, 2)], dim=-1)
            by_logit = weights * (by_logit - (weights * by_logit).sum(-1, keepdim=True))
            by_weights += by_logit[..., :held].sum(1)
            if slope_of_cap is not None:
                by_logit = by_logit * slope_of_cap
            by_logit = by_logit * terms.scaling
            by_query.append(by_logit[..., :held] @ keys + by_logit[..., held:] @ new_keys.float())
            by_key += by_logit[..., held:].transpose(1, 2) @ query[:, rows].float()
        nothing = (None,) * len(ctx.rest)
        by_new = by_key.to(new_keys.dtype), by_value.to(new_values.dtype)
        return torch.cat(by_query, dim=1).to(query.dtype), *by_new, by_weights, *nothing


def _blocks(
    query: Tensor,
    new_keys: Tensor,
    log_weights: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: tuple[Tensor | None, Tensor],
    terms: LogitTerms,
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield the attention weights of one block of rows after another, ``[kv_heads, rows, held + new]`` float32.

    Yields:
        The rows, their weights, and the derivative of the soft cap at their logits, or None.
    """
    (gone, later), (scaling, softcap, sinks) = hidden, terms
    keys, new_keys, held = keys.float().transpose(1, 2), new_keys.float().transpose(1, 2), keys.shape[1]
    block = max(1, BLOCK_BYTES // (4 * len(keys) * (held + new_keys.shape[2])))
    for start in range(0, query.shape[1], block):
        rows = slice(start, start + block)
        asking, slope_of_cap = query[:, rows].float() * scaling, None
        logits = torch.cat([asking @ keys, asking @ new_keys], dim=-1)
        if softcap is not None:
            capped = torch.tanh(logits / softcap)
            logits, slope_of_cap = capped * softcap, 1 - capped**2
        logits[..., :held] += log_weights[:, None]
        if gone is not None:
            logits[..., :held].masked_fill_(gone[:, rows], float("-inf"))
        logits[..., held:].masked_fill_(later[rows], float("-inf"))
        yield rows, softmax_with_sinks(logits, None if sinks is None else sinks[:, rows]), slope_of_cap


class SoftReplayCache(ReplayCache):
    """Ranked prompts, a row each, under soft budgets of their own.

    Args:
        model: the model.
        prompts: the ranked prompts.
        budgets: ``[prompts, layers, kv_heads]`` float32, each above 0.
        sharpness: k.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[RankedPrompt], budgets: Tensor, sharpness: float):
        self._soft = budgets, sharpness
        everything = np.full((1, *budgets.shape[1:]), np.iinfo(np.int64).max)
        super().__init__(model, prompts, everything)

    def _layer(self, index: int, parts: list[_Candidates], window: int | None) -> ReplayLayer:
        budgets, sharpness = self._soft
        return SoftReplayLayer(parts, window, budgets[:, index], sharpness)
