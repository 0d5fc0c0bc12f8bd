"""Compress one layer's prompt where it lies: rank its entries, and move what is kept into the prompt's last slots."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Protocol

import torch
from torch import Tensor

from evolkv.errors import ModelError, RunError
from evolkv.models.rotary import Rotary
from evolkv.selectors import LayerContext, PromptAttention, Selector
from evolkv_vllm.builder import PromptRow


class Storage(Protocol):
    """How an attention backend lays out keys and values in its blocks."""

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
    ):
        self.selector, self.layer, self.num_layers = selector, layer, num_layers
        self.scaling, self.softcap, self.sinks = scaling, softcap, sinks
        self._remembered = remembered
        #: The observed queries so far of prompts that are read in chunks, ``[queries, heads, head_dim]`` by `key`.
        self._queries: OrderedDict[int, Tensor] = OrderedDict()

    def run(self, rows: list[PromptRow], query: Tensor, kv_cache: Tensor, storage: Storage) -> None:
        """Compress the prompts that end in this step, and note the observed queries of the others.

        Args:
            rows: the prompts that are read.
            query: of the whole batch, ``[tokens, heads, head_dim]``.
            kv_cache: the layer's, with the keys and values of this step.
            storage: how the backend lays them out.
        """
        for row in rows:
            observed = self._observed(row, query)
            if row.blocks is not None:
                self._compress(row, row.blocks, observed, kv_cache, storage)

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

    def _compress(self, row: PromptRow, blocks: Tensor, queries: Tensor, kv_cache: Tensor, storage: Storage) -> None:
        key, value = storage.read(kv_cache, blocks)
        key, value = key[:, : row.prompt], value[:, : row.prompt]
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
        kept = self.kept(prompt, row.prompt - row.evicted)
        if row.evicted:
            index = kept[..., None].expand(-1, -1, key.shape[-1])
            first = row.evicted // storage_block_size(kv_cache)
            storage.write(kv_cache, blocks[first:], key.gather(1, index), value.gather(1, index))

    def kept(self, prompt: PromptAttention, entries: int) -> Tensor:
        """Return the positions that each KV head keeps, ascending, ``[kv_heads, entries]``."""
        ranking = self.selector.rank(prompt)
        if prompt.layer is not None:
            prompt.layer.leave()
        return ranking[0, :, :entries].sort(dim=-1).values


def storage_block_size(kv_cache: Tensor) -> int:
    """Return the tokens of a block of a layer's keys and values, ``[blocks, kv_heads, tokens, 2 * head_dim]``."""
    return int(kv_cache.shape[2])


def _no_rotary() -> Rotary:
    raise ModelError("this selector needs the model's rotary embedding, which vLLM does not show; use 'snapkv'")


def compactor_of(layer: Any, selector: Selector, number: int, num_layers: int, requests: int) -> Compactor:
    """Return the compactor of one of vLLM's attention layers.

    Args:
        layer: vLLM's `Attention`.
        selector: ranks the entries.
        number: number of the layer among those with keys and values.
        num_layers: how many of these there are.
        requests: most requests that vLLM runs at once.
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
    )
