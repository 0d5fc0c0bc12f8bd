"""A cache of many candidates over the same prompts, whose entries are stored once.

Each KV head's entries are held in ranked order. What a candidate keeps is a prefix of that order, so a candidate is
only a number per head, and all candidates read the same tensors.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evolkv.cache.hook import AttendingLayer, Attention
from evolkv.cache.hooked import HookedCache
from evolkv.cache.math import LogitTerms, attention, check_plain_logits, logit_terms
from evolkv.cache.recording import RecordedPrompt
from evolkv.cache.state import StateLayer
from evolkv.models import model_facts
from evolkv.selectors import Selector


@dataclass(frozen=True)
class RankedPrompt:
    """A prompt's ranked entries: enough to continue it under any budgets up to a ceiling.

    Args:
        tokens: length of the prompt.
        next_logits: logits of the first new token, ``[vocabulary]`` float32. They do not depend on the budgets.
        keys: by layer, ``[kv_heads, ranked, head_dim]``, in order of the ranking.
        values: by layer, ``[kv_heads, ranked, value_dim]``.
        positions: by layer, the prompt position of each entry, ``[kv_heads, ranked]``.
        states: what the layers of a hybrid model without keys and values keep, one sequence each. They do not depend on
            the budgets either.
        selector: of the ranking; None stands for one whose new tokens read all that is held.

    "By layer" is by layer with keys and values.
    """

    tokens: int
    next_logits: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    positions: list[Tensor]
    states: list[StateLayer] = field(default_factory=list)
    selector: Selector | None = None

    @classmethod
    def from_recorded(cls, recorded: RecordedPrompt, selector: Selector, ceiling: int) -> RankedPrompt:
        """Copies the first `ceiling` ranked entries of each head out of a recorded prompt."""
        keys, values, positions = [], [], []
        ceiling = int(selector.held_under(np.array(ceiling)))
        for layer in recorded.kv_layers:
            ranking = layer.rankings[selector][0]
            limit = ceiling if layer.sliding_window is None else min(ceiling, layer.sliding_window)
            ranking = ranking[:, :limit]
            heads = torch.arange(len(ranking), device=ranking.device)[:, None]
            held_keys, held_values = layer.held()
            keys.append(held_keys[0][heads, ranking])
            values.append(held_values[0][heads, ranking])
            positions.append(ranking.contiguous())
        states = [state.copy() for state in recorded.state_layers]
        return cls(recorded.tokens, recorded.next_logits, keys, values, positions, states, selector)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for part in (self.keys, self.values, self.positions, self.states) for x in part)


@dataclass(frozen=True)
class _Candidates:
    """One layer of one ranked prompt, for all candidates.

    Args:
        keys: ``[kv_heads, ranked, head_dim]``.
        values: ``[kv_heads, ranked, value_dim]``.
        positions: ``[kv_heads, ranked]``.
        counts: entries that each candidate keeps, ``[candidates, kv_heads]``.
        budgets: of each candidate, likewise.
        tokens: length of the prompt.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    counts: Tensor
    budgets: np.ndarray
    tokens: int


class ReplayLayer(AttendingLayer):
    """One layer for all candidates on some prompts: shared ranked entries, and each row's own new tokens.

    Rows are ordered by prompt, then by candidate.

    Args:
        prompts: the candidates on each prompt.
        sliding_window: how many tokens a query sees, or None for all.
    """

    def __init__(self, prompts: list[_Candidates], sliding_window: int | None):
        super().__init__(sliding_window)
        self.is_initialized = True
        self.prompts = prompts
        keys, values = prompts[0].keys, prompts[0].values
        self.num_rows = sum(len(part.counts) for part in prompts)
        self.new_keys = keys.new_empty((len(keys), self.num_rows, 0, keys.shape[-1]))
        self.new_values = values.new_empty((len(values), self.num_rows, 0, values.shape[-1]))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends each row's new tokens, ``[rows, kv_heads, new, dim]``."""
        self.new_keys = torch.cat([self.new_keys, key_states.transpose(0, 1)], dim=2)
        self.new_values = torch.cat([self.new_values, value_states.transpose(0, 1)], dim=2)
        return self.send(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens seen by the rows of the longest prompt."""
        return max(part.tokens for part in self.prompts) + self.new_keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks made outside are not used; the smallest will do."""
        return query_length, self.get_seq_length()

    def attend(
        self, own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with all candidates' queries to the shared entries, in one call per prompt."""
        check_plain_logits(module, kwargs)
        terms = logit_terms(query, kwargs)
        outputs, start = [], 0
        for part in self.prompts:
            rows = slice(start, start + len(part.counts))
            outputs.append(self._attend_prompt(part, rows, query[rows], terms))
            start = rows.stop
        return torch.cat(outputs), None

    def _attend_prompt(self, part: _Candidates, at: slice, query: Tensor, terms: LogitTerms) -> Tensor:
        candidates, query_heads, queries, _ = query.shape
        heads = len(part.keys)
        fold = query_heads // heads
        # [candidates, heads, queries, dim] -> [kv_heads, candidates * fold * queries, dim]
        rows = query.unflatten(1, (heads, fold)).transpose(0, 1).reshape(heads, candidates * fold * queries, -1)
        keys = torch.cat([part.keys, self.new_keys[:, at].flatten(1, 2)], dim=1)
        values = torch.cat([part.values, self.new_values[:, at].flatten(1, 2)], dim=1)
        terms = terms.folded(heads, queries, repeats=candidates)
        output = attention(rows, keys, values, self._visible(part, fold, queries), terms)
        output = output.view(heads, candidates, fold, queries, -1).permute(1, 3, 0, 2, 4)
        return output.reshape(candidates, queries, query_heads, -1)

    def _visible(self, part: _Candidates, fold: int, queries: int) -> Tensor:
        """Return which entries each query sees, ``[kv_heads, candidates * fold * queries, entries]``."""
        candidates, heads = part.counts.shape
        device, held, new = part.keys.device, part.keys.shape[1], self.new_keys.shape[2]
        shape = (heads, candidates, fold, queries)
        kept = torch.arange(held, device=device) < part.counts.T[:, :, None]
        kept = kept[:, :, None, None].expand(*shape, held)
        asking = torch.arange(new - queries, new, device=device)[:, None]
        step = torch.arange(new, device=device)
        seen = step <= asking
        if self.sliding_window is not None and part.tokens + new > self.sliding_window:
            oldest = part.tokens + asking - self.sliding_window
            kept = kept & (part.positions[:, None, None, None] > oldest)
            seen = seen & (step > asking - self.sliding_window)
        # New tokens are seen by the candidate that they belong to only.
        same = torch.eye(candidates, dtype=torch.bool, device=device)
        own = (same[:, None, :, None] & seen[:, None]).flatten(2)
        own = own[:, None].expand(*shape, candidates * new)
        return torch.cat([kept, own], dim=-1).flatten(1, 3)


class ReplayCache(HookedCache):
    """Every candidate on every one of some ranked prompts, as one batch ordered by prompt, then by candidate.

    Args:
        model: the model.
        prompts: the ranked prompts.
        budgets: ``[candidates, layers, kv_heads]``, or ``[prompts, candidates, layers, kv_heads]``; must not exceed the
            ceiling that the prompts were ranked to, unless the prompt is shorter.
        shared: rows of the budgets below which all candidates are alike; the decoder runs with one row per prompt up to
            that layer, where each row becomes a row per candidate.
    """

    kv_layers: list[ReplayLayer]

    def __init__(self, model: PreTrainedModel, prompts: Sequence[RankedPrompt], budgets: np.ndarray, shared: int = 0):
        layers = []
        self.shared, self._selector = shared, prompts[0].selector
        candidates = budgets.shape[-3]
        by_prompt = np.broadcast_to(budgets, (len(prompts), *budgets.shape[-3:]))
        #: Rows that come out of the model for each row that goes in.
        self.fan = candidates if shared else 1
        for index, window in enumerate(model_facts(model).sliding_windows):
            parts = []
            for prompt, rows in zip(prompts, by_prompt, strict=True):
                rows = rows[:1] if index < shared else rows
                mine = rows[:, index]
                held = mine if prompt.selector is None else prompt.selector.held_under(mine)
                counts = np.minimum(held, prompt.keys[index].shape[1])
                longest = int(counts.max())
                parts.append(
                    _Candidates(
                        prompt.keys[index][:, :longest],
                        prompt.values[index][:, :longest],
                        prompt.positions[index][:, :longest],
                        torch.from_numpy(counts).to(prompt.keys[index].device),
                        mine,
                        prompt.tokens,
                    )
                )
            layers.append(self._layer(index, parts, window))
        facts = model_facts(model)
        places, others = facts.kv_layers, facts.other_layers
        #: The decoder layer at which a row per prompt becomes a row per candidate.
        self.fan_at = places[shared].index
        states = []
        for number, place in enumerate(place for place in others if place.states):
            repeats = 1 if shared and place.index < self.fan_at else candidates
            states.append(StateLayer.merge([prompt.states[number] for prompt in prompts for _ in range(repeats)]))
        super().__init__(model, layers, states, by_layer=shared > 0)

    def _layer(self, index: int, parts: list[_Candidates], window: int | None) -> ReplayLayer:
        if self._selector is None or self._selector.replay_layer is None:
            return ReplayLayer(parts, window)
        layer: ReplayLayer = pkgutil.resolve_name(self._selector.replay_layer)(parts, window, self._selector)
        return layer

    @property
    def num_rows(self) -> int:
        """Prompts times candidates."""
        return self.kv_layers[-1].num_rows

    def enter_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments of decoder layer `index` with a row per candidate; the hidden states fan out once."""
        if not self.shared or index < self.fan_at:
            return None
        wide = {name: _repeated(value, self.fan) for name, value in kwargs.items() if name != "cache"}
        hidden = _repeated(args[0], self.fan) if index == self.fan_at else args[0]
        return (hidden, *args[1:]), {**wide, "cache": self}


def _repeated(value: Any, times: int) -> Any:
    """Return a batch, or a tuple of them, with each row so many times."""
    if isinstance(value, Tensor) and value.ndim > 1:
        return value.repeat_interleave(times, dim=0)
    if isinstance(value, tuple):
        return tuple(_repeated(part, times) for part in value)
    return value
