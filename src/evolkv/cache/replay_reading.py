"""Replay of layers whose new tokens read a part of what is held: each candidate chooses among the entries it keeps.

See `evolkv.cache.reading`, which does the same for one candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evolkv.cache.hook import Attention
from evolkv.cache.math import LogitTerms
from evolkv.cache.replay import ReplayLayer, _Candidates
from evolkv.selectors.rocketkv import Reading, RocketKV

# Bytes of the keys that are put in order at once.
_BLOCK_BYTES = 2**25


class ReadingReplayLayer(ReplayLayer):
    """One layer of all candidates under a selector whose new tokens read a part of what is held.

    Args:
        prompts, sliding_window: see `ReplayLayer`.
        selector: says how a head is read.

    Attributes:
        answers_from: of each row of the cache, the first token of the next call that counts as generated.
    """

    def __init__(self, prompts: list[_Candidates], sliding_window: int | None, selector: RocketKV):
        super().__init__(prompts, sliding_window)
        self.selector = selector
        self.answers_from: Sequence[int] | None = None
        #: Which entries the queries at hand choose; see `_chosen`.
        self._choice: Tensor | None = None

    def attend(
        self, own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See `ReplayLayer.attend`."""
        output = super().attend(own, module, query, key, value, mask, **kwargs)
        self.answers_from = None
        return output

    def _attend_prompt(self, part: _Candidates, at: slice, query: Tensor, terms: LogitTerms) -> Tensor:
        queries, self._choice = query.shape[2], None
        first = queries
        if self.answers_from is not None:
            # Below the layer where candidates part, a prompt has one row here and more in the cache.
            first = self.answers_from[at.start * len(self.answers_from) // self.num_rows]
        # A token that comes alone counts as generated.
        first = 0 if queries == 1 or first == 1 else first
        if self.sliding_window is None and first < queries:
            self._choice = self._chosen(part, at, query, first, terms.scaling)
        return super()._attend_prompt(part, at, query, terms)

    def _visible(self, part: _Candidates, fold: int, queries: int) -> Tensor:
        """See `ReplayLayer._visible`; a query sees what it chooses."""
        visible = super()._visible(part, fold, queries)
        if self._choice is None:
            return visible
        candidates, heads = part.counts.shape
        held = part.keys.shape[1]
        seen = visible.view(heads, candidates, fold, queries, -1)
        chosen = self._choice[:, :, None]
        # Only a candidate's own new tokens are visible to it anyway.
        new = chosen[..., None, held:].expand(-1, -1, fold, -1, candidates, -1).flatten(4)
        return (seen & torch.cat([chosen[..., :held].expand(-1, -1, fold, -1, -1), new], dim=-1)).view(visible.shape)

    def _chosen(self, part: _Candidates, at: slice, query: Tensor, first: int, scaling: float) -> Tensor:
        """Return what queries choose, ``[kv_heads, candidates, queries, held + new]``; all, before number `first`."""
        candidates, heads = part.counts.shape
        held, dim = part.keys.shape[1:]
        counts = part.counts.T.flatten()
        asked = zip(counts.tolist(), part.budgets.T.flatten().tolist(), strict=True)
        ways = [self.selector.reading(count, part.tokens, dim, budget) for count, budget in asked]
        # [candidates, heads, queries, dim] -> [kv_heads * candidates, fold, queries, dim]
        asking = query.unflatten(1, (heads, -1)).transpose(0, 1).flatten(0, 1)
        new = self.new_keys[:, at].flatten(0, 1)
        chosen = torch.ones((len(ways), query.shape[2], held + new.shape[1]), dtype=torch.bool, device=query.device)
        by_page: dict[int, list[int]] = {}
        for row, way in enumerate(ways):
            if way is not None:
                by_page.setdefault(way.page, []).append(row)
        block = max(1, _BLOCK_BYTES // (4 * dim * (held + new.shape[1])))
        for page, alike in by_page.items():
            for start in range(0, len(alike), block):
                rows = alike[start : start + block]
                which = torch.tensor(rows, device=query.device)
                rows_of = _Rows(
                    part.keys[which // candidates],
                    part.positions[which // candidates],
                    new[which],
                    counts[which],
                    page,
                    [way for row in rows if (way := ways[row]) is not None],
                )
                for number in range(first, query.shape[2]):
                    chosen[which, number] = rows_of.choose(asking[which, :, number], query.shape[2] - number, scaling)
        return chosen.view(heads, candidates, *chosen.shape[1:])


class _Rows:
    """Some candidates' heads, with pages of equally many entries.

    Args:
        keys: in order of the ranking, ``[rows, ranked, head_dim]``.
        positions: of these, ``[rows, ranked]``.
        new: keys of the tokens after the prompt, ``[rows, new, head_dim]``.
        counts: entries kept of the ranked, ``[rows]``.
        page: entries of a page.
        ways: how each row is read.
    """

    def __init__(
        self, keys: Tensor, positions: Tensor, new: Tensor, counts: Tensor, page: int, ways: Sequence[Reading]
    ):
        device, ranked, later = keys.device, keys.shape[1], new.shape[1]
        self.new, self.counts, self.page, self.columns = new.float(), counts[:, None], page, ranked + later
        self.tokens = torch.tensor([way.tokens for way in ways], device=device)[:, None]
        self.channels = torch.tensor([way.channels for way in ways], device=device)[:, None]
        # What a row holds, in order of position: entries of the prompt, then new tokens.
        beyond = torch.arange(ranked, device=device) >= self.counts
        order = positions.masked_fill(beyond, torch.iinfo(positions.dtype).max).argsort(dim=1)
        pages = -(-self.columns // page)
        places = torch.arange(pages * page, device=device)
        ahead = places - self.counts
        #: The column of the mask for each place, ``[rows, places]``; a further one for places that are free.
        free = torch.full_like(ahead, self.columns)
        self.column = (ranked + ahead).where((ahead >= 0) & (ahead < later), free)
        self.column[:, :ranked] = order.where(ahead[:, :ranked] < 0, self.column[:, :ranked])
        self.places = places
        ordered = keys.gather(1, order[:, :, None].expand_as(keys)).float()
        room = ordered.new_empty((len(keys), pages * page - ranked, keys.shape[2]))
        ordered, hidden = torch.cat([ordered, room], dim=1), (ahead >= 0)[:, :, None]
        self.low = ordered.masked_fill(hidden, torch.inf).unflatten(1, (pages, page)).amin(2)
        self.high = ordered.masked_fill(hidden, -torch.inf).unflatten(1, (pages, page)).amax(2)
        #: New tokens that have a place in the pages.
        self.taken = 0

    def choose(self, query: Tensor, behind: int, scaling: float) -> Tensor:
        """Return which columns a token of each row attends to, ``[rows, ranked + new]``.

        Args:
            query: ``[rows, queries_per_kv_head, head_dim]``.
            behind: new tokens from this one on.
            scaling: factor on the model's attention logits.
        """
        rows = torch.arange(len(query), device=query.device)
        seen = self.new.shape[1] - behind + 1
        for number in range(self.taken, seen):
            at = (rows, (self.counts[:, 0] + number) // self.page)
            self.low[at] = torch.minimum(self.low[at], self.new[:, number])
            self.high[at] = torch.maximum(self.high[at], self.new[:, number])
        self.taken = seen
        query, pages = query.float(), self.low.shape[1]
        size = query.abs()
        best = size.mean(dim=1).argsort(dim=1, descending=True)
        places = torch.arange(best.shape[1], device=best.device)
        wanted = torch.zeros_like(best, dtype=torch.bool).scatter(1, best, places < self.channels)
        asked = query * wanted[:, None]
        share = asked.abs().sum(dim=2, keepdim=True) / size.sum(dim=2, keepdim=True)
        first = torch.arange(pages, device=query.device) * self.page
        sizes = (self.counts + seen - first).clamp(0, self.page)
        bounds = self.high.where((query.sum(dim=1) > 0)[:, None], self.low).masked_fill((sizes == 0)[:, :, None], 0)
        logits = (asked @ bounds.transpose(1, 2)) * (scaling / share.sqrt())
        logits = logits.masked_fill((sizes == 0)[:, None], -torch.inf)
        weights = (logits - logits.amax(dim=2, keepdim=True)).exp()
        total = (weights * sizes[:, None]).sum(dim=2, keepdim=True)
        scores = (weights / total).mean(dim=1).masked_fill(sizes == 0, -1)
        order = scores.argsort(dim=1, descending=True, stable=True)
        there = sizes.gather(1, order)
        left = (self.tokens - there.cumsum(dim=1) + there).clamp(min=0)
        chosen = torch.zeros_like(sizes).scatter(1, order, torch.minimum(there, left))
        inside = (self.places % self.page) < chosen.repeat_interleave(self.page, dim=1)
        found = torch.zeros((len(query), self.columns + 1), dtype=torch.bool, device=query.device)
        return found.scatter(1, self.column, inside)[:, : self.columns]
