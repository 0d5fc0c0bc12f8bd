"""Attention metadata for a group of layers: its block table without the blocks that its prompts gave back.

A request's new tokens keep their slots and positions. What its prompt keeps fills the prompt's last slots. So attention
reads a shorter sequence that begins some blocks later, and any kernel that reads paged keys and values can do that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport

from evolkv.errors import RunError
from evolkv_vllm.spec import EvolKVSpec
from evolkv_vllm.step import Step


@dataclass(frozen=True)
class PromptRow:
    """A prompt, or a chunk of one, that a group of layers reads in a step.

    Attributes:
        start: its first row in the batch's queries.
        count: its queries of the prompt.
        computed: tokens of the prompt that were read before.
        prompt: length of the prompt.
        evicted: entries that the layers do without once it has been read.
        key: a block that belongs to this request alone, as a name for it from chunk to chunk.
        blocks: the prompt's blocks, ``[blocks]`` int64; None unless this is the last chunk.
        memory: what selectors remember of the request from layer to layer.
    """

    start: int
    count: int
    computed: int
    prompt: int
    evicted: int
    key: int
    blocks: Tensor | None
    memory: dict[Any, Any]


class BudgetBuilder:
    """The common part of all attention backends' builders; goes before vLLM's builder among the bases of a class."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Return which batches a CUDA graph may hold: none with prompts, because nothing is compressed in a graph."""
        plain = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        if isinstance(kv_cache_spec, EvolKVSpec):
            return min(plain, AttentionCGSupport.UNIFORM_BATCH, key=lambda each: each.value)
        return plain

    # The tables of two groups differ in more than their blocks, so one group's metadata cannot be made from another's.
    supports_update_block_table = False

    kv_cache_spec: Any
    device: torch.device

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], config: Any, device: torch.device, **kwargs: Any):
        super().__init__(kv_cache_spec, layer_names, config, device, **kwargs)  # type: ignore[call-arg]
        self._table: Tensor | None = None
        self._lengths = torch.zeros(0)
        #: What the latest step was shifted by: a key, the columns of the table that it took, and tokens.
        self._shift: tuple[Any, Tensor, Tensor] | None = None
        self._most_requests = int(config.scheduler_config.max_num_seqs)
        if not isinstance(kv_cache_spec, EvolKVSpec):
            return
        if config.model_config.rswa_window is None:
            raise RunError("EvolKV: vLLM would not say how long the prompts are; this version cannot be used")
        if kv_cache_spec.block_size != kv_cache_spec.pool_block_size:
            raise RunError(
                f"EvolKV: the attention kernel takes blocks of {kv_cache_spec.block_size} tokens, but the pool has "
                f"{kv_cache_spec.pool_block_size}; set --block-size {kv_cache_spec.block_size}"
            )

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Return vLLM's metadata for what the layers of the group still hold."""
        common = common_attn_metadata
        plain = super().build  # type: ignore[misc]
        if not isinstance(self.kv_cache_spec, EvolKVSpec):
            if common.rswa_prefix_lens is not None:
                common = common.replace(rswa_prefix_lens=None)
            return plain(common_prefix_len, common, fast_build)
        spec = self.kv_cache_spec
        step = Step.of(common, spec.rule, spec.block_size)
        evicted = step.evicted[spec.part_class]
        rows = prompt_rows(common.block_table_tensor, step, spec)
        if evicted.any() or self.device.type != "cpu":
            move_slots(common, step, evicted % spec.block_size, spec.block_size)
            common = self._shifted(common, step, evicted, spec.block_size)
        else:
            common = common.replace(rswa_prefix_lens=None)
        metadata = plain(common_prefix_len, common, fast_build)
        metadata.prompt_rows = rows
        return metadata

    def _shifted(self, common: Any, step: Step, evicted: np.ndarray, block_size: int) -> Any:
        """Return the metadata of sequences that begin some blocks later.

        Table and lengths are in buffers that stay where they are, because a CUDA graph that was captured reads them
        again in later steps.
        """
        number, table = common.num_reqs, common.block_table_tensor
        if self._table is None or self._table.shape[1] != table.shape[1]:
            rows = max(self._most_requests, number)
            self._table = torch.zeros((rows, table.shape[1]), dtype=table.dtype, device=table.device)
            self._lengths = torch.zeros(rows, dtype=common.seq_lens.dtype, device=table.device)
        left = step.lengths - evicted
        longest = int(left.max())
        # On a CPU only the columns that are read; a graph may read all.
        width = table.shape[1] if table.device.type != "cpu" else min(table.shape[1], -(-longest // block_size))
        key = evicted.tobytes(), width
        if self._shift is None or self._shift[0] != key:
            # The same from step to step as long as the same requests write.
            shift = torch.from_numpy(evicted).to(table.device, non_blocking=True)
            columns = torch.arange(width, device=table.device)
            where = (columns + shift[:, None] // block_size).clamp_(max=table.shape[1] - 1)
            self._shift = key, where, shift.to(common.seq_lens.dtype)
        _, where, tokens = self._shift
        self._table[:number, :width] = table[:number].gather(1, where)
        torch.sub(common.seq_lens[:number], tokens, out=self._lengths[:number])
        return common.replace(
            block_table_tensor=self._table[:number],
            seq_lens=self._lengths[:number],
            seq_lens_cpu_upper_bound=torch.from_numpy(left.astype(np.int32)),
            max_seq_len=longest if evicted.any() else common.max_seq_len,
            rswa_prefix_lens=None,
            _num_computed_tokens_cache=None,
        )


def prompt_rows(tables: Tensor, step: Step, spec: EvolKVSpec) -> list[PromptRow]:
    """Return the prompts of which this step computes queries that a selector looks at, or the end.

    Args:
        tables: blocks of each request, ``[requests, blocks]``.
        step: what is computed.
        spec: of the group of layers.

    Raises:
        RunError: a chunk runs past the end of a prompt that is to be compressed.
    """
    selector = spec.rule.selector
    # A selector that looks at no query still ranks at the end, which is where the last one is.
    observed = max(1, selector.observed_queries or 0)
    everywhere = selector.looks_at_other_layers or spec.rule.heads > 1
    found, columns = [], []
    for request in step.reading:
        # What keeps everything may have to tell others what to keep: a selector looks at all heads of a layer.
        wanted = step.to_evict[:, request] if everywhere else step.to_evict[spec.part_class, request]
        prompt = int(step.prompts[request])
        if wanted.any() and step.lengths[request] > prompt - observed:
            found.append(request)
            # The first block with an observed query: no other request shares it, and it is there from the first such
            # query on.
            columns.append(min(prompt - 1, max(0, prompt - observed)) // spec.block_size)
    if not found:
        return []
    rows = []
    # All keys in one copy, because the host waits for the device here.
    for request, key in zip(found, tables[found, columns].tolist(), strict=True):
        prompt, length = int(step.prompts[request]), int(step.lengths[request])
        if key == 0:
            # vLLM's placeholder: a rehearsal, of which nothing is kept.
            continue
        if length > prompt:
            raise RunError("EvolKV: vLLM reads past the end of a prompt in one chunk; this version cannot be used")
        rows.append(
            PromptRow(
                start=int(step.starts[request]),
                count=length - int(step.computed[request]),
                computed=int(step.computed[request]),
                prompt=prompt,
                evicted=int(step.to_evict[spec.part_class, request]),
                key=key,
                blocks=tables[request, : -(-prompt // spec.block_size)].long() if length >= prompt else None,
                memory=step.memories.setdefault(request, {}),
            )
        )
    return rows


def move_slots(common: Any, step: Step, gaps: np.ndarray, block_size: int) -> None:
    """Let new tokens be written behind an exact budget's entries, which end before the prompt's last slot.

    Args:
        common: vLLM's `CommonAttentionMetadata`; its slots are changed where they are, because what writes keys and
            values has them, too.
        step: what is computed.
        gaps: slots that each request's tokens move towards the front, ``[requests]``.
        block_size: tokens of a block.
    """
    if not gaps.any():
        return
    table = common.block_table_tensor
    requests = torch.from_numpy(step.requests).to(table.device)
    at = common.positions[: len(requests)] - torch.from_numpy(gaps).to(table.device)[requests]
    slots = table[requests, at // block_size].long() * block_size + at % block_size
    common.slot_mapping[: len(requests)] = slots
