"""What a selector is given: one layer's attention inputs over a prompt, and where the layer is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from evolkv.errors import UsageError
from evolkv.models.rotary import Rotary

# Queries of a block of attention at most.
_MOST_ROWS = 256


@dataclass(frozen=True)
class LayerContext:
    """The place of a layer, for selectors that look beyond it.

    Args:
        index: its number in the model, from 0.
        rotary: gives its rotary position embedding; raises `ModelError` if it has none.
        memory: what selectors remember of the same prompt from layer to layer.
        last: whether no layer comes after it.
    """

    index: int
    rotary: Callable[[], Rotary]
    memory: dict[Any, Any] = field(default_factory=dict)
    last: bool = False

    def of_sequence(self, number: int) -> LayerContext:
        """Return the same for one sequence of a batch, with a memory of its own."""
        return replace(self, memory=self.memory.setdefault(number, {}))

    def leave(self) -> None:
        """Says that the layer has ranked the prompt; nobody remembers anything of it after the last one has."""
        if self.last:
            self.memory.clear()


@dataclass(frozen=True)
class PromptAttention:
    """One layer's attention inputs over a prompt, after RoPE and before any repetition of KV heads.

    Over what a cache still holds of the tokens seen so far, to be cut again, each head has entries of its own:
    `positions` tells which. The queries are then those of the newest tokens, all of which are held, so that they stand
    last in every head.

    Args:
        query: queries, ``[batch, heads, tokens, head_dim]``.
        key: keys, ``[batch, kv_heads, tokens, head_dim]``.
        value: values, ``[batch, kv_heads, tokens, value_dim]``.
        scaling: factor on the attention logits.
        softcap: Gemma 2's cap on the attention logits, or None.
        sinks: a logit for each query head that only enters the softmax's denominator (GPT-OSS), ``[heads]``, or None.
        sliding_window: how many tokens (itself included) a query of this layer sees, or None for all.
        first_query: position of the first query. Above 0 where the head of the prompt was computed earlier, for
            another prompt that shares it; the queries are then the last ``tokens - first_query``.
        layer: where the layer is in the model, if it is in one.
        positions: of each entry, ``[batch, kv_heads, tokens]``, ascending; None where every token of the prompt is
            there. A head with fewer entries than others has -1 in front, and zeros there for keys and values.
        seen: tokens seen so far, held or not; None where every one is there.
        received: what a selector that `accumulates` had found of each entry before these queries,
            ``[batch, kv_heads, tokens]``.
        repeated: what each entry received while the model read the prompt again, for a selector that `rereads`,
            ``[batch, kv_heads, tokens]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None = None
    sliding_window: int | None = None
    first_query: int = 0
    layer: LayerContext | None = None
    sinks: Tensor | None = None
    positions: Tensor | None = None
    seen: int | None = None
    received: Tensor | None = None
    repeated: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Entries of a head: the length of the prompt, or what is held of the tokens seen."""
        return self.key.shape[2]

    @property
    def length(self) -> int:
        """Tokens seen so far, and so the position of the next one."""
        return self.num_tokens if self.seen is None else self.seen

    @property
    def places(self) -> Tensor:
        """Position of each entry, ``[batch, kv_heads, tokens]``; negative where a head has none."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.num_tokens, device=self.key.device).expand(self.key.shape[:3])

    @property
    def most_held(self) -> int:
        """Tokens that the next query may see: all, or those in the sliding window."""
        return min(self.num_tokens, self.sliding_window or self.num_tokens)

    def without_queries(self) -> PromptAttention:
        """Return the same without the queries, which can take more memory than keys and values."""
        return replace(self, query=self.query.new_empty(self.query[:, :, :0].shape), first_query=self.num_tokens)

    def of_sequence(self, index: int, tokens: Tensor) -> PromptAttention:
        """Return one sequence of a padded batch, cut down to its real tokens."""
        at = slice(index, index + 1)
        asking = tokens[tokens >= self.first_query]
        return replace(
            self,
            query=self.query[at, :, asking - self.first_query],
            key=self.key[at, :, tokens],
            value=self.value[at, :, tokens],
            first_query=len(tokens) - len(asking),
            repeated=None if self.repeated is None else self.repeated[at, :, tokens],
            layer=None if self.layer is None else self.layer.of_sequence(index),
        )

    def sequences(self, real: Sequence[Tensor] | None) -> list[PromptAttention]:
        """Return each sequence of a batch by itself.

        Args:
            real: for each sequence, the numbers of its real tokens, ``[tokens]``; None where none has padding.
        """
        if real is None and len(self.key) == 1:
            return [self]
        everything = torch.arange(self.num_tokens, device=self.key.device)
        return [self.of_sequence(i, everything if real is None else real[i]) for i in range(len(self.key))]

    def mean_over_heads(self, scores: Tensor) -> Tensor:
        """Return the scores of each token, averaged over the KV heads that hold it.

        Args:
            scores: ``[batch, kv_heads, tokens]``, the shape of the result.
        """
        if self.positions is None:
            return scores.mean(dim=1, keepdim=True).expand_as(scores)
        slots = (self.positions + 1).flatten(1)
        totals = scores.new_zeros((len(scores), self.length + 1)).scatter_add(1, slots, scores.flatten(1))
        heads = scores.new_zeros(totals.shape).scatter_add(1, slots, torch.ones_like(scores).flatten(1))
        return (totals / heads.clamp(min=1)).gather(1, slots).view_as(scores)

    def probabilities(self, start: int, stop: int) -> Tensor:
        """Return the attention of some queries to all entries, in float32.

        Args:
            start: the first entry whose query counts.
            stop: the entry after the last one.

        Returns:
            ``[batch, kv_heads, queries_per_kv_head, stop - start, stop]``: keys from ``stop`` on are
            invisible to these queries and left out. Where the model has sinks, a query's sum is below 1 by what
            goes to its sink, as in the model: a query that looks at nothing in particular says little.
        """
        batch, kv_heads, _, head_dim = self.key.shape
        group = self.query.shape[1] // kv_heads
        count = stop - start
        if start < self.first_query:
            raise UsageError(
                f"a selector asks for the query of entry {start}, but only those from {self.first_query} on are there; "
                "its observed_queries must be the number of last queries that it looks at, or None for all"
            )
        query = self.query[:, :, start - self.first_query : stop - self.first_query].float() * self.scaling
        query = query.reshape(batch, kv_heads, group * count, head_dim)
        logits = query @ self.key[:, :, :stop].float().transpose(2, 3)
        logits = logits.view(batch, kv_heads, group, count, stop)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        rows = torch.arange(start, stop, device=logits.device)[:, None]
        columns = torch.arange(stop, device=logits.device)
        # Only the square of keys that are younger than the first query can be in some query's future.
        logits[..., start:].masked_fill_(columns[start:] > rows, float("-inf"))
        if self.positions is None:
            if self.sliding_window is not None and stop > self.sliding_window:
                logits.masked_fill_(columns <= rows - self.sliding_window, float("-inf"))
        else:
            hidden = (self.positions < 0)[:, :, None, :stop]
            if self.sliding_window is not None:
                asking = self.positions[:, :, start:stop, None]
                hidden = hidden | (self.positions[:, :, None, :stop] <= asking - self.sliding_window)
            logits.masked_fill_(hidden[:, :, None], float("-inf"))
        sinks = None if self.sinks is None else self.sinks.view(kv_heads, group, 1)
        return softmax_with_sinks(logits, sinks)

    def blocks(self, first: int, stop: int, elements: int = 1 << 24, least: int = 1) -> Iterator[slice]:
        """Yield the queries of some entries in blocks, so that not all of their `probabilities` are held at once.

        Args:
            first: the first entry whose query counts.
            stop: the entry after the last one.
            elements: float32 probabilities of a block at most (64 MiB by default), where that leaves `least` queries.
            least: queries of a block at least.
        """
        rows = min(_MOST_ROWS, max(least, elements // max(1, len(self.query) * self.query.shape[1] * stop)))
        for start in range(first, stop, rows):
            yield slice(start, min(start + rows, stop))


def softmax_with_sinks(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys of ``[..., queries, keys]``, with a sink for each query, ``[..., queries]``, or none."""
    if sinks is None:
        return logits.softmax(dim=-1)
    sink = sinks.to(logits.dtype).unsqueeze(-1).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
