"""Compress one layer's prompt where it lies: rank its entries, and move what is kept into the prompt's last slots."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from evolkv.errors import ModelError, RunError
from evolkv.models.rotary import Rotary
from evolkv.selectors import LayerContext, PromptAttention, Selector
from evolkv_vllm.builder import PromptRow


class Storage(Protocol):
    """The layout of keys and values in an attention backend's blocks."""

    def read(self, kv_cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of some blocks, ``[kv_heads, blocks * block_size, head_dim]`` each."""

    def write(self, kv_cache: Tensor, blocks: Tensor, key: Tensor, value: Tensor) -> None:
        """Fill some blocks that stand in a row, from the first slot on.

        Args:
            kv_cache: the layer's.
            blocks: ``[blocks]``.
            key: ``[kv_heads, blocks * block_size or fewer, head_dim]``, from the first slot of the first block on.
            value: likewise.
        """


@dataclass(frozen=True)
class Part:
    """The new entries of a step in a layer, or in one KV head of it that has blocks of its own.

    Attributes:
        rows: the prompts that are read; the same ones for all parts of a layer.
        query: of the whole batch, ``[tokens, heads, head_dim]``.
        kv_cache: the part's, with the keys and values of this step.
        storage: how the backend lays them out.
    """

    rows: list[PromptRow]
    query: Tensor
    kv_cache: Tensor
    storage: Storage


class Compactor:
    """Compresses the prompts of one layer.

    Args:
        selector: ranks the entries.
        layer: number of the layer among those with keys and values.
        num_layers: how many of these there are.
        scaling: factor on the attention logits.
        softcap: cap on the attention logits, or None.
        sinks: logits of attention sinks, ``[heads]``, or None.
        remembered: how many prompts may be in the middle of being read.
        parts: 1; or the layer's KV heads, if each has blocks of its own.
    """

    def __init__(
        self,
        selector: Selector,
        layer: int,
        num_layers: int,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        remembered: int = 256,
        parts: int = 1,
    ):
        self.selector, self.layer, self.num_layers = selector, layer, num_layers
        self.scaling, self.softcap, self.sinks = scaling, softcap, sinks
        self._remembered, self._number = remembered, parts
        #: Those of the present step that have come, by their number.
        self._parts: dict[int, Part] = {}
        #: The observed queries so far of prompts that are read in chunks, ``[queries, heads, head_dim]`` by `key`.
        self._queries: OrderedDict[int, Tensor] = OrderedDict()

    def run(self, part: Part, number: int = 0) -> None:
        """Compress the prompts that end in this step, and note the observed queries of the others.

        A selector looks at a whole layer. So nothing happens before the last of the layer's parts has come.

        Args:
            part: what the step brought.
            number: of the part in the layer.
        """
        self._parts[number] = part
        if len(self._parts) < self._number:
            return
        parts = [self._parts[each] for each in range(self._number)]
        self._parts = {}
        query = _joined([each.query for each in parts], 1)
        for rows in zip(*(each.rows for each in parts), strict=True):
            observed = self._observed(rows[0], query)
            if rows[0].blocks is not None:
                self._compress(rows, observed, parts)

    def _observed(self, row: PromptRow, query: Tensor) -> Tensor:
        """Return the observed queries of a prompt so far, ``[queries, heads, head_dim]``."""
        first = max(0, row.prompt - (self.selector.observed_queries or 0))
        skipped = max(0, first - row.computed)
        queries = query[row.start + skipped : row.start + row.count]
        if row.computed > first:
            earlier = self._queries.get(row.key)
            if earlier is None or len(earlier) != row.computed - first:
                raise RunError(
                    f"EvolKV: {0 if earlier is None else len(earlier)} queries are there of the "
                    f"{row.computed - first} that were computed before; vLLM read a prompt's end in another order"
                )
            queries = torch.cat([earlier, queries])
        self._queries.pop(row.key, None)
        if row.blocks is None:
            # A copy, because vLLM uses the memory again.
            self._queries[row.key] = queries.clone()
            # Requests that were aborted on the way leave theirs behind.
            while len(self._queries) > self._remembered:
                self._queries.popitem(last=False)
        return queries

    def _compress(self, rows: tuple[PromptRow, ...], queries: Tensor, parts: list[Part]) -> None:
        """Compress one prompt.

        Args:
            rows: the prompt, as each part has it.
            queries: the observed ones, ``[queries, heads, head_dim]``.
            parts: of the layer.
        """
        row, held = rows[0], []
        for each, part in zip(rows, parts, strict=True):
            assert each.blocks is not None
            held.append(part.storage.read(part.kv_cache, each.blocks))
        key, value = (_joined(states, 0)[:, : row.prompt] for states in zip(*held, strict=True))
        prompt = PromptAttention(
            query=queries.transpose(0, 1)[None],
            key=key[None],
            value=value[None],
            scaling=self.scaling,
            softcap=self.softcap,
            sinks=self.sinks,
            first_query=row.prompt - len(queries),
            layer=LayerContext(self.layer, _no_rotary, row.memory, last=self.layer == self.num_layers - 1),
        )
        kept = self.kept(prompt, [each.prompt - each.evicted for each in rows])
        states = zip(key.chunk(len(parts)), value.chunk(len(parts)), strict=True)
        for each, part, positions, (keys, values) in zip(rows, parts, kept, states, strict=True):
            if each.evicted and each.blocks is not None:
                index = positions[..., None].expand(-1, -1, keys.shape[-1])
                blocks = each.blocks[each.evicted // storage_block_size(part.kv_cache) :]
                part.storage.write(part.kv_cache, blocks, keys.gather(1, index), values.gather(1, index))

    def kept(self, prompt: PromptAttention, entries: list[int]) -> list[Tensor]:
        """Return the positions that the KV heads keep, ascending, ``[kv_heads of the part, entries]`` by part.

        Args:
            prompt: of one sequence.
            entries: that each part keeps.
        """
        ranking = self.selector.rank(prompt)
        if prompt.layer is not None:
            prompt.layer.leave()
        parts = ranking[0].chunk(len(entries))
        return [part[:, :number].sort(dim=-1).values for part, number in zip(parts, entries, strict=True)]


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Return tensors as one, without a copy if there is only one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def storage_block_size(kv_cache: Tensor) -> int:
    """Return the tokens of a block of a layer's keys and values, ``[blocks, kv_heads, tokens, 2 * head_dim]``."""
    return int(kv_cache.shape[2])


def _no_rotary() -> Rotary:
    raise ModelError("this selector needs the model's rotary embedding, which vLLM does not show; use 'snapkv'")


def compactor_of(
    layer: Any, selector: Selector, number: int, num_layers: int, requests: int, parts: int = 1
) -> Compactor:
    """Return the compactor of one of vLLM's attention layers.

    Args:
        layer: vLLM's `Attention`, with all KV heads.
        selector: ranks the entries.
        number: number of the layer among those with keys and values.
        num_layers: how many of these there are.
        requests: most requests that vLLM runs at once.
        parts: as for `Compactor`.
    """
    implementation = layer.impl
    return Compactor(
        selector,
        number,
        num_layers,
        scaling=float(implementation.scale),
        # 0 stands for none in vLLM.
        softcap=getattr(implementation, "logits_soft_cap", None) or None,
        sinks=getattr(implementation, "sinks", None),
        remembered=4 * requests,
        parts=parts,
    )
