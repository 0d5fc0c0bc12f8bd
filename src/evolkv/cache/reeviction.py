"""Evicting again: while a prompt is read in chunks, after each turn of a conversation, and during generation.

One mechanism serves all three: what a layer holds, new tokens included, is ranked with the newest queries and cut to
the budgets. The layer is then as it was after its first prompt: what is held counts as the prompt, new tokens follow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evolkv.cache.hook import Attention
from evolkv.cache.layer import CompressedLayer
from evolkv.cache.masks import real_columns
from evolkv.cache.rows import RowGroup, group_rows, of_one_width, places_of
from evolkv.errors import RunError, UsageError
from evolkv.numbers import is_whole
from evolkv.selectors import LayerContext, PromptAttention, Selector


@dataclass(frozen=True)
class Reeviction:
    """Moments at which a cache evicts again, after the first forward call.

    Args:
        prefill_chunk: tokens of the chunks in which a prompt is read, or None for all at once. A prompt may then come
            in several forward calls, too: it goes on until the first call of a single token.
        evict: "once": tokens after the prompt are kept; "again": after each later call of several tokens (a second
            turn's prompt) everything held is cut to the budgets.
        evict_every: tokens after which everything held is cut to the budgets, also while they are generated; None for
            never.

    Raises:
        UsageError: for a value out of range.
    """

    prefill_chunk: int | None = None
    evict: Literal["once", "again"] = "once"
    evict_every: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("prefill_chunk", self.prefill_chunk), ("evict_every", self.evict_every)):
            if value is not None and not is_whole(value):
                raise UsageError(f"{name} is {value!r}; expected a whole number of tokens")
        if self.prefill_chunk is not None and self.prefill_chunk < 4:
            raise UsageError(
                f"prefill_chunk is {self.prefill_chunk}; expected at least 4 tokens, such as 512: prompts are cut into "
                "pieces of equal length, and a call of a single token is generation"
            )
        if self.evict not in ("once", "again"):
            raise UsageError(f"evict is {self.evict!r}; expected 'once' (later tokens are kept) or 'again'")
        if self.evict_every is not None and self.evict_every < 1:
            raise UsageError(f"evict_every is {self.evict_every}; expected at least 1 token, such as 64")

    @property
    def wanted(self) -> bool:
        """Return whether anything happens after the first call."""
        return self != ONCE

    @property
    def after_prompt(self) -> bool:
        """Return whether tokens that came after the prompt may be evicted."""
        return self.evict == "again" or self.evict_every is not None

    def check_selector(self, selector: Selector) -> None:
        """Raises `UsageError` for a selector that cannot rank what a cache still holds."""
        if self.wanted and selector.looks_at_other_layers:
            raise UsageError(
                f"{selector.name} lets a layer choose for others, which no longer hold the same tokens when a cache "
                "evicts again (prefill_chunk, evict, evict_every); let each choose for itself, with reuse=1 "
                f"({{'name': '{selector.name}', 'reuse': 1}})"
            )
        if self.wanted and selector.layer is not None:
            raise UsageError(
                f"selector {selector.name!r} evicts once, after the prompt, because its caches have layers of their "
                "own; leave out prefill_chunk, evict and evict_every, or choose another selector"
            )
        if self.wanted and selector.rereads:
            raise UsageError(
                f"selector {selector.name!r} has the model read a whole prompt again before anything is evicted, so it "
                "cannot evict within a prompt or after it; leave out prefill_chunk, evict and evict_every, or use "
                "another selector, such as keydiff"
            )


#: What a cache does that evicts once.
ONCE = Reeviction()


class ReevictingLayer(CompressedLayer):
    """A layer of a cache that evicts again.

    Besides its entries it keeps what the selector will need to rank them: the queries of the last tokens
    (``window × heads × head_dim``; those since the last cut for a selector that looks at all), and for a selector that
    accumulates a number per entry.

    Args:
        reeviction: when to evict.
        budgets, selector, sliding_window, context: see `CompressedLayer`.
    """

    _queries: list[Tensor]
    #: Those of later calls, call by call: put together at each they would be copied as often as tokens come.
    _newest: list[list[Tensor]]

    def __init__(
        self,
        reeviction: Reeviction,
        budgets: np.ndarray,
        selector: Selector,
        sliding_window: int | None = None,
        context: LayerContext | None = None,
    ):
        self.reeviction = reeviction
        super().__init__(budgets, selector, sliding_window, context)

    def _clear(self) -> None:
        super()._clear()
        # Replaced, never written to: copies of the layer share them.
        #: Whether a next call of several tokens goes on with the prompt.
        self.open = self.reeviction.prefill_chunk is not None
        self.queries = []
        #: Of each row, what the selector has accumulated for the entries of the last cut, ``[entries]``.
        self.received: list[Tensor] = []
        self._cutting = False

    @property
    def queries(self) -> list[Tensor]:
        """Return the queries that each sequence keeps for the next cut, ``[heads, queries, head_dim]``."""
        if self._newest:
            self._queries = [torch.cat(pieces, dim=1) for pieces in zip(self._queries, *self._newest, strict=True)]
            self._newest = []
        return self._queries

    @queries.setter
    def queries(self, queries: list[Tensor]) -> None:
        self._queries, self._newest = queries, []

    @property
    def evicts_later(self) -> bool:
        """Return whether a later call may evict something."""
        return self.open or self.reeviction.after_prompt

    def end_prompt(self) -> None:
        """Mark the prompt as complete."""
        self.open = False
        if not self.reeviction.after_prompt:
            self.queries, self.received = [], []

    def move(self, device: torch.device) -> None:
        """See `CompressedLayer.move`."""
        super().move(device)
        self.queries = [queries.to(device) for queries in self.queries]
        self.received = [received.to(device) for received in self.received]

    def note_padding(self, real: Tensor) -> None:
        """See `CompressedLayer.note_padding`; here the tokens since the last cut come after the prompt."""
        before = self.real_tokens()[:, self.prompt_width :]
        super().note_padding(real)
        if self.real is None or torch.equal(self.real, before):
            return
        self.queries = [_queries_that_stay(queries, self.real[i][before[i]]) for i, queries in enumerate(self.queries)]

    def check_crop(self, count: int) -> None:
        """See `CompressedLayer.check_crop`; tokens can be taken back where no later token is ever evicted."""
        if self.reeviction.after_prompt:
            raise RunError(
                f"cannot take back {count} tokens from a cache that evicts after its prompt: what was "
                "evicted for them is gone; use plain greedy search, sampling or beam search, or leave out "
                "evict='again' and evict_every"
            )
        super().check_crop(count)

    def activate_past_recording(self) -> None:
        """Raises `UsageError`: drafts cannot be told from a prompt that goes on, nor be taken back after a cut."""
        raise UsageError(
            "assisted decoding needs a cache that evicts once; generate without assistance, or leave out "
            "prefill_chunk, evict and evict_every"
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `CompressedLayer.batch_select_indices`."""
        if not self.is_initialized:
            return
        super().batch_select_indices(indices)
        order, heads = indices.tolist(), range(self.num_kv_heads)
        if self.queries:
            self.queries = [self.queries[i] for i in order]
        if self.received:
            self.received = [self.received[i * self.num_kv_heads + head] for i in order for head in heads]

    def attend(
        self, own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the new tokens to what the layer holds and to themselves; then stores them, and may cut."""
        real = real_columns(mask, key)
        first = not self.is_initialized
        self._cutting = first or self._cuts_after(key.shape[2])
        if first:
            output = own(module, query, key, value, mask, **kwargs)
            self._take(key, value, real)
        else:
            self._note_columns(real, key.shape[2])
            output = self._decode(own, module, query, key, value, mask, **kwargs)
        self._remember(query, real)
        if self._cutting:
            self._cut(kwargs, first)
            self._cutting = False
        return output

    def _cuts_after(self, new: int) -> bool:
        """Return whether to cut everything after a later call of so many tokens."""
        if new == 1 and self.open:
            self.end_prompt()
        if new > 1 and (self.open or self.reeviction.evict == "again"):
            return True
        every = self.reeviction.evict_every
        return every is not None and self.appended + new >= every

    def _drop_out_of_window(self) -> None:
        # The cut that follows tells padding from tokens.
        if not self._cutting:
            super()._drop_out_of_window()

    # What is held, and its ranking.

    def _take(self, key: Tensor, value: Tensor, real: Tensor | None) -> None:
        """Holds a first call's tokens, all of them, until the cut."""
        batch, heads, width, _ = key.shape
        self.prompt_lengths, self.prompt_width, self.is_initialized = [0] * batch, 0, True
        self.appended, self.real = width, None if real is None else real.to(key.device)
        rows = torch.arange(batch * heads, device=key.device)
        none = torch.empty((batch * heads, 0), dtype=torch.int32, device=key.device)
        self.groups = [RowGroup(rows, key.flatten(0, 1), value.flatten(0, 1), none)]

    # Which entries are kept has no gradient; what they hold may have one.

    @torch.no_grad()
    def _remember(self, query: Tensor, real: Tensor | None) -> None:
        """Keeps the queries that the next cut will need."""
        wanted, new = self.selector.observed_queries, query.shape[2]
        if wanted == 0 or not (self._cutting or self.evicts_later):
            return
        # Between the turns of a conversation all queries would be more than all entries.
        if wanted is None and new == 1 and self.reeviction.evict_every is None and not self._cutting:
            return
        queries = [q if real is None else q[:, real[i].to(q.device)] for i, q in enumerate(query)]
        if wanted is None and self._queries:
            self._newest = [*self._newest, queries]
            return
        if self._queries:
            queries = [torch.cat(pair, dim=1) for pair in zip(self._queries, queries, strict=True)]
        # Copied, so that no longer tensor stays alive behind a window.
        self.queries = queries if wanted is None else [q[:, -wanted:].clone() for q in queries]

    def _cut(self, kwargs: dict[str, Any], first: bool) -> None:
        """Ranks everything held and keeps what the budgets allow; `kwargs` are what the model says of its attention."""
        self._complete_positions()
        seen = [length + tokens for length, tokens in zip(self.prompt_lengths, self._tokens_since(), strict=True)]
        places = places_of(self.groups)
        counts = self._counts_of_held(places, seen)
        shrinks = [int(count) < group.keys.shape[1] for count, (group, _) in zip(counts, places, strict=True)]
        kept: list[Tensor | None] = [None] * len(places)
        if any(shrinks) or self.selector.accumulates:
            kept = self._ranked(places, seen, counts, kwargs)
        if first or any(shrinks):
            self._regroup(places, counts, kept)
        self.prompt_lengths = seen
        self.prompt_width += self.appended
        self.appended, self.real = 0, None
        if self.selector.observed_queries is None or not self.evicts_later:
            self.queries = []
        if not self.evicts_later:
            self.received = []

    def _tokens_since(self) -> list[int]:
        """Real tokens of each sequence since the last cut."""
        if self.real is None:
            return [self.appended] * self.batch
        return [int(n) for n in self.real.sum(dim=1)]

    def _complete_positions(self) -> None:
        """Gives every entry its position, and drops padding."""
        since = self._positions_since()
        for group in self.groups:
            missing = group.keys.shape[1] - group.positions.shape[1]
            if missing:
                newest = since[group.rows // self.num_kv_heads, -missing:]
                group.positions = torch.cat([group.positions, newest], dim=1)
        if self.real is not None:
            places = places_of(self.groups)
            kept = [(group.positions[slot] >= 0).nonzero()[:, 0] for group, slot in places]
            self._regroup(places, np.array([len(entries) for entries in kept]), list(kept))

    def _counts_of_held(self, places: list[tuple[RowGroup, int]], seen: list[int]) -> np.ndarray:
        """Entries that each row is to keep, ``[batch * kv_heads]``."""
        self._lay_out(seen)
        held = np.array([group.keys.shape[1] for group, _ in places])
        if self.sliding_window is not None:
            for row, (group, slot) in enumerate(places):
                oldest = seen[row // self.num_kv_heads] - self.sliding_window
                held[row] = int((group.positions[slot] >= oldest).sum())
        budgets = np.broadcast_to(self.budgets, (self.batch, self.num_kv_heads)).reshape(-1)
        return np.minimum(budgets, held)

    @torch.no_grad()
    def _ranked(
        self, places: list[tuple[RowGroup, int]], seen: list[int], counts: np.ndarray, kwargs: dict[str, Any]
    ) -> list[Tensor | None]:
        """Return the entries that each row keeps, ascending; None for all."""
        kept: list[Tensor | None] = []
        received: list[Tensor] = []
        for sequences in self._alike(seen):
            if seen[sequences[0]] == 0:
                # So far nothing but padding.
                kept += [None] * self.num_kv_heads * len(sequences)
                received += [torch.empty(0, device=self.device)] * self.num_kv_heads * len(sequences)
                continue
            prompt = self._prompt(sequences, places, seen[sequences[0]], kwargs)
            if self.selector.accumulates:
                totals = self.selector.accumulated(prompt)
                ranking = self.selector.order(prompt, self.selector.protect(totals))
            else:
                totals, ranking = None, self.selector.rank(prompt)
            for i, sequence in enumerate(sequences):
                for head in range(self.num_kv_heads):
                    row = sequence * self.num_kv_heads + head
                    best = ranking[i, head, : int(counts[row])].sort().values
                    # Shorter rows stand at the right.
                    kept.append(best - (prompt.num_tokens - places[row][0].keys.shape[1]))
                    if totals is not None:
                        received.append(totals[i, head, best])
        self.received = received if self.selector.accumulates else []
        return kept

    def _alike(self, seen: list[int]) -> list[list[int]]:
        """Return the sequences, all together if they can be ranked so."""
        together = len(self.groups) == 1 and len(set(seen)) == 1
        together = together and len({queries.shape[1] for queries in self.queries}) <= 1
        return [list(range(self.batch))] if together else [[i] for i in range(self.batch)]

    def _prompt(
        self, sequences: list[int], places: list[tuple[RowGroup, int]], seen: int, kwargs: dict[str, Any]
    ) -> PromptAttention:
        """Return what some sequences hold, shorter rows filled up in front."""
        heads = self.num_kv_heads
        rows = [sequence * heads + head for sequence in sequences for head in range(heads)]
        lengths = [places[row][0].keys.shape[1] for row in rows]
        longest, shape = max(lengths), (len(sequences), heads)
        positions: Tensor | None
        if len(self.groups) == 1:
            group, every = self.groups[0], slice(rows[0], rows[-1] + 1)
            held = group.keys[every], group.values[every], group.positions[every]
            key, value, positions = (x.unflatten(0, shape) for x in held)
        else:
            held = of_one_width([places[row] for row in rows], longest)
            key, value, positions = (x.unflatten(0, shape) for x in held)
        if min(lengths) == seen:
            positions = None
        since = self._tokens_since()
        received = [
            self._carried(row, length, since[row // heads], longest)
            for row, length in zip(rows, lengths, strict=True)
            if self.received
        ]
        # Of a query whose token has left a sliding window there is nothing to learn.
        queries = [self.queries[i][:, -min(lengths) :] for i in sequences] if self.queries else None
        query = key.new_empty((*shape, 0, key.shape[-1])) if queries is None else torch.stack(queries)
        return replace(
            self.inputs(query, key, value, kwargs),
            positions=None if positions is None else positions.long(),
            seen=seen,
            received=torch.stack(received).unflatten(0, shape) if received else None,
        )

    def _carried(self, row: int, length: int, since: int, longest: int) -> Tensor:
        """Return what a row's entries have accumulated, with zeros for new ones and in front of a short row."""
        before, new = self.received[row], min(length, since)
        # Whatever has left a sliding window was at the front.
        return F.pad(before[len(before) - (length - new) :], (longest - length, new))

    def _regroup(self, places: list[tuple[RowGroup, int]], counts: np.ndarray, kept: list[Tensor | None]) -> None:
        """Keeps of each row the entries ``kept`` (None: all), copied, so that no longer tensor stays alive."""
        groups = []
        for _, rows in group_rows(counts):
            parts: list[list[Tensor]] = [[], [], []]
            for row in rows.tolist():
                (group, slot), which = places[row], kept[row]
                for part, held in zip(parts, (group.keys, group.values, group.positions), strict=True):
                    part.append(held[slot] if which is None else held[slot, which])
            keys, values, positions = (torch.stack(part) for part in parts)
            groups.append(RowGroup(torch.from_numpy(rows).to(self.device), keys, values, positions))
        self.groups = groups


def _queries_that_stay(queries: Tensor, real: Tensor) -> Tensor:
    """Return the newest queries ``[heads, queries, head_dim]`` without those of padding among the latest."""
    count = queries.shape[1]
    real = real[max(0, len(real) - count) :]
    return queries[:, F.pad(real, (count - len(real), 0), value=True).to(queries.device)]
