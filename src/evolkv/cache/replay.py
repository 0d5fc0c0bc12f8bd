"""A cache of many candidates over one prompt, whose entries are stored once.

Each KV head's entries are held in ranked order. What a candidate keeps is a prefix of that order, so a candidate is
only a number per head, and all candidates read the same tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from evolkv.cache.compressed import HookedCache, sliding_windows
from evolkv.cache.hook import Attention, tag
from evolkv.cache.math import attention, check_plain_logits, scaling_of
from evolkv.cache.recording import RecordingCache
from evolkv.selectors import Selector


@dataclass(frozen=True)
class RankedPrompt:
    """What a prompt leaves behind: enough to continue it under any budgets up to a ceiling.

    Args:
        tokens: length of the prompt.
        next_logits: logits of the first new token, ``[vocabulary]`` float32. They do not depend on the budgets.
        keys: by layer, ``[kv_heads, ranked, head_dim]``, in order of the ranking.
        values: by layer, ``[kv_heads, ranked, value_dim]``.
        positions: by layer, the prompt position of each entry, ``[kv_heads, ranked]``.
    """

    tokens: int
    next_logits: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    positions: list[Tensor]

    @classmethod
    def from_recording(
        cls, cache: RecordingCache, next_logits: Tensor, selector: Selector, ceiling: int
    ) -> RankedPrompt:
        """Copies the first `ceiling` ranked entries of each head out of a recorded prompt."""
        keys, values, positions = [], [], []
        for layer in cache.layers:
            ranking = layer.rankings[selector][0]
            limit = ceiling if layer.sliding_window is None else min(ceiling, layer.sliding_window)
            ranking = ranking[:, :limit]
            heads = torch.arange(len(ranking), device=ranking.device)[:, None]
            held_keys, held_values = layer.held()
            keys.append(held_keys[0][heads, ranking])
            values.append(held_values[0][heads, ranking])
            positions.append(ranking.contiguous())
        return cls(cache.get_seq_length(), next_logits, keys, values, positions)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for part in (self.keys, self.values, self.positions) for x in part)


class ReplayLayer(CacheLayerMixin):
    """One layer for all candidates: shared ranked entries, and each candidate's own new tokens.

    Args:
        keys: ``[kv_heads, ranked, head_dim]``.
        values: ``[kv_heads, ranked, value_dim]``.
        positions: ``[kv_heads, ranked]``.
        counts: entries that each candidate keeps, ``[candidates, kv_heads]``.
        tokens: length of the prompt.
        sliding_window: how many tokens a query sees, or None for all.
    """

    is_sliding = False

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        counts: Tensor,
        tokens: int,
        sliding_window: int | None,
    ):
        super().__init__()
        self.is_sliding = sliding_window is not None
        self.is_initialized = True
        self.sliding_window = sliding_window
        self.tokens = tokens
        self.counts = counts
        longest = int(counts.max())
        self.keys, self.values = keys[:, :longest], values[:, :longest]
        self.positions = positions[:, :longest]
        candidates, heads = counts.shape
        self.new_keys = keys.new_empty((heads, candidates, 0, keys.shape[-1]))
        self.new_values = values.new_empty((heads, candidates, 0, values.shape[-1]))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the prompt is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends each candidate's new tokens, ``[candidates, kv_heads, new, dim]``."""
        self.new_keys = torch.cat([self.new_keys, key_states.transpose(0, 1)], dim=2)
        self.new_values = torch.cat([self.new_values, value_states.transpose(0, 1)], dim=2)
        return tag(key_states, self), value_states

    def get_seq_length(self) -> int:
        """Tokens seen by each candidate."""
        return self.tokens + self.new_keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks made outside are not used; the smallest will do."""
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def attend(
        self,
        own: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """All candidates' queries against the shared entries, in one call per KV head."""
        check_plain_logits(module, kwargs)
        candidates, query_heads, queries, _ = query.shape
        heads = self.counts.shape[1]
        fold = query_heads // heads
        # [candidates, heads, queries, dim] -> [kv_heads, candidates * fold * queries, dim]
        rows = query.unflatten(1, (heads, fold)).transpose(0, 1).reshape(heads, candidates * fold * queries, -1)
        keys = torch.cat([self.keys, self.new_keys.flatten(1, 2)], dim=1)
        values = torch.cat([self.values, self.new_values.flatten(1, 2)], dim=1)
        visible = self._visible(fold, queries)
        output = attention(rows, keys, values, visible, scaling_of(query, kwargs), kwargs.get("softcap"))
        output = output.view(heads, candidates, fold, queries, -1).permute(1, 3, 0, 2, 4)
        return output.reshape(candidates, queries, query_heads, -1), None

    def _visible(self, fold: int, queries: int) -> Tensor:
        """Which entries each query sees, ``[kv_heads, candidates * fold * queries, entries]``."""
        candidates, heads = self.counts.shape
        device, held, new = self.keys.device, self.keys.shape[1], self.new_keys.shape[2]
        shape = (heads, candidates, fold, queries)
        kept = torch.arange(held, device=device) < self.counts.T[:, :, None]
        kept = kept[:, :, None, None].expand(*shape, held)
        asking = torch.arange(new - queries, new, device=device)[:, None]
        step = torch.arange(new, device=device)
        seen = step <= asking
        if self.sliding_window is not None and self.get_seq_length() > self.sliding_window:
            oldest = self.tokens + asking - self.sliding_window
            kept = kept & (self.positions[:, None, None, None] > oldest)
            seen = seen & (step > asking - self.sliding_window)
        # New tokens are seen by the candidate that they belong to only.
        same = torch.eye(candidates, dtype=torch.bool, device=device)
        own = (same[:, None, :, None] & seen[:, None]).flatten(2)
        own = own[:, None].expand(*shape, candidates * new)
        return torch.cat([kept, own], dim=-1).flatten(1, 3)


class ReplayCache(HookedCache):
    """Many candidates as a batch over one ranked prompt.

    Args:
        model: the model.
        prompt: the ranked prompt.
        budgets: ``[candidates, layers, kv_heads]``; must not exceed the ceiling that the prompt was ranked to, unless
            the prompt is shorter.
    """

    layers: list[ReplayLayer]

    def __init__(self, model: PreTrainedModel, prompt: RankedPrompt, budgets: np.ndarray):
        layers = []
        for index, window in enumerate(sliding_windows(model)):
            keys = prompt.keys[index]
            counts = torch.from_numpy(np.minimum(budgets[:, index], keys.shape[1])).to(keys.device)
            layers.append(
                ReplayLayer(keys, prompt.values[index], prompt.positions[index], counts, prompt.tokens, window)
            )
        super().__init__(model, layers)

    @property
    def num_rows(self) -> int:
        """Candidates."""
        return self.layers[0].counts.shape[0]
