"""Layers that drop nothing, and choose anew after each turn what the tokens to come may read: RocketKV-MT.

Behnam et al. 2025, arXiv 2502.14051v3, section 3.6. See `evolkv.selectors.rocketkv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from evolkv.cache.hook import Attention
from evolkv.cache.layer import CompressedLayer
from evolkv.cache.masks import real_tokens
from evolkv.cache.reading import ReadingLayer
from evolkv.cache.rows import RowGroup, of_one_width, places_of
from evolkv.selectors import LayerContext
from evolkv.selectors.rocketkv import Reading


class MultiTurnLayer(ReadingLayer):
    """A layer that holds every token, and beside them a copy of those that generated tokens may read.

    Budgets say how many may be read. They are chosen among all tokens by the prompt's last queries, and anew by those
    of each later call of several tokens, which reads everything itself. What is generated since may be read, too.
    """

    unsaved = (
        "the cache chooses what may be read anew after each turn, and a file cannot say what is chosen now; use "
        "selector 'rocketkv', or read the text again"
    )
    #: What may be read, as if all tokens up to the last choice were its prompt; None in layers with a sliding window.
    readable: ReadingLayer | None

    def _clear(self) -> None:
        super()._clear()
        self.readable = None

    def copy(self, layers: list[CompressedLayer], context: LayerContext | None) -> Self:
        """See `CompressedLayer.copy`."""
        twin = super().copy(layers, context)
        if self.readable is not None:
            twin.readable = self.readable.copy([], context)
        return twin

    @classmethod
    def merge(cls, layers: Sequence[Self], room: int = 0) -> Self:
        """See `CompressedLayer.merge`."""
        merged = super().merge(layers, room)
        if readable := [layer.readable for layer in layers if layer.readable is not None]:
            merged.readable = ReadingLayer.merge(readable, room)
        return merged

    def move(self, device: torch.device) -> None:
        """See `CompressedLayer.move`."""
        super().move(device)
        if self.readable is not None:
            self.readable.move(device)

    def check_crop(self, count: int) -> None:
        """See `CompressedLayer.check_crop`; tokens of a turn cannot be taken back."""
        if self.readable is not None:
            self.readable.check_crop(count)
        super().check_crop(count)

    def crop(self, tokens_to_remove: int) -> None:
        """See `CompressedLayer.crop`."""
        if self.readable is not None:
            self.readable.crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `CompressedLayer.batch_select_indices`."""
        super().batch_select_indices(indices)
        if self.readable is not None:
            self.readable.batch_select_indices(indices)

    def note_padding(self, real: Tensor) -> None:
        """See `CompressedLayer.note_padding`."""
        super().note_padding(real)
        if self.readable is not None:
            self.readable.note_padding(real[:, real.shape[1] - self.readable.appended :])

    @property
    def kv_bytes(self) -> int:
        """Return the bytes of all keys and values, of the copies that may be read, and of their extremes."""
        return super().kv_bytes + (0 if self.readable is None else self.readable.kv_bytes)

    def bytes_by_row(self) -> tuple[Tensor, Tensor]:
        """See `CompressedLayer.bytes_by_row`."""
        held, read = super().bytes_by_row()
        if self.readable is None:
            return held, read
        copied, read = self.readable.bytes_by_row()
        return held + copied, read

    def _way_of(self, row: int, group: RowGroup) -> Reading | None:
        return None

    def _store(
        self, key: Tensor, value: Tensor, rankings: Sequence[Tensor | None], real: Any = None, room: int = 0
    ) -> None:
        """Hold prompts whole, and choose what may be read of them."""
        if not self.is_sliding:
            self._choose(key, value, rankings, real, room)
            rankings = [None] * len(key)
        super()._store(key, value, rankings, real, room)

    def _counts(self, lengths: list[int]) -> np.ndarray:
        """Return the entries that each row holds: all that its window leaves."""
        return np.minimum(lengths, self.sliding_window or max(lengths)).repeat(self.num_kv_heads)

    def _decode(
        self, own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.readable is not None and key.shape[2] == 1:
            self._append(key, value, self._row_order())
            return self.readable.attend(own, module, query, key, value, mask, **kwargs)
        output = super()._decode(own, module, query, key, value, mask, **kwargs)
        if self.readable is not None:
            with torch.no_grad():
                self._choose_again(query, kwargs)
        return output

    def _choose(self, key: Tensor, value: Tensor, rankings: Sequence[Tensor | None], real: Any, room: int = 0) -> None:
        """Copy what may be read from now on; see `CompressedLayer._store`."""
        self.readable = ReadingLayer(self.budgets, self.selector, None, self.context)
        self.readable.by_length = self.by_length
        self.readable.lazy_initialization(key, value)
        self.readable._store(key, value, rankings, real, room)

    def _choose_again(self, query: Tensor, kwargs: dict[str, Any]) -> None:
        """Choose among all tokens by the queries of a call, ``[batch, heads, new, head_dim]``."""
        # Shorter prompts were padded in front, or are as if they had been.
        held = of_one_width(places_of(self.groups), self.get_seq_length())
        key, value, _ = (part.unflatten(0, (self.batch, self.num_kv_heads)) for part in held)
        prompt = self.inputs(query, key, value, kwargs)
        real = real_tokens(self.real_tokens(), key)
        if real is None:
            self._choose(key, value, self.selector.rank(prompt).split(1), None)
        else:
            self._choose(key, value, [self.selector.rank(one) for one in prompt.sequences(real)], real)
