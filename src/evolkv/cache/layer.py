"""One layer of the compressed cache: rows that each hold their own entries and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from evolkv.cache.attend import (
    attend_as_model,
    attend_groups,
    attend_in_turn,
    attend_with_kernels,
    folding_is_equal,
    suits_kernels,
    triton_kernels,
    visible_in_group,
)
from evolkv.cache.hook import AttendingLayer, Attention
from evolkv.cache.masks import boolean_mask, hides_nothing, padding_of, real_columns, real_tokens, was_padding
from evolkv.cache.math import check_plain_logits
from evolkv.cache.rows import RowGroup, RowOrder, cut_rows, join_groups, later_positions, rows_of
from evolkv.errors import ModelError, RunError, UsageError
from evolkv.selectors import LayerContext, PromptAttention, Selector


class CompressedLayer(AttendingLayer):
    """A cache layer that keeps, of each prompt, a set number of entries per KV head, and every later token.

    Before the prompt the layer is empty; the first forward call is the prompt, which attends to all of itself and
    is then cut down. `attend` is called by the attention hook.

    Args:
        budgets: entries to keep, ``[kv_heads]`` for every sequence alike, or ``[batch, kv_heads]``.
        selector: decides which entries.
        sliding_window: how many tokens a query of this layer sees, or None for all. Such a layer keeps
            ``min(budget, sliding_window)`` of the last `sliding_window` tokens, and never more than the window.
        context: where the layer is in a model, for selectors that need to know.

    Attributes:
        num_kv_heads: KV heads of the layer.
    """

    #: Whether a prompt that is `awaiting` has its queries.
    keeps_queries = False
    #: The reason why no file can hold the layer's cache, as an error says it; None where one can.
    unsaved: str | None = None
    #: Where budgets depend on the length of the text: those of a text of so many tokens, ``[kv_heads]``.
    by_length: Callable[[int], np.ndarray] | None = None

    def __init__(
        self,
        budgets: np.ndarray,
        selector: Selector,
        sliding_window: int | None = None,
        context: LayerContext | None = None,
    ):
        super().__init__(sliding_window)
        self.context = context
        self.budgets = np.asarray(budgets, dtype=np.int64)
        self.num_kv_heads = int(self.budgets.shape[-1])
        self.selector = selector
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.groups = []
        #: Real tokens of each sequence's prompt.
        self.prompt_lengths: list[int] = []
        self.prompt_width = 0
        self.appended = 0
        #: Tokens at the end of the first call that come after the prompt: drafts of assisted decoding.
        self.drafted = 0
        #: A prompt that is stored when the model has read it again, and its padding.
        self.awaiting: tuple[PromptAttention, Tensor | None] | None = None
        #: Which columns after the prompt are real tokens, ``[batch, appended]``; None where all are. Replaced, never
        #: written to: copies of the layer share it.
        self.real: Tensor | None = None
        self.record_past = False
        #: Where the rows lie, for the kernels: a `RowTable`.
        self._table: Any = None
        #: The order of the rows, and the mark of the groups that it is of.
        self._order: RowOrder | None = None
        self._ordered: object = None

    @property
    def groups(self) -> list[RowGroup]:
        """Return the rows held; those of a group have one length."""
        return self._groups

    @groups.setter
    def groups(self, groups: list[RowGroup]) -> None:
        # What is known of the groups is known by this mark: by the groups themselves, they would outlive their time.
        self._groups, self._mark = groups, object()

    @property
    def batch(self) -> int:
        """Return how many sequences are held."""
        return len(self.prompt_lengths)

    @property
    def kv_bytes(self) -> int:
        """Return the bytes of the keys and values held."""
        return sum(group.nbytes for group in self.groups)

    def bytes_by_row(self) -> tuple[Tensor, Tensor]:
        """Return the bytes that each row holds, without spare room, and that a new token reads of it, ``[rows]``."""
        return (rows_of(self.groups, [group.keys[0].nbytes + group.values[0].nbytes for group in self.groups]),) * 2

    def kept_positions(self, sequence: int, head: int) -> Tensor:
        """Return the prompt positions held for one row, ascending, ``[entries]`` int64."""
        row = sequence * self.num_kv_heads + head
        for group in self.groups:
            for positions in group.positions[group.rows == row].long():
                return positions[(positions >= 0) & (positions < self.prompt_lengths[sequence])]
        return torch.empty(0, dtype=torch.long)

    def real_tokens(self) -> Tensor:
        """Return which tokens seen are no padding, ``[batch, tokens]``, as if prompts were padded in front."""
        padding = self.prompt_width - torch.tensor(self.prompt_lengths, device=self.device)
        real = torch.arange(self.get_seq_length(), device=self.device) >= padding[:, None]
        if self.real is not None:
            real[:, self.prompt_width :] = self.real
        return real

    def note_padding(self, real: Tensor) -> None:
        """Note which tokens after the prompt, ``[batch, appended]``, are real; those known as padding stay padding."""
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
        """Hand the new keys on to attention, which calls `attend`; entries are stored there."""
        if key_states.shape[1] != self.num_kv_heads:
            raise ModelError(
                f"a layer brings keys of {key_states.shape[1]} KV heads where its model's config says "
                f"{self.num_kv_heads}; EvolKV needs the number that the config says, the same in every layer"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif len(key_states) != len(self.prompt_lengths):
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
        return self.send(key_states, value_states)

    def move(self, device: torch.device) -> None:
        """Hold everything on another device."""
        self.groups = [group.to(device) for group in self.groups]
        self.real = None if self.real is None else self.real.to(device)
        self.device, self._table = device, None

    def get_seq_length(self) -> int:
        """Return the tokens seen so far (padding included), held or not."""
        return self.prompt_width + self.appended

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return sizes for the tokens after the prompt only; of the prompt, what is held is visible."""
        if not self.is_initialized:
            return query_length, 0
        return self.appended + query_length, self.prompt_width

    @property
    def is_of_one_text(self) -> bool:
        """Return whether budgets were laid out for the texts held, and nothing says how to do it for others."""
        return self.by_length is None and self.budgets.ndim == 2

    def reset(self) -> None:
        """Empty the layer, which is then ready for another prompt."""
        self._clear()

    @property
    def is_croppable(self) -> bool:
        """Return whether `crop` can undo any call: where it was announced."""
        return self.record_past

    def activate_past_recording(self) -> None:
        """Announce calls that `crop` shall undo: what leaves a sliding window in a call goes at the next one."""
        self.record_past = True

    def check_crop(self, count: int) -> None:
        """Check that `crop` can take back so many tokens.

        Raises:
            RunError: if it cannot.
        """
        if count > self.appended or (self.is_sliding and not self.record_past):
            raise RunError(
                f"cannot take back {count} tokens from a compressed cache: only the {self.appended} tokens after the "
                "prompt can be, and with sliding windows none; use plain greedy search, sampling or beam search"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, which must have come after the prompt; see `check_crop`."""
        count = abs(tokens_to_remove)
        if count == 0:
            return
        self.check_crop(count)
        for group in self.groups:
            group.keep_entries(slice(None, -count))
            if self.is_sliding:
                group.positions = group.positions[:, :-count].clone()
        self.appended -= count
        if self.real is not None:
            self.real = self.real[:, : self.appended]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these numbers, in that order; a number may occur several times."""
        if not self.is_initialized:
            return
        sequences = indices.long().to(self.device)
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

    def copy(self, layers: list[CompressedLayer], context: LayerContext | None) -> Self:
        """Return a layer that holds the same, in the same memory until either grows.

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
    def merge(cls, layers: Sequence[Self], room: int = 0) -> Self:
        """Return one layer with the sequences of several, right after their prompts, and `room` for new tokens.

        Long rows stay where they are, so the other layers must not be used any more.
        """
        first = layers[0]
        budgets = np.concatenate([np.broadcast_to(x.budgets, (x.batch, x.num_kv_heads)) for x in layers])
        merged = cls(budgets, first.selector, first.sliding_window)
        merged.dtype, merged.device = first.dtype, first.device
        offset, groups = 0, []
        for layer in layers:
            groups += [replace(group, rows=group.rows + offset) for group in layer.groups]
            offset += layer.batch * layer.num_kv_heads
            merged.prompt_lengths += layer.prompt_lengths
        merged.groups = join_groups(groups, room)
        merged.prompt_width = max(layer.prompt_width for layer in layers)
        merged.is_initialized = True
        return merged

    def attend(
        self, own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention of the new tokens to what the layer holds and to themselves, and store them."""
        if self.drafted:
            ends, self.drafted = [key.shape[2] - self.drafted, key.shape[2]], 0
            return attend_in_turn(partial(self.attend, own, module, **kwargs), ends, query, key, value, mask)
        if not self.is_initialized:
            output = own(module, query, key, value, mask, **kwargs)
            prompt = self.inputs(query, key, value, kwargs)
            if self.selector.rereads:
                self.awaiting = (prompt if self.keeps_queries else prompt.without_queries()), padding_of(mask)
            else:
                self.store_prompt(prompt, padding_of(mask))
            if self.context is not None:
                self.context.leave()
            return output
        if mask is not None or self.real is not None:
            self._note_columns(real_columns(mask, key), key.shape[2])
        return self._decode(own, module, query, key, value, mask, **kwargs)

    def store_prompt(self, prompt: PromptAttention, padding: Tensor | None) -> None:
        """Keep of a prompt what the budgets allow.

        Args:
            prompt: the layer's attention inputs for the (padded) prompts.
            padding: ``[batch, tokens]``, True for real tokens; None where there is no padding.
        """
        real = real_tokens(padding, prompt.key)
        # Which entries are kept has no gradient; what they hold may have one.
        with torch.no_grad():
            if real is None:
                ranking = self._rank(prompt)
                rankings = [None] * len(prompt.key) if ranking is None else ranking.split(1)
            else:
                rankings = [self._rank(one) for one in prompt.sequences(real)]
        self._store(prompt.key, prompt.value, rankings, real)

    def store_ranked(self, key: Tensor, value: Tensor, rankings: Tensor, room: int = 0) -> None:
        """Keep one prompt several times, once for each row of `budgets`, ``[batch, kv_heads]``.

        Args:
            key: ``[1, kv_heads, tokens, head_dim]``.
            value: ``[1, kv_heads, tokens, value_dim]``.
            rankings: token positions from the first to be kept on, ``[batch, kv_heads, tokens]``.
            room: new tokens to reserve memory for.
        """
        self.lazy_initialization(key, value)
        batch = len(self.budgets)
        self._store(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), rankings.split(1), room=room)

    def _rank(self, prompt: PromptAttention) -> Tensor | None:
        """Return the selector's ranking ``[batch, kv_heads, tokens]``, or None where every token is kept anyway."""
        # A layer that keeps everything may still have to tell the others what to keep.
        if self.covers(prompt.num_tokens) and not self.selector.looks_at_other_layers:
            return None
        return self.selector.rank(prompt)

    def covers(self, tokens: int) -> bool:
        """Return whether every token of a prompt is kept anyway."""
        budgets = self.budgets if self.by_length is None else self.by_length(tokens)
        least = int(self.selector.held_under(budgets).min())
        return min(least, self.sliding_window or tokens) >= tokens

    def _lay_out(self, lengths: list[int]) -> None:
        if self.by_length is not None:
            self.budgets = np.stack([*map(self.by_length, lengths)])

    def _counts(self, lengths: list[int]) -> np.ndarray:
        """Return the entries that each row keeps, ``[batch * kv_heads]``."""
        self._lay_out(lengths)
        if self.budgets.ndim == 2 and len(self.budgets) != len(lengths):
            raise UsageError(
                f"the cache has budgets for {len(self.budgets)} sequences, but this prompt has {len(lengths)}; make a "
                "new cache"
            )
        limit = np.array(lengths)[:, None]
        if self.sliding_window is not None:
            limit = np.minimum(limit, self.sliding_window)
        held = np.broadcast_to(self.selector.held_under(self.budgets), (len(lengths), self.num_kv_heads))
        return np.minimum(held, limit).reshape(-1)

    def _store(
        self, key: Tensor, value: Tensor, rankings: Sequence[Tensor | None], real: Any = None, room: int = 0
    ) -> None:
        """Keep of prompts what the budgets allow; see `cut_rows`."""
        width = key.shape[2]
        lengths = [width] * len(key) if real is None else [len(tokens) for tokens in real]
        self.groups = cut_rows(key, value, self._counts(lengths), rankings, real, room)
        self.prompt_lengths, self.prompt_width, self.is_initialized = lengths, width, True

    def _decode(
        self, own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        batch, heads, new, _ = key.shape
        if self.record_past:
            self._drop_out_of_window()
        # With one new token and no mask everything is visible.
        visible = None if mask is None and new == 1 and self.real is None else self._visible_columns(mask, batch, new)
        order = self._row_order()
        kernels = None if order is None or new > 1 else triton_kernels(query)
        if kernels and not (suits_kernels(self.groups, (query, key, value), kwargs) and hides_nothing(mask, visible)):
            kernels = None
        if kernels:
            for group in self.groups:
                group.extend(new)
            self.appended += new
        else:
            self._append(key, value, order)
        window = self.sliding_window
        if window is not None:
            self._record_positions(new)
            # A window that is longer than the text hides nothing.
            window = window if max(self.prompt_lengths) + self.appended > window else None

        weights = None
        if kernels:
            self._table = self._table or kernels.RowTable()
            newest = (key.flatten(0, 1)[:, 0], value.flatten(0, 1)[:, 0])
            output = attend_with_kernels(kernels, self._table, query, newest, self.groups, heads, window, kwargs)
        elif visible is None and window is None and order is None and not folding_is_equal(own, kwargs):
            output, weights = attend_as_model(own, module, query, self.groups[0], heads, kwargs)
        else:
            check_plain_logits(module, kwargs)
            shown = None
            if visible is not None or window is not None:
                shown = [
                    visible_in_group(group, query.shape[2], visible, heads, window, padded=self.real is not None)
                    for group in self.groups
                ]
            output = attend_groups(query, self.groups, order, shown, heads, kwargs)
        if not self.record_past:
            self._drop_out_of_window()
        return output, weights

    def _append(self, key: Tensor, value: Tensor, order: RowOrder | None) -> None:
        """Hold new tokens, ``[batch, kv_heads, new, dim]``; `order` is that of the rows."""
        rows = key.flatten(0, 1), value.flatten(0, 1)
        if order is None:
            self.groups[0].append(*rows)
        else:
            for group, keys, values in zip(self.groups, *map(order.by_group, rows), strict=True):
                group.append(keys, values)
        self.appended += key.shape[2]

    def _visible_columns(self, mask: Any, batch: int, new: int) -> Tensor | None:
        """Return which columns after the prompt each new token sees, ``[batch or 1, 1, new, columns]``; None: all."""
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

    def _row_order(self) -> RowOrder | None:
        if self._ordered is not self._mark:
            self._ordered, self._order = self._mark, RowOrder.of(self.groups)
        return self._order

    def _positions_since(self) -> Tensor:
        """Return the positions of all columns after the prompt, ``[batch, appended]`` int32, -1 for padding."""
        return later_positions(torch.tensor(self.prompt_lengths, device=self.device), self.appended, self.real)

    def _record_positions(self, new: int) -> None:
        since = self._positions_since()[:, self.appended - new :]
        for group in self.groups:
            group.positions = torch.cat([group.positions, since[group.rows // self.num_kv_heads]], dim=1)

    def _drop_out_of_window(self) -> None:
        if self.sliding_window is None:
            return
        oldest = None
        if self.real is not None:
            seen = torch.tensor(self.prompt_lengths, device=self.device) + self.real.sum(dim=1)
            oldest = seen - self.sliding_window
        for group in self.groups:
            before = None if oldest is None else oldest[group.rows // self.num_kv_heads]
            group.leave_window(self.sliding_window, before)
