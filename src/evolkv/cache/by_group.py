"""Layers whose single new tokens attend to each group of rows in a way of its own."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from evolkv.cache.attend import attend_groups, visible_in_group
from evolkv.cache.hook import Attention
from evolkv.cache.layer import CompressedLayer
from evolkv.cache.masks import hides_nothing
from evolkv.cache.math import LogitTerms, attention, check_plain_logits
from evolkv.cache.rows import RowGroup


class ByGroupLayer(CompressedLayer):
    """A layer where a new token that comes alone attends to each group of rows in a way of its own.

    A subclass says how a row is read (`_way_of`), and reads a group so (`_attend_group`). A call of several tokens
    reads everything that is held.
    """

    def _clear(self) -> None:
        super()._clear()
        #: Of each group how its rows are read; None where they are read whole.
        self._ways: list[Any] = []
        self._ways_of: object = None

    @abstractmethod
    def _way_of(self, row: int, group: RowGroup) -> Any:
        """Return how a row of a group is read, something that can be hashed; None for whole."""

    @abstractmethod
    def _attend_group(self, number: int, query: Tensor, visible: Tensor | None, terms: LogitTerms) -> Tensor:
        """Return the attention of one new token of each row of a group that is not read whole; see `attention`."""

    def _attend_own_way(self, number: int, query: Tensor, visible: Tensor | None, terms: LogitTerms) -> Tensor:
        if self._ways[number] is not None:
            return self._attend_group(number, query, visible, terms)
        group = self.groups[number]
        return attention(query, group.keys, group.values, visible, terms)

    def _decode(
        self, own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        batch, heads, new, _ = key.shape
        if new > 1 or all(way is None for _, way in self._read_ways()):
            return super()._decode(own, module, query, key, value, mask, **kwargs)
        check_plain_logits(module, kwargs)
        visible = None if mask is None and self.real is None else self._visible_columns(mask, batch, new)
        if self.real is None and hides_nothing(mask, visible):
            visible = None
        order = self._row_order()
        self._append(key, value, order)
        shown = None
        if visible is not None:
            shown = [
                visible_in_group(group, 1, visible, heads, None, padded=self.real is not None) for group in self.groups
            ]
        return attend_groups(query, self.groups, order, shown, heads, kwargs, self._attend_own_way), None

    def _read_ways(self) -> list[tuple[RowGroup, Any]]:
        """Return each group and how it is read; groups are taken apart so that all rows of one are read alike."""
        if self._ways_of is not self._mark:
            # Asked once: on a GPU each look at row numbers would wait for it.
            parts = [part for group in self.groups for part in self._alike(group)]
            self.groups = [group for group, _ in parts]
            self._ways_of = self._mark
            self._ways = [way for _, way in parts]
        return [*zip(self.groups, self._ways, strict=True)]

    def _alike(self, group: RowGroup) -> list[tuple[RowGroup, Any]]:
        """Return the rows of a group and how they are read, those apart that are read in different ways."""
        if self.is_sliding:
            return [(group, None)]
        slots: dict[Any, list[int]] = {}
        for slot, row in enumerate(group.rows.tolist()):
            slots.setdefault(self._way_of(row, group), []).append(slot)
        if len(slots) == 1:
            return [(group, next(iter(slots)))]
        return [
            (RowGroup(group.rows[which], group.keys[which], group.values[which], group.positions[which]), way)
            for way, which in slots.items()
        ]
