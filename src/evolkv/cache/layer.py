"""One layer of the compressed cache: rows that each hold their own entries and nothing else."""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from evolkv.cache.hook import Attention, boolean_mask, hides_nothing, padding_of, tag, was_padding
from evolkv.cache.math import attention, check_plain_logits, extra_term, fold_sinks, scaling_of, sinks_of
from evolkv.errors import ModelError, RunError, UsageError
from evolkv.selectors import LayerContext, PromptAttention, Selector

# Entries above which copying a row costs more than attending to it apart from others of its length.
_LONG = 512

# Growing by one token copies a group. That is nothing for a small one. One whose keys have this many bytes grows, when
# it is full, by a token more for every so many that its rows hold, though by so many more at most.
_WORTH_ROOM = 2**19
_PER_SPARE, _MOST_SPARE = 64, 16
# Where kernels write new entries a group of any size has room ahead, for a token more for every so many.
_PER_SPARE_AHEAD = 16

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The rows of all groups, one group behind the other, and how many each has.
RowOrder = tuple[Tensor, list[int]]


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
        """The rows of several groups of equal length in one, with `room` for further entries."""
        rows = torch.cat([group.rows for group in groups])
        positions = torch.cat([group.positions for group in groups])
        entries = groups[0].keys.shape[1]
        buffers = []
        for name in ("keys", "values"):
            parts = [getattr(group, name) for group in groups]
            buffer = parts[0].new_empty((len(rows), entries + room, parts[0].shape[-1]))
            torch.cat(parts, out=buffer[:, :entries])
            buffers.append(buffer)
        keys, values = buffers
        return cls(rows, keys[:, :entries], values[:, :entries], positions, (keys, values))

    @classmethod
    def cut(
        cls, rows: Tensor, key: Tensor, value: Tensor, where: tuple[Tensor, ...], positions: Tensor, room: int
    ) -> RowGroup:
        """The entries ``where`` of a prompt, with `room` for further ones."""
        # Indexing copies, so that nothing keeps the whole prompt's keys and values alive.
        if not room:
            return cls(rows, key[where], value[where], positions)
        entries = positions.shape[1]
        buffers = [held.new_empty((len(rows), entries + room, held.shape[-1])) for held in (key, value)]
        for buffer, held in zip(buffers, (key, value), strict=True):
            buffer[:, :entries] = held[where]
        keys, values = buffers
        return cls(rows, keys[:, :entries], values[:, :entries], positions, (keys, values))

    @property
    def nbytes(self) -> int:
        """Bytes held for keys and values, reserved room included."""
        keys, values = self._reserved or (self.keys, self.values)
        return keys.nbytes + values.nbytes

    def to(self, device: torch.device) -> RowGroup:
        """The same rows on a device."""
        return RowGroup(self.rows.to(device), self.keys.to(device), self.values.to(device), self.positions.to(device))

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Adds entries ``[group, new, dim]`` behind those held, in reserved room as far as there is any.

        A group with keys of less than 512 KiB grows by just these entries. A larger one reserves room as well, of which
        `nbytes` knows: a 64th of what it holds and 16 tokens at most.
        """
        held, new = self.keys.shape[1], keys.shape[1]
        # Nothing is written in place that a gradient may be asked for.
        graph = keys.requires_grad or (self.keys.requires_grad and torch.is_grad_enabled())
        if graph or not self._has_room(new):
            if self.keys.nbytes < _WORTH_ROOM or graph:
                self._reserved, self._start = None, 0
                self.keys, self.values = torch.cat([self.keys, keys], dim=1), torch.cat([self.values, values], dim=1)
                return
            self._make_room(new + min(_MOST_SPARE, held // _PER_SPARE))
        self._take_up(new)
        self.keys.narrow(1, held, new).copy_(keys)
        self.values.narrow(1, held, new).copy_(values)

    def extend(self, new: int) -> None:
        """Counts so many entries more as held, which the caller must then write into `keys` and `values`.

        When it is full, the group reserves room for a 16th of what it holds, for one token at least and 16 at most.
        """
        if not self._has_room(new):
            self._make_room(new + min(_MOST_SPARE, max(1, self.keys.shape[1] // _PER_SPARE_AHEAD)))
        self._take_up(new)

    def _take_up(self, new: int) -> None:
        """Counts reserved entries as held."""
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
        """Moves the entries to memory with room for so many more."""
        held = self.keys.shape[1]
        buffers = []
        for entries in (self.keys, self.values):
            buffer = entries.new_empty((len(entries), held + room, entries.shape[-1]))
            buffer.narrow(1, 0, held).copy_(entries)
            buffers.append(buffer)
        keys, values = buffers
        self._reserved, self._start = (keys, values), 0

    def copy(self) -> RowGroup:
        """The same rows, in the same memory: what is held is never written to."""
        # The room behind the entries stays with the original, which may write there.
        return replace(self, _reserved=None, _start=0)

    def keep_entries(self, which: slice) -> None:
        """Forgets, and frees, all entries of every row but these."""
        self._reserved, self._start = None, 0
        self.keys, self.values = self.keys[:, which].clone(), self.values[:, which].clone()

    def drop_oldest(self, count: int) -> None:
        """Forgets the first entries of every row; the memory of up to 16 of them goes a few tokens later."""
        if self._reserved is None or self._start + count > _MOST_SPARE:
            self.keep_entries(slice(count, None))
        else:
            self._start += count
            self.keys, self.values = self.keys[:, count:], self.values[:, count:]
        self.positions = self.positions[:, count:].clone()

    def select(self, rows: Tensor) -> RowGroup | None:
        """The group for a new set of rows, of which row ``i`` is a copy of the present row ``rows[i]``."""
        slots = torch.searchsorted(self.rows, rows).clamp(max=len(self.rows) - 1)
        kept = (self.rows[slots] == rows).nonzero()[:, 0]
        if not len(kept):
            return None
        slots = slots[kept]
        return RowGroup(kept, self.keys[slots], self.values[slots], self.positions[slots])


def group_rows(counts: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Row numbers by the number of entries they keep: ``[(entries, rows), …]``, fewest entries first.

    Args:
        counts: entries kept by each row, ``[rows]``.
    """
    by_count: dict[int, list[int]] = defaultdict(list)
    for row, count in enumerate(counts.tolist()):
        by_count[count].append(row)
    return [(count, np.array(rows)) for count, rows in sorted(by_count.items())]


class CompressedLayer(CacheLayerMixin):
    """A cache layer that keeps, of each prompt, a set number of entries per KV head, and every later token.

    Before the prompt the layer is empty; the first forward call is the prompt, which attends to all of itself and
    is then cut down. `attend` is called by the attention hook.

    Args:
        budgets: entries to keep, ``[kv_heads]`` for every sequence alike, or ``[batch, kv_heads]``.
        selector: decides which entries.
        sliding_window: how many tokens a query of this layer sees, or None for all. Such a layer keeps
            ``min(budget, sliding_window)`` of the last `sliding_window` tokens, and never more than the window.
        context: where the layer is in a model, for selectors that need to know.
    """

    # HF's own dispatch looks at this flag to find a layer whose lengths the sliding masks are made for.
    is_sliding = False

    def __init__(
        self,
        budgets: np.ndarray,
        selector: Selector,
        sliding_window: int | None = None,
        context: LayerContext | None = None,
    ):
        super().__init__()
        self.context = context
        self.budgets = np.asarray(budgets, dtype=np.int64)
        self.selector = selector
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.groups: list[RowGroup] = []
        #: Real tokens of each sequence's prompt.
        self.prompt_lengths: list[int] = []
        self.prompt_width = 0
        self.appended = 0
        #: Tokens at the end of the first call that come after the prompt: drafts of assisted decoding.
        self.drafted = 0
        #: Which columns after the prompt are real tokens, ``[batch, appended]``; None where all are. Replaced, never
        #: written to: copies of the layer share it.
        self.real: Tensor | None = None
        self.record_past = False
        #: Where the rows lie, for the kernels: a `RowTable`.
        self._table: Any = None

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the layer."""
        return int(self.budgets.shape[-1])

    @property
    def batch(self) -> int:
        """Sequences held."""
        return len(self.prompt_lengths)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(group.nbytes for group in self.groups)

    def kept_positions(self, sequence: int, head: int) -> Tensor:
        """Prompt positions held for one row, ascending, ``[entries]`` int64."""
        row = sequence * self.num_kv_heads + head
        for group in self.groups:
            slot = (group.rows == row).nonzero()
            if len(slot):
                positions = group.positions[slot[0, 0]].long()
                return positions[(positions >= 0) & (positions < self.prompt_lengths[sequence])]
        return torch.empty(0, dtype=torch.long)

    def real_tokens(self) -> Tensor:
        """Which tokens seen are no padding, ``[batch, tokens]``; of the prompt only how many, as if padded in front."""
        padding = self.prompt_width - torch.tensor(self.prompt_lengths, device=self.device)
        found = torch.arange(self.get_seq_length(), device=self.device) >= padding[:, None]
        if self.real is not None:
            found[:, self.prompt_width :] = self.real
        return found

    def note_padding(self, real: Tensor) -> None:
        """Says which tokens after the prompt, ``[batch, appended]``, are real; those known as padding stay padding."""
        real = real.to(self.device) & self.real_tokens()[:, self.prompt_width :]
        self.real = None if bool(real.all()) else real
        if self.sliding_window is not None and self.real is not None:
            since = self._positions_since()
            for group in self.groups:
                held = max(0, group.positions.shape[1] - self.appended)
                newest = since[group.rows // self.num_kv_heads, held - group.positions.shape[1] :]
                group.positions = torch.cat([group.positions[:, :held], newest], dim=1)

    # What transformers asks of a cache layer.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated ahead of the prompt."""
        self.dtype, self.device = key_states.dtype, key_states.device

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands the new keys on to attention, which calls `attend`; entries are stored there."""
        if key_states.shape[1] != self.num_kv_heads:
            raise ModelError(
                f"a layer brings keys of {key_states.shape[1]} KV heads where its model's config says "
                f"{self.num_kv_heads}; EvolKV needs the number that the config says, the same in every layer"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif len(key_states) != self.batch:
            raise UsageError(
                f"the cache holds {self.batch} sequences, but this call brings {len(key_states)}; for several beams, "
                "returned sequences or questions repeat what it holds first, with cache.batch_repeat_interleave(n)"
            )
        elif key_states.dtype != self.dtype:
            raise UsageError(
                f"the cache holds {self.dtype}, but the model now computes in {key_states.dtype}; after the model's "
                "dtype has changed, reset() the cache or make a new one"
            )
        elif key_states.device != self.device:
            # What was loaded is on one device, the model's layers perhaps on several.
            self.move(key_states.device)
        return tag(key_states, value_states, self)

    def move(self, device: torch.device) -> None:
        """Holds everything on another device."""
        self.groups = [group.to(device) for group in self.groups]
        self.real = None if self.real is None else self.real.to(device)
        self.device, self._table = device, None

    def get_seq_length(self) -> int:
        """Tokens seen so far (padding included), held or not."""
        return self.prompt_width + self.appended

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are made for the tokens after the prompt only; of the prompt, what is held is visible."""
        if not self.is_initialized:
            return query_length, 0
        return self.appended + query_length, self.prompt_width

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Empties the layer, which is then ready for another prompt."""
        self._clear()

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can undo any call: where it was announced."""
        return self.record_past

    def activate_past_recording(self) -> None:
        """Announces calls that `crop` shall undo: what leaves a sliding window in a call goes at the next one."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens, which must have come after the prompt."""
        count = abs(tokens_to_remove)
        if count == 0:
            return
        if count > self.appended or (self.is_sliding and not self.record_past):
            raise RunError(
                f"cannot take back {count} tokens from a compressed cache: only the {self.appended} tokens after the "
                "prompt can be, and with sliding windows none; use plain greedy search, sampling or beam search"
            )
        for group in self.groups:
            group.keep_entries(slice(None, -count))
            if self.is_sliding:
                group.positions = group.positions[:, :-count].clone()
        self.appended -= count
        if self.real is not None:
            self.real = self.real[:, : self.appended]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes sequence ``i`` a copy of the present sequence ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times."""
        self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, in that order; an index may occur several times."""
        if not self.is_initialized:
            return
        sequences = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices.long()
        sequences = sequences.to(self.device)
        heads = torch.arange(self.num_kv_heads, device=self.device)
        rows = (sequences[:, None] * self.num_kv_heads + heads).flatten()
        selected = (group.select(rows) for group in self.groups)
        self.groups = [group for group in selected if group is not None]
        order = sequences.tolist()
        self.prompt_lengths = [self.prompt_lengths[sequence] for sequence in order]
        if self.budgets.ndim == 2:
            self.budgets = self.budgets[order]
        if self.real is not None:
            self.real = self.real[sequences.to(self.real.device)]

    def copy(self, layers: list[CompressedLayer], context: LayerContext | None) -> CompressedLayer:
        """A layer that holds the same, in the same memory until either grows.

        Args:
            layers: those of its cache, in order; the caller adds this one to them.
            context: where it is in the model.
        """
        twin = copy.copy(self)
        twin.groups = [group.copy() for group in self.groups]
        twin.context = context
        twin._table = None
        return twin

    @classmethod
    def merge(cls, layers: list[CompressedLayer], room: int = 0) -> CompressedLayer:
        """The sequences of several layers, right after their prompts, in one, with `room` for that many new tokens.

        Long rows stay where they are, so the other layers must not be used any more.
        """
        first = layers[0]
        budgets = np.concatenate([np.broadcast_to(x.budgets, (x.batch, x.num_kv_heads)) for x in layers])
        merged = cls(budgets, first.selector, first.sliding_window)
        merged.dtype, merged.device = first.dtype, first.device
        by_count: dict[int, list[RowGroup]] = defaultdict(list)
        offset = 0
        for layer in layers:
            for group in layer.groups:
                by_count[group.keys.shape[1]].append(replace(group, rows=group.rows + offset))
            offset += layer.batch * layer.num_kv_heads
            merged.prompt_lengths += layer.prompt_lengths
        for count, groups in sorted(by_count.items()):
            merged.groups += groups if count > _LONG else [RowGroup.join(groups, room)]
        merged.prompt_width = max(layer.prompt_width for layer in layers)
        merged.is_initialized = True
        return merged

    # Attention.

    # A compiled model runs this, and the cache's `update`, as they are: their state is in Python objects, and grows.
    @torch.compiler.disable
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
        """Attention of the new tokens to what the layer holds and to themselves; then stores them."""
        if self.drafted:
            return self._attend_drafted(own, module, query, key, value, mask, **kwargs)
        if not self.is_initialized:
            output = own(module, query, key, value, mask, **kwargs)
            prompt = PromptAttention(
                query,
                key,
                value,
                scaling_of(query, kwargs),
                kwargs.get("softcap"),
                self.sliding_window,
                layer=self.context,
                sinks=sinks_of(kwargs),
            )
            self.store_prompt(prompt, padding_of(mask))
            if self.context is not None:
                self.context.leave()
            return output
        self._note_columns(self._real_columns(mask, key.shape[2]), key.shape[2])
        return self._decode(own, module, query, key, value, mask, **kwargs)

    def _attend_drafted(
        self,
        own: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """A prompt and drafted tokens in one call, with the result of a call for each."""
        at, self.drafted = key.shape[2] - self.drafted, 0
        masks = (mask, mask)
        if mask is not None:
            masks = (mask[:, :at], mask) if mask.ndim == 2 else (mask[..., :at, :at], mask[..., at:, :])
        outputs = []
        for where, part in zip((slice(None, at), slice(at, None)), masks, strict=True):
            output, _ = self.attend(
                own, module, query[:, :, where], key[:, :, where], value[:, :, where], part, **kwargs
            )
            outputs.append(output)
        return torch.cat(outputs, dim=1), None

    def store_prompt(self, prompt: PromptAttention, padding: Tensor | None) -> None:
        """Keeps of a prompt what the budgets allow.

        Args:
            prompt: the layer's attention inputs for the (padded) prompts.
            padding: ``[batch, tokens]``, True for real tokens; None where there is no padding.
        """
        # Which entries are kept has no gradient; what they hold may have one.
        if padding is None or bool(padding.all()):
            with torch.no_grad():
                ranking = self._rank(prompt)
            self._store(prompt.key, prompt.value, ranking)
        else:
            real = [row.nonzero()[:, 0] for row in padding.to(prompt.key.device)]
            with torch.no_grad():
                rankings = [self._rank(one_sequence(prompt, i, tokens)) for i, tokens in enumerate(real)]
            self._store_padded(prompt.key, prompt.value, rankings, real)

    def store_ranked(self, key: Tensor, value: Tensor, rankings: Tensor, room: int = 0) -> None:
        """Keeps one prompt several times, once for each row of `budgets`, ``[batch, kv_heads]``.

        Args:
            key: ``[1, kv_heads, tokens, head_dim]``.
            value: ``[1, kv_heads, tokens, value_dim]``.
            rankings: token positions from the first to be kept on, ``[batch, kv_heads, tokens]``.
            room: new tokens to reserve memory for.
        """
        self.lazy_initialization(key, value)
        batch = len(self.budgets)
        self._store(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), rankings, room)

    def _rank(self, prompt: PromptAttention) -> Tensor | None:
        """The selector's ranking ``[batch, kv_heads, tokens]``, or None where every token is kept anyway."""
        covered = int(self.budgets.min()) >= prompt.num_tokens and not self._outgrows_window(prompt.num_tokens)
        # A layer that keeps everything may still have to tell the others what to keep.
        if covered and not self.selector.looks_at_other_layers:
            return None
        return self.selector.rank(prompt)

    def _outgrows_window(self, tokens: int) -> bool:
        return self.sliding_window is not None and tokens > self.sliding_window

    def _counts(self, lengths: list[int]) -> np.ndarray:
        """Entries that each row keeps, ``[batch * kv_heads]``."""
        if self.budgets.ndim == 2 and len(self.budgets) != len(lengths):
            raise UsageError(
                f"the cache has budgets for {len(self.budgets)} sequences, but this prompt has {len(lengths)}; make a "
                "new cache"
            )
        limit = np.array(lengths)[:, None]
        if self.sliding_window is not None:
            limit = np.minimum(limit, self.sliding_window)
        return np.minimum(np.broadcast_to(self.budgets, (len(lengths), self.num_kv_heads)), limit).reshape(-1)

    def _store(self, key: Tensor, value: Tensor, ranking: Tensor | None, room: int = 0) -> None:
        batch, heads, width, _ = key.shape
        for count, rows in group_rows(self._counts([width] * batch)):
            row = torch.from_numpy(rows).to(key.device)
            sequence, head = row // heads, row % heads
            if ranking is None:
                kept = torch.arange(count, device=key.device).expand(len(row), -1)
            else:
                kept = ranking[sequence, head, :count].sort(dim=-1).values
            where = (sequence[:, None], head[:, None], kept)
            self.groups.append(RowGroup.cut(row, key, value, where, kept.to(torch.int32), room))
        self.prompt_lengths, self.prompt_width, self.is_initialized = [width] * batch, width, True

    def _store_padded(self, key: Tensor, value: Tensor, rankings: list[Tensor | None], real: list[Tensor]) -> None:
        heads, width = key.shape[1:3]
        lengths = [len(tokens) for tokens in real]
        for count, rows in group_rows(self._counts(lengths)):
            row = torch.from_numpy(rows).to(key.device)
            sequence, head = row // heads, row % heads
            kept, tokens = [], []
            for i, j in zip(sequence.tolist(), head.tolist(), strict=True):
                ranking = rankings[i]
                kept.append(
                    torch.arange(count, device=key.device) if ranking is None else ranking[0, j, :count].sort().values
                )
                tokens.append(real[i][kept[-1]])
            where = (sequence[:, None], head[:, None], torch.stack(tokens))
            self.groups.append(RowGroup.cut(row, key, value, where, torch.stack(kept).to(torch.int32), room=0))
        self.prompt_lengths, self.prompt_width, self.is_initialized = lengths, width, True

    def _decode(
        self,
        own: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch, _, new, _ = key.shape
        if self.record_past:
            self._drop_out_of_window()
        visible = self._visible_columns(mask, batch, new)
        key_rows, value_rows = key.flatten(0, 1), value.flatten(0, 1)
        dense = self._is_dense(batch)
        kernels = None if dense or new > 1 else _kernels(query)
        if not (kernels and self._suits_kernels(query, key, value, kwargs) and hides_nothing(mask, visible)):
            kernels = None
        order = None if dense or kernels else self._row_order()
        if kernels:
            for group in self.groups:
                group.extend(new)
        else:
            by_group = (self._by_group(rows, order) for rows in (key_rows, value_rows))
            for group, keys, values in zip(self.groups, *by_group, strict=True):
                group.append(keys, values)
        self.appended += new
        if self.sliding_window is not None:
            self._record_positions(new)

        everything = visible is None and not self._window_may_hide()
        output: tuple[Tensor, Tensor | None]
        if kernels:
            output = self._attend_rows(kernels, query, key_rows[:, 0], value_rows[:, 0], kwargs), None
        elif everything and order is None and not _folding_is_equal(own, kwargs):
            output = self._attend_dense(own, module, query, kwargs)
        else:
            output = self._attend_groups(module, query, order, visible, kwargs), None
        if not self.record_past:
            self._drop_out_of_window()
        return output

    def _real_columns(self, mask: Any, new: int) -> Tensor | None:
        """Which of a call's tokens are real, ``[batch, new]``; None where all are."""
        padding = padding_of(mask) if new > 1 else None
        if padding is None:
            return None
        columns = padding[:, -new:].bool()
        return None if bool(columns.all()) else columns

    def _visible_columns(self, mask: Any, batch: int, new: int) -> Tensor | None:
        """Which columns after the prompt each new token sees, ``[batch or 1, 1, new, columns]``; None for all."""
        columns = self.appended + new
        if self.sliding_window is not None and self.real is not None and was_padding(mask):
            # The mask counts padding between turns as tokens, so that a token leaves the window too early.
            earlier = torch.ones(new, columns, dtype=torch.bool, device=self.device).tril(self.appended)
            return self.real[:, None, None] & earlier
        return boolean_mask(mask, batch, new, columns, self.device)

    def _note_columns(self, real: Tensor | None, new: int) -> None:
        if real is None and self.real is None:
            return
        before = self.real if self.real is not None else torch.ones(self.batch, self.appended, dtype=torch.bool)
        now = torch.ones(self.batch, new, dtype=torch.bool) if real is None else real
        self.real = torch.cat([before.to(self.device), now.to(self.device)], dim=1)

    def _row_order(self) -> RowOrder:
        rows = [group.rows for group in self.groups]
        return torch.cat(rows), [part.shape[0] for part in rows]

    def _suits_kernels(self, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the kernels compute all of it: in one number format that they know, and without a gradient."""
        held = [part for group in self.groups for part in (group.keys, group.values)]
        parts = [query, key, value, *held]
        alike = all(part.dtype == query.dtype for part in parts) and query.dtype in _KERNEL_DTYPES
        sinks = sinks_of(kwargs)
        asked = [*parts, sinks] if sinks is not None else parts
        gradient = torch.is_grad_enabled() and any(part.requires_grad for part in asked)
        return alike and not gradient and extra_term(kwargs) is None

    def _attend_rows(
        self, kernels: ModuleType, query: Tensor, new_keys: Tensor, new_values: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """One new token that sees everything but what left the window: all rows at once, each at its length.

        Args:
            kernels: `evolkv.cache.kernels`, which also write the new entries, for which all groups have been extended.
            query: ``[batch, heads, 1, head_dim]``.
            new_keys: ``[rows, head_dim]``.
            new_values: ``[rows, value_dim]``.
            kwargs: what the model says of its attention.
        """
        batch, heads, _, head_dim = query.shape
        if self._table is None:
            self._table = kernels.RowTable()
        table, since, aligned = self._table.of(self.groups)
        output: Tensor = kernels.decode(
            query.reshape(batch * self.num_kv_heads, heads // self.num_kv_heads, head_dim).contiguous(),
            new_keys.contiguous(),
            new_values.contiguous(),
            table,
            since,
            max(group.keys.shape[1] for group in self.groups),
            aligned=aligned,
            kv_heads=self.num_kv_heads,
            scaling=scaling_of(query, kwargs),
            softcap=kwargs.get("softcap"),
            window=self.sliding_window if self._window_may_hide() else None,
            sinks=sinks_of(kwargs),
        )
        return output.reshape(batch, 1, heads, -1)

    def _is_dense(self, batch: int) -> bool:
        return len(self.groups) == 1 and self.groups[0].rows.shape[0] == batch * self.num_kv_heads

    @staticmethod
    def _by_group(values: Tensor, order: RowOrder | None) -> Sequence[Tensor]:
        """Each group's share of ``[rows, ...]``, gathered at once."""
        if order is None:
            return (values,)
        rows, sizes = order
        return values.index_select(0, rows).split_with_sizes(sizes)

    def _positions_since(self) -> Tensor:
        """Positions of all columns after the prompt, ``[batch, appended]`` int32, -1 for padding."""
        start = torch.tensor(self.prompt_lengths, device=self.device)[:, None]
        if self.real is None:
            return (start + torch.arange(self.appended, device=self.device)).to(torch.int32)
        places = start + self.real.cumsum(dim=1) - 1
        return places.where(self.real, -1).to(torch.int32)

    def _record_positions(self, new: int) -> None:
        since = self._positions_since()[:, self.appended - new :]
        for group in self.groups:
            group.positions = torch.cat([group.positions, since[group.rows // self.num_kv_heads]], dim=1)

    def _window_may_hide(self) -> bool:
        return self.sliding_window is not None and max(self.prompt_lengths) + self.appended > self.sliding_window

    def _drop_out_of_window(self) -> None:
        if self.sliding_window is None:
            return
        if self.real is None:
            for group in self.groups:
                surplus = group.keys.shape[1] - self.sliding_window
                if surplus > 0:
                    group.drop_oldest(surplus)
            return
        seen = torch.tensor(self.prompt_lengths, device=self.device) + self.real.sum(dim=1)
        for group in self.groups:
            # Padding takes no token's place in the window, and the rows of a group stay equally long.
            outside = group.positions < (seen - self.sliding_window)[group.rows // self.num_kv_heads, None]
            surplus = int(outside.cumprod(dim=1).sum(dim=1).min())
            if surplus > 0:
                group.drop_oldest(surplus)

    def _attend_dense(
        self, own: Attention, module: nn.Module, query: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """One new token that sees everything held, all rows at once, by the model's own attention."""
        group, shape = self.groups[0], (query.shape[0], self.num_kv_heads)
        key, value = group.keys.unflatten(0, shape), group.values.unflatten(0, shape)
        return own(module, query, key, value, None, **kwargs)

    def _attend_groups(
        self, module: nn.Module, query: Tensor, order: RowOrder | None, visible: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """Group by group, without padding any row to another's length."""
        check_plain_logits(module, kwargs)
        batch, query_heads, queries, head_dim = query.shape
        heads = self.num_kv_heads
        fold = query_heads // heads
        rows = query.reshape(batch * heads, fold * queries, head_dim)
        scaling, softcap = scaling_of(query, kwargs), kwargs.get("softcap")
        sinks = fold_sinks(sinks_of(kwargs), heads, queries)
        attended = []
        for group, asking in zip(self.groups, self._by_group(rows, order), strict=True):
            shown = self._visible_to_group(group, queries, visible)
            if shown is not None and queries > 1:
                shown = shown.repeat(1, fold, 1)
            sunk = None if sinks is None else sinks[group.rows % heads]
            attended.append(attention(asking, group.keys, group.values, shown, scaling, softcap, sunk))
        if order is None:
            output = attended[0]
        else:
            in_order = torch.cat(attended)
            output = torch.empty_like(in_order)
            output[order[0]] = in_order
        if queries == 1:
            return output.reshape(batch, 1, query_heads, -1)
        # [batch * kv_heads, fold * queries, dim] -> [batch, queries, heads, dim]
        return output.reshape(batch, query_heads, queries, -1).transpose(1, 2).contiguous()

    def _visible_to_group(self, group: RowGroup, queries: int, visible: Tensor | None) -> Tensor | None:
        """Which entries each query of a group sees, ``[group, queries, entries]``; None for all."""
        entries = group.keys.shape[1]
        shown: Tensor | None = None
        if visible is not None:
            sequences = group.rows // self.num_kv_heads if visible.shape[0] > 1 else torch.zeros_like(group.rows)
            newest = visible[sequences, 0][..., -entries:]
            held = entries - newest.shape[-1]
            shown = torch.cat([newest.new_ones((*newest.shape[:2], held)), newest], dim=-1)
        if self._window_may_hide():
            assert self.sliding_window is not None
            # The newest tokens' positions stand last in every row.
            asking = group.positions[:, -queries:, None]
            inside = group.positions[:, None] > asking - self.sliding_window
            shown = inside if shown is None else shown & inside
        if shown is None or self.real is None:
            return shown
        # Padding that sees nothing would come out as no number, and spoil what it is multiplied with.
        return shown | ~shown.any(dim=-1, keepdim=True)


def _kernels(query: Tensor) -> ModuleType | None:
    """The Triton kernels, where they are wanted: on a GPU, or in Triton's interpreter, which is for tests."""
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


def _folding_is_equal(own: Attention, kwargs: dict[str, Any]) -> bool:
    """Whether a dense layer may be attended to like any group instead of by the model's own attention.

    That gives what sdpa gives, which for one query reads every key once for each of its query heads on a CPU.
    """
    return own is sdpa_attention_forward and extra_term(kwargs) is None and not kwargs.get("dropout")


def one_sequence(prompt: PromptAttention, index: int, tokens: Tensor) -> PromptAttention:
    """One sequence of a padded batch, cut down to its real tokens."""
    at = slice(index, index + 1)
    return replace(
        prompt,
        query=prompt.query[at, :, tokens],
        key=prompt.key[at, :, tokens],
        value=prompt.value[at, :, tokens],
        layer=None if prompt.layer is None else prompt.layer.of_sequence(index),
    )
