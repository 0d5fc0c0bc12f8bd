"""A replay of the whole cache that notes how useful each entry was to the tokens that read it.

LU-KV (arXiv 2602.08585), the oracle utility. An entry t of a KV head is worth to a token

    u(t) = max over the query heads h that share the KV head of  a_h(t) · n_h(t),      n_h(t) = ‖W_O^h v_t‖ / mean,

the attention to it times the length of what the output projection makes of its value; over some tokens it is worth the
most that it is to one of them. The paper divides by the layer's sum of lengths instead of their mean. That is the same
up to one factor for all layers, as long as all of them hold the same entries: the mean also compares layers that see
only a window, and prompts of different lengths. A gate between attention and output projection
(Qwen3-Next) does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evolkv.cache.hook import Attention
from evolkv.cache.math import LogitTerms
from evolkv.cache.replay import RankedPrompt, ReplayCache, ReplayLayer, _Candidates
from evolkv.cache.soft import BLOCK_BYTES
from evolkv.errors import ModelError
from evolkv.selectors.prompt import softmax_with_sinks

#: Names that models of transformers, and some of others, give the output projection of an attention module.
_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "o")


class UtilityLayer(ReplayLayer):
    """One layer of a model that reads on with all that the prompts left, and notes its use.

    Args:
        prompts: one of them, with one candidate that keeps everything.
        sliding_window: how many tokens a query sees, or None for all.
        first: the first of the new tokens whose use counts.
        grams: of each attention module; see `output_grams`. What is missing is added.

    Attributes:
        utility: of the entry at each rank, ``[kv_heads, ranked]`` float32; None before anything was read.
    """

    def __init__(
        self, prompts: list[_Candidates], sliding_window: int | None, first: int, grams: dict[nn.Module, Tensor]
    ):
        super().__init__(prompts, sliding_window)
        self.counted_from, self._grams = first, grams
        self.utility: Tensor | None = None
        self._lengths: Tensor

    def attend(
        self, own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See `ReplayLayer.attend`."""
        values = self.prompts[0].values
        if module not in self._grams:
            self._grams[module] = output_grams(module, values, query.shape[1])
        lengths = output_lengths(self._grams[module], values)
        self._lengths = lengths / lengths.mean()
        return super().attend(own, module, query, key, value, mask, **kwargs)

    def _attend_prompt(self, part: _Candidates, at: slice, query: Tensor, terms: LogitTerms) -> Tensor:
        heads, held = part.keys.shape[:2]
        fold, queries = query.shape[1] // heads, query.shape[2]
        keys = torch.cat([part.keys, self.new_keys[:, at].flatten(1, 2)], dim=1).float().transpose(1, 2)
        visible = self._visible(part, fold, queries).unflatten(1, (fold, queries))
        scaling, softcap, sinks = terms
        rows = query[0].float().unflatten(0, (heads, fold)) * scaling
        most = torch.zeros((heads, fold, held), device=query.device)
        block = max(1, BLOCK_BYTES // (4 * heads * fold * keys.shape[2]))
        for start in range(self.counted_from, queries, block):
            asking = slice(start, start + block)
            logits = rows[:, :, asking] @ keys[:, None]
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            logits = logits.masked_fill(~visible[:, :, asking], float("-inf"))
            sink = None if sinks is None else sinks.view(heads, fold, 1).expand(logits.shape[:-1])
            most = torch.maximum(most, softmax_with_sinks(logits, sink)[..., :held].amax(dim=2))
        self.utility = (most * self._lengths).amax(dim=1)
        return super()._attend_prompt(part, at, query, terms)


class UtilityCache(ReplayCache):
    """One ranked prompt, all of it, whose use by the tokens of one call of the model is noted.

    Args:
        model: the model.
        prompt: the ranked prompt.
        first: the first of the call's tokens whose use counts.
        grams: of each attention module; see `output_grams`. What is missing is added, so that it serves many prompts.
    """

    kv_layers: Sequence[UtilityLayer]  # type: ignore[assignment]

    def __init__(self, model: PreTrainedModel, prompt: RankedPrompt, first: int, grams: dict[nn.Module, Tensor]):
        self._first, self._grams = first, grams
        everything = np.full((1, len(prompt.keys), len(prompt.keys[0])), np.iinfo(np.int64).max)
        super().__init__(model, [prompt], everything)

    def _layer(self, index: int, parts: list[_Candidates], window: int | None) -> ReplayLayer:
        return UtilityLayer(parts, window, self._first, self._grams)


def output_grams(module: nn.Module, values: Tensor, query_heads: int) -> Tensor:
    """Return ``WᵀW`` of the part W of an attention module's output projection that each query head goes through.

    Args:
        module: the attention module.
        values: of any entries, ``[kv_heads, entries, value_dim]``.
        query_heads: their number.

    Returns:
        ``[kv_heads, queries_per_kv_head, value_dim, value_dim]`` float32.

    Raises:
        ModelError: for a module without an output projection that we know.
    """
    heads, _, width = values.shape
    weight = _output_weight(module, values.new_zeros((1, 1, query_heads * width)))
    weight = weight.unflatten(0, (heads, query_heads // heads, width))
    return weight @ weight.transpose(2, 3)


def output_lengths(grams: Tensor, values: Tensor) -> Tensor:
    """Return the length of what the output projection makes of each value, for each query head.

    ‖W v‖² is vᵀ (WᵀW) v, with a matrix of the head's width instead of the model's.

    Args:
        grams: see `output_grams`.
        values: ``[kv_heads, entries, value_dim]``.

    Returns:
        ``[kv_heads, queries_per_kv_head, entries]`` float32.
    """
    wide = values.float()
    squares = [((wide @ grams[:, i]) * wide).sum(-1) for i in range(grams.shape[1])]
    return torch.stack(squares, dim=1).clamp(min=0).sqrt()


def _output_weight(module: nn.Module, nothing: Tensor) -> Tensor:
    """Return the output projection's weight, ``[query_heads * value_dim, hidden]`` float32.

    It is what the projection makes of unit vectors: so it may be stored in any way (quantised, adapted, elsewhere).

    Args:
        module: the attention module.
        nothing: zeros as its projection takes them, ``[1, 1, query_heads * value_dim]``.
    """
    found = (getattr(module, name, None) for name in _PROJECTIONS)
    projection = next((each for each in found if isinstance(each, nn.Module)), None)
    width = nothing.shape[-1]
    try:
        assert projection is not None
        units = torch.eye(width, dtype=nothing.dtype, device=nothing.device)[None]
        return (projection(units).float() - projection(nothing).float())[0]
    except (AssertionError, RuntimeError) as error:
        raise ModelError(
            f"LU-KV weighs values by the output projection, and {type(module).__name__} has none that takes "
            f"{width} numbers among {', '.join(_PROJECTIONS)}; leave lukv out, or add its name to evolkv.cache.utility"
        ) from error
