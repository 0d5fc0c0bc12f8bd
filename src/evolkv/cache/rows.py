"""Rows of a cache layer: each (sequence, KV head) pair holds its own entries, in groups of equal length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Groups whose keys take more than so many bytes reserve room when they grow: held / 64 tokens, at most 16.
_WORTH_ROOM = 2**19
_PER_SPARE, _MOST_SPARE = 64, 16
# Entries above which copying a row costs more than attending to it apart from others of its length.
_LONG = 512
# Where kernels write new entries, groups of any size reserve room: held / 16 tokens.
_PER_SPARE_AHEAD = 16


@dataclass
class RowGroup:
    """Rows of one layer that hold the same number of entries.

    A row is one (sequence, KV head) pair, numbered ``sequence * kv_heads + head``.

    Args:
        rows: the row numbers, ``[group]``, ascending.
        keys: ``[group, entries, head_dim]``, oldest entry first.
        values: ``[group, entries, value_dim]``.
        positions: prompt position of each entry that came from the prompt, ``[group, prompt_entries]``, int32.
            In a sliding-window layer new tokens are recorded too, since any entry may have to go; padding has -1.
    """

    rows: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    #: What `keys` and `values` are a part of, where room for more was reserved.
    _reserved: tuple[Tensor, Tensor] | None = None
    #: The entry of what is reserved with which `keys` and `values` begin: those before it have left the window.
    _start: int = 0

    @classmethod
    def join(cls, groups: list[RowGroup], room: int) -> RowGroup:
        """Return the rows of several groups of equal length in one, with `room` for further entries."""
        rows = torch.cat([group.rows for group in groups])
        joined = cls(
            rows,
            torch.cat([group.keys for group in groups]),
            torch.cat([group.values for group in groups]),
            torch.cat([group.positions for group in groups]),
        )
        # Groups that were taken apart have rows between those of each other.
        if not bool((rows.diff() > 0).all()):
            order = rows.argsort()
            joined = cls(rows[order], joined.keys[order], joined.values[order], joined.positions[order])
        joined._reserve(room)
        return joined

    @property
    def nbytes(self) -> int:
        """Return the bytes held for keys and values, reserved room included."""
        keys, values = self._reserved or (self.keys, self.values)
        return keys.nbytes + values.nbytes

    def to(self, device: torch.device) -> RowGroup:
        """Return the same rows on a device."""
        return RowGroup(self.rows.to(device), self.keys.to(device), self.values.to(device), self.positions.to(device))

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add entries ``[group, new, dim]`` behind those held, in reserved room as far as there is any.

        A group with keys of less than 512 KiB grows by just these entries. A larger one reserves room as well, of which
        `nbytes` knows: a 64th of what it holds and 16 tokens at most.
        """
        # Nothing is written in place that a gradient may be asked for.
        graph = keys.requires_grad or (self.keys.requires_grad and torch.is_grad_enabled())
        held, new = self.keys.shape[1], keys.shape[1]
        if graph or self._reserved is None or not self._has_room(new):
            if graph or self.keys.nbytes < _WORTH_ROOM:
                self._reserved, self._start = None, 0
                self.keys, self.values = torch.cat([self.keys, keys], dim=1), torch.cat([self.values, values], dim=1)
                return
            self._make_room(new + min(_MOST_SPARE, held // _PER_SPARE))
        self._take_up(new)
        self.keys.narrow(1, held, new).copy_(keys)
        self.values.narrow(1, held, new).copy_(values)

    def extend(self, new: int) -> None:
        """Count so many entries more as held, which the caller must then write into `keys` and `values`.

        When it is full, the group reserves room for a 16th of what it holds, for one token at least and 16 at most.
        """
        if not self._has_room(new):
            self._make_room(new + min(_MOST_SPARE, max(1, self.keys.shape[1] // _PER_SPARE_AHEAD)))
        self._take_up(new)

    def _reserve(self, room: int) -> None:
        """Move the entries to memory with room for so many more, and hold them there."""
        self._make_room(room)
        self._take_up(0)

    def _take_up(self, new: int) -> None:
        """Count reserved entries as held."""
        assert self._reserved is not None
        entries = self.keys.shape[1] + new
        self.keys, self.values = (buffer.narrow(1, self._start, entries) for buffer in self._reserved)

    def _has_room(self, new: int) -> bool:
        if self._reserved is None:
            return False
        buffer = self._reserved[0]
        # What was made in inference mode can be written to in that mode only.
        writable = torch.is_inference_mode_enabled() or not buffer.is_inference()
        return writable and self._start + self.keys.shape[1] + new <= buffer.shape[1]

    def _make_room(self, room: int) -> None:
        """Move the entries to memory with room for so many more."""
        held = self.keys.shape[1]
        keys, values = (part.new_empty((len(part), held + room, part.shape[-1])) for part in (self.keys, self.values))
        keys.narrow(1, 0, held).copy_(self.keys)
        values.narrow(1, 0, held).copy_(self.values)
        self._reserved, self._start = (keys, values), 0

    def copy(self) -> RowGroup:
        """Return the same rows, in the same memory: what is held is never written to."""
        # The room behind the entries stays with the original, which may write there.
        return replace(self, _reserved=None, _start=0)

    def keep_entries(self, which: slice) -> None:
        """Forget, and frees, all entries of every row but these."""
        self._reserved, self._start = None, 0
        self.keys, self.values = self.keys[:, which].clone(), self.values[:, which].clone()

    def drop_oldest(self, count: int) -> None:
        """Forget the first entries of every row; the memory of up to 16 of them goes a few tokens later."""
        if self._reserved is None or self._start + count > _MOST_SPARE:
            self.keep_entries(slice(count, None))
        else:
            self._start += count
            self.keys, self.values = self.keys[:, count:], self.values[:, count:]
        self.positions = self.positions[:, count:].clone()

    def leave_window(self, window: int, before: Tensor | None) -> None:
        """Forget the entries that have left a sliding window of so many tokens.

        Args:
            window: tokens that a query sees.
            before: of each row, the position up to which tokens have left; None where there is no padding, so that
                every entry takes a place in the window.
        """
        surplus = self.keys.shape[1] - window
        if before is not None:
            # Padding takes no token's place in the window, and the rows of a group stay equally long.
            outside = self.positions < before[:, None]
            surplus = int(outside.cumprod(dim=1).sum(dim=1).min())
        if surplus > 0:
            self.drop_oldest(surplus)

    def select(self, rows: Tensor) -> RowGroup | None:
        """Return the group for a new set of rows, of which row ``i`` is a copy of the present row ``rows[i]``."""
        slots = torch.searchsorted(self.rows, rows).clamp(max=len(self.rows) - 1)
        kept = (self.rows[slots] == rows).nonzero()[:, 0]
        if not len(kept):
            return None
        slots = slots[kept]
        return RowGroup(kept, self.keys[slots], self.values[slots], self.positions[slots])


@dataclass(frozen=True)
class RowOrder:
    """The rows of all groups, one group behind the other.

    Args:
        rows: the row number at each place, ``[rows]``.
        places: the place of each row, ``[rows]``.
        sizes: rows of each group.
    """

    rows: Tensor
    places: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, groups: Sequence[RowGroup]) -> RowOrder | None:
        """Return the order of all rows of a layer, or None if they are one group, in order as they are."""
        if len(groups) == 1:
            return None
        rows = torch.cat([group.rows for group in groups])
        return cls(rows, rows.argsort(), [len(group.rows) for group in groups])

    def by_group(self, values: Tensor) -> Sequence[Tensor]:
        """Return each group's share of ``[rows, ...]``."""
        return values.index_select(0, self.rows).split_with_sizes(self.sizes)

    def in_order(self, shares: Sequence[Tensor]) -> Tensor:
        """Return ``[rows, ...]`` from each group's share."""
        return torch.cat(list(shares)).index_select(0, self.places)


def rows_of(groups: Sequence[RowGroup], values: Sequence[int]) -> Tensor:
    """Return for each row the value of its group, ``[rows]`` int64 on the CPU."""
    found = torch.zeros(sum(len(group.rows) for group in groups), dtype=torch.long)
    for group, value in zip(groups, values, strict=True):
        found[group.rows.cpu()] = value
    return found


def places_of(groups: Sequence[RowGroup]) -> list[tuple[RowGroup, int]]:
    """Return, for each row in order, the group that holds it and its place there."""
    found = {row: (group, slot) for group in groups for slot, row in enumerate(group.rows.tolist())}
    return [found[row] for row in sorted(found)]


def of_one_width(places: Sequence[tuple[RowGroup, int]], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what rows hold, all of one width: shorter ones have zeros in front, and -1 for positions.

    Args:
        places: the group that holds each row, and its place there.
        width: entries.

    Returns:
        Keys ``[rows, width, head_dim]``, values ``[rows, width, value_dim]`` and positions ``[rows, width]``.
    """
    parts: list[list[Tensor]] = [[], [], []]
    for group, slot in places:
        front = width - group.keys.shape[1]
        parts[0].append(F.pad(group.keys[slot], (0, 0, front, 0)))
        parts[1].append(F.pad(group.values[slot], (0, 0, front, 0)))
        parts[2].append(F.pad(group.positions[slot], (front, 0), value=-1))
    keys, values, positions = map(torch.stack, parts)
    return keys, values, positions


def later_positions(lengths: Tensor, count: int, real: Tensor | None) -> Tensor:
    """Return the positions of the tokens after prompts, ``[batch, count]`` int32, -1 for padding.

    Args:
        lengths: tokens of each prompt, ``[batch]``.
        count: columns after the prompts.
        real: which of these are tokens, ``[batch, count]``; None where all are.
    """
    if real is None:
        return (lengths[:, None] + torch.arange(count, device=lengths.device)).to(torch.int32)
    places = lengths[:, None] + real.cumsum(dim=1) - 1
    return places.where(real, -1).to(torch.int32)


def group_rows(counts: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Return row numbers by the number of entries they keep: ``[(entries, rows), …]``, fewest entries first.

    Args:
        counts: entries kept by each row, ``[rows]``.
    """
    by_count: dict[int, list[int]] = defaultdict(list)
    for row, count in enumerate(counts.tolist()):
        by_count[count].append(row)
    return [(count, np.array(rows)) for count, rows in sorted(by_count.items())]


def cut_rows(
    key: Tensor,
    value: Tensor,
    counts: np.ndarray,
    rankings: Sequence[Tensor | None],
    real: Sequence[Tensor] | None = None,
    room: int = 0,
) -> list[RowGroup]:
    """Return the rows of prompts, cut to some entries each, fewest entries first.

    Args:
        key: ``[batch, kv_heads, tokens, head_dim]``.
        value: ``[batch, kv_heads, tokens, value_dim]``.
        counts: entries that each row keeps, ``[batch * kv_heads]``.
        rankings: of each sequence, ``[1, kv_heads, tokens]``; None where all is kept.
        real: of each sequence, the tokens that are no padding; None where none is.
        room: new tokens to reserve memory for.
    """
    heads, groups = key.shape[1], []
    known = [ranking for ranking in rankings if ranking is not None]
    ranked = torch.cat(known) if real is None and len(known) == len(rankings) else None
    for count, rows in group_rows(counts):
        row = torch.from_numpy(rows).to(key.device)
        sequence, head = row // heads, row % heads
        if ranked is not None:
            kept = ranked[sequence, head, :count].sort(dim=-1).values
        else:
            everything = torch.arange(count, device=key.device)
            each = [(rankings[i], j) for i, j in zip(sequence.tolist(), head.tolist(), strict=True)]
            kept = torch.stack([everything if r is None else r[0, j, :count].sort().values for r, j in each])
        tokens = kept
        if real is not None:
            tokens = torch.stack([real[i][k] for i, k in zip(sequence.tolist(), kept, strict=True)])
        where = (sequence[:, None], head[:, None], tokens)
        # Indexing copies, so that nothing keeps the whole prompt's keys and values alive.
        groups.append(RowGroup(row, key[where], value[where], kept.to(torch.int32)))
        if room:
            groups[-1]._reserve(room)
    return groups


def join_groups(groups: Sequence[RowGroup], room: int) -> list[RowGroup]:
    """Return one group for each length, with `room` for new tokens; long rows stay where they are."""
    by_count: dict[int, list[RowGroup]] = defaultdict(list)
    for group in groups:
        by_count[group.keys.shape[1]].append(group)
    joined = []
    for count, alike in sorted(by_count.items()):
        joined += alike if count > _LONG else [RowGroup.join(alike, room)]
    return joined
