"""Layers whose new tokens read a part of what is held: hybrid sparse attention, the second stage of RocketKV.

Behnam et al. 2025, arXiv 2502.14051v3, section 3.4. See `evolkv.selectors.rocketkv`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evolkv.cache.attend import attend_in_turn
from evolkv.cache.by_group import ByGroupLayer
from evolkv.cache.hook import Attention
from evolkv.cache.masks import boolean_mask, is_causal
from evolkv.cache.math import LogitTerms, attention
from evolkv.cache.rows import RowGroup, rows_of
from evolkv.errors import UsageError
from evolkv.selectors.rocketkv import Reading, RocketKV

# Pages by which the extremes of a group grow when it is full.
_MORE_PAGES = 16


class Pages:
    """The element-wise extremes of the keys of each page of a group of rows.

    Args:
        keys: ``[rows, entries, head_dim]``.
        size: entries of a page.

    Attributes:
        entries: that the pages are of.
    """

    def __init__(self, keys: Tensor, size: int):
        self.size, self.entries = size, keys.shape[1]
        keys = keys.detach()
        rest = self.entries % size
        # The last page is filled up with its last key.
        filled = torch.cat([keys, keys[:, -1:].expand(-1, size - rest, -1)], dim=1) if rest else keys
        paged = filled.unflatten(1, (-1, size))
        #: ``[rows, 2 * head_dim, pages]``: of each channel the lowest, then of each the highest.
        self._extremes = torch.cat([paged.amin(2).transpose(1, 2), paged.amax(2).transpose(1, 2)], dim=1)
        rows, width, _ = self._extremes.shape
        self._first = torch.arange(0, rows * width, width, device=keys.device)[:, None]

    @property
    def count(self) -> int:
        """Return how many pages there are."""
        return -(-self.entries // self.size)

    @property
    def nbytes(self) -> int:
        """Return the bytes held, reserved room included."""
        return self._extremes.nbytes

    def append(self, key: Tensor) -> None:
        """Add one entry's key to each row, ``[rows, head_dim]``."""
        page, opens = divmod(self.entries, self.size)
        key, half = key.detach(), key.shape[1]
        # What was made in inference mode can be written to in that mode only.
        if self._extremes.is_inference() and not torch.is_inference_mode_enabled():
            self._extremes = self._extremes.clone()
        if page == self._extremes.shape[2]:
            room = self._extremes.new_empty((*self._extremes.shape[:2], _MORE_PAGES))
            self._extremes = torch.cat([self._extremes, room], dim=2)
        column = self._extremes.select(2, page)
        low, high = column.narrow(1, 0, half), column.narrow(1, half, half)
        if opens:
            torch.minimum(low, key, out=low)
            torch.maximum(high, key, out=high)
        else:
            low.copy_(key)
            high.copy_(key)
        self.entries += 1

    def bounds(self, channels: Tensor, high: Tensor) -> Tensor:
        """Return an extreme of some channels in each page, ``[rows, channels, pages]`` float32.

        Args:
            channels: ``[rows, channels]``.
            high: whether the highest is wanted, rather than the lowest, ``[rows, channels]``.
        """
        half = self._extremes.shape[1] // 2
        which = torch.add(channels + self._first, high, alpha=half).flatten()
        found = self._extremes.flatten(0, 1).index_select(0, which).narrow(1, 0, self.count)
        return found.view(*channels.shape, -1).float()


def chosen_entries(query: Tensor, keys: Tensor, pages: Pages | None, reading: Reading, scaling: float) -> Tensor:
    """Return the entries that a new token attends to, ``[rows, reading.tokens]``, those of the best page first.

    On tensors as small as these the number of calls decides how long a step takes.

    Args:
        query: ``[rows, queries_per_kv_head, head_dim]``.
        keys: ``[rows, entries, head_dim]``, the new token's included.
        pages: of the keys; None where a page is a single entry.
        reading: how the rows are read.
        scaling: factor on the model's attention logits.
    """
    query, entries, page = query.detach().float(), keys.shape[1], reading.page
    size = query.abs()
    channels = size.sum(dim=1).topk(reading.channels, dim=1).indices
    if pages is None:
        bounds = keys.detach().transpose(1, 2).gather(1, channels[:, :, None].expand(-1, -1, entries)).float()
    else:
        bounds = pages.bounds(channels, query.sum(dim=1).gather(1, channels) > 0)
    which = channels[:, None].expand(-1, query.shape[1], -1)
    # Without some channels the logits are too small, or too large; the paper mends that by their share.
    share = size.gather(2, which).sum(dim=2, keepdim=True) / size.sum(dim=2, keepdim=True)
    logits = torch.bmm(query.gather(2, which) * (share.rsqrt() * scaling), bounds)
    # A softmax over tokens, all those of a page alike; the last page may not be full.
    last = entries - (bounds.shape[2] - 1) * page
    if last < page:
        logits.select(2, -1).add_(math.log(last / page))
    weights = logits.softmax(dim=2).mean(dim=1)
    if last < page:
        weights.select(1, -1).mul_(page / last)
    best = weights.sort(dim=1, descending=True, stable=True).indices[:, : reading.tokens // page + 2]
    if page > 1:
        best = (best[:, :, None] * page + torch.arange(page, device=best.device)).flatten(1)
    if last < page:
        # Places of the last page that are free go to the end.
        best = best.gather(1, (best >= entries).sort(dim=1, stable=True).indices)
    return best[:, : reading.tokens]


class ReadingLayer(ByGroupLayer):
    """A layer whose new tokens each read a part of what it holds, as its selector says.

    A token reads so if it comes alone, or among those of a call that `HookedCache.expect_answers` announced. A call of
    several tokens, such as a question that follows the prompt, reads everything; so do layers with a sliding window.
    """

    selector: RocketKV

    def _clear(self) -> None:
        super()._clear()
        #: Of each sequence, the first token of the next call that counts as generated; see `expect_answers`.
        self.answers_from: Sequence[int] | None = None
        #: Of each group the pages of its keys, if it is read by pages of several entries.
        self._pages: list[Pages | None] = []

    @property
    def kv_bytes(self) -> int:
        """Return the bytes of keys, values and extremes held, reserved room included."""
        self._read_ways()
        return super().kv_bytes + sum(pages.nbytes for pages in self._pages if pages is not None)

    def bytes_by_row(self) -> tuple[Tensor, Tensor]:
        """See `CompressedLayer.bytes_by_row`."""
        held, read = [], []
        for (group, reading), pages in zip(self._read_ways(), self._pages, strict=True):
            entries, size = group.keys.shape[1], group.keys[0].nbytes + group.values[0].nbytes
            held.append(size + _extreme_bytes(group, pages))
            if reading is not None:
                scored = -(-entries // reading.page) * reading.channels * group.keys.element_size()
                size = reading.tokens * size // entries + scored
            read.append(size)
        return rows_of(self.groups, held), rows_of(self.groups, read)

    def crop(self, tokens_to_remove: int) -> None:
        """See `CompressedLayer.crop`."""
        super().crop(tokens_to_remove)
        # As many other tokens may come at once, so that their number would not tell.
        self._pages = [None] * len(self._pages)

    def attend(
        self, own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See `CompressedLayer.attend`; each token that counts as generated is attended to by itself."""
        new, firsts = key.shape[2], set(self.answers_from or ())
        self.answers_from = None
        if len(firsts) > 1:
            raise UsageError(
                f"the answers in a call begin at tokens {sorted(firsts)}; a cache that reads less than it holds needs "
                "the same token for all sequences, so read them one by one"
            )
        # Drafts are to be what would come without them.
        first = 0 if self.record_past else min(firsts, default=new)
        if self.drafted or not self.is_initialized or self.is_sliding or new == 1 or first >= new:
            return super().attend(own, module, query, key, value, mask, **kwargs)
        if self.real is None and is_causal(mask, key):
            mask = None
        elif mask is not None:
            mask = boolean_mask(mask, len(key), new, self.appended + new, key.device)
        ends = [*range(max(1, first), new), new]
        return attend_in_turn(partial(self.attend, own, module, **kwargs), ends, query, key, value, mask)

    def _attend_group(self, number: int, query: Tensor, visible: Tensor | None, terms: LogitTerms) -> Tensor:
        group, reading, pages = self.groups[number], self._ways[number], self._pages[number]
        if pages is not None:
            pages.append(group.keys[:, -1])
        if visible is None:
            return _read(query, group.keys, group.values, pages, reading, terms)
        # What is hidden has a place in no page.
        outputs = []
        for row, shown in enumerate(visible[:, 0]):
            at = slice(row, row + 1)
            keys, values = group.keys[at, shown], group.values[at, shown]
            own = None if pages is None else Pages(keys, reading.page)
            outputs.append(_read(query[at], keys, values, own, reading, terms.of_rows(at)))
        return torch.cat(outputs)

    def _read_ways(self) -> list[tuple[RowGroup, Reading | None]]:
        known = self._ways_of is self._mark
        ways = super()._read_ways()
        if not known:
            self._pages = [None] * len(ways)
        for number, (group, reading) in enumerate(ways):
            if reading is None or reading.page == 1:
                continue
            pages = self._pages[number]
            # Tokens that several came at once are not in the pages.
            if pages is None or pages.entries != group.keys.shape[1]:
                self._pages[number] = Pages(group.keys, reading.page)
        return ways

    def _way_of(self, row: int, group: RowGroup) -> Reading | None:
        held, head_dim = group.positions.shape[1], group.keys.shape[2]
        sequence, head = divmod(row, self.num_kv_heads)
        budget = int(self.budgets[sequence, head] if self.budgets.ndim == 2 else self.budgets[head])
        return self.selector.reading(held, self.prompt_lengths[sequence], head_dim, budget)


def _extreme_bytes(group: RowGroup, pages: Pages | None) -> int:
    """Return the bytes of one row's extremes."""
    if pages is None:
        return 0
    _, entries, channels = group.keys.shape
    return 2 * -(-entries // pages.size) * channels * group.keys.element_size()


def _read(
    query: Tensor, keys: Tensor, values: Tensor, pages: Pages | None, reading: Reading, terms: LogitTerms
) -> Tensor:
    """Return the attention of one token of each row to the entries that it chooses; see `attention`."""
    if keys.shape[1] > reading.tokens:
        chosen = chosen_entries(query, keys, pages, reading, terms.scaling)
        rows = torch.arange(len(keys), device=keys.device)[:, None]
        keys, values = keys[rows, chosen], values[rows, chosen]
    return attention(query, keys, values, None, terms)
