"""All groups of layers of a step at once, on CPUs.

vLLM keeps a block table for each group, and fills, copies and describes one after the other: Python for each group, in
every step. Here the tables of all groups are one tensor, and what is the same for all is computed once for all.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.block_table import MultiGroupBlockTable

from evolkv_vllm.builder import prompt_rows
from evolkv_vllm.spec import EvolKVSpec
from evolkv_vllm.step import Step


def take_over(runner: Any) -> None:
    """Let a runner do all groups of a step at once, where they are several and all have budgets.

    Args:
        runner: one of vLLM's model runners, whose memory for keys and values is there.
    """
    groups = runner.kv_cache_config.kv_cache_groups
    if (
        runner.device.type == "cpu"
        and len(groups) > 1
        and all(isinstance(group.kv_cache_spec, EvolKVSpec) for group in groups)
        and all(len(each) == 1 for each in runner.attn_groups)
        and not isinstance(runner.input_batch.block_table, GroupTables)
    ):
        AllGroups(runner)


class GroupTables(MultiGroupBlockTable):
    """The block tables and slots of all groups; vLLM's own tables become views of them.

    Args:
        plain: vLLM's tables, which have the same shape for all groups; changed.
    """

    def __init__(self, plain: MultiGroupBlockTable):
        self.block_tables = plain.block_tables
        self.block_size = int(self.block_tables[0].block_size)
        #: Blocks, ``[groups, requests, blocks]``.
        self.blocks = torch.stack([table.block_table.cpu for table in self.block_tables])
        #: Slots of new tokens, ``[groups, tokens]``.
        self.slots = torch.stack([table.slot_mapping.cpu for table in self.block_tables])
        for table, blocks, slots in zip(self.block_tables, self.blocks, self.slots, strict=True):
            _share(table.block_table, blocks)
            _share(table.slot_mapping, slots)

    def commit_block_table(self, num_reqs: int) -> None:
        """Do nothing, because on a CPU the device's copy is the host's."""

    def compute_slot_mapping(self, num_reqs: int, query_start_loc: Tensor, positions: Tensor) -> None:
        """Fill the slots of new tokens.

        Args:
            num_reqs: requests.
            query_start_loc: the first token of each request, and the end, ``[requests + 1]``.
            positions: of the tokens, ``[tokens]``.
        """
        self.fill_slots(torch.repeat_interleave(query_start_loc.diff(), output_size=len(positions)), positions)

    def fill_slots(self, requests: Tensor, at: Tensor) -> None:
        """Fill the slots of new tokens.

        Args:
            requests: the request of each, ``[tokens]``.
            at: the place of each among its request's slots, ``[tokens]`` or ``[groups, tokens]``.
        """
        groups, _, width = self.blocks.shape
        where = (requests * width + at // self.block_size).expand(groups, -1)
        found = self.blocks.view(groups, -1).gather(1, where)
        self.slots[:, : len(requests)] = found.long() * self.block_size + at % self.block_size


class AllGroups:
    """Builds the metadata of all groups from what vLLM's runner prepares for the first.

    Args:
        runner: vLLM's model runner; from now on it uses this.
    """

    def __init__(self, runner: Any):
        self._runner, self._config = runner, runner.kv_cache_config
        groups = self._config.kv_cache_groups
        self._first = copy.copy(self._config)
        self._first.kv_cache_groups = groups[:1]
        self._specs = [group.kv_cache_spec for group in groups]
        self._classes = np.array([spec.part_class for spec in self._specs])
        #: Each layer's name and group.
        self._layers = [(name, number) for number, group in enumerate(groups) for name in group.layer_names]
        self._builders = [each[0].get_metadata_builder(0) for each in runner.attn_groups]
        self._tables = GroupTables(runner.input_batch.block_table)
        #: The tables and lengths that attention reads: without what prompts gave back.
        self._blocks = torch.zeros_like(self._tables.blocks)
        self._lengths = torch.zeros(self._blocks.shape[:2], dtype=torch.int32)
        #: What the latest step was shifted by: a key, the columns of the tables that it took, and tokens.
        self._shift: tuple[Any, Tensor, Tensor] | None = None
        #: Of the latest step, by group; and what it was built of, if it was a token for each of so many requests.
        self._built: list[Any] = []
        self._decoded: tuple[Any, ...] = ()
        #: The latest views of each group's part of a tensor, with the tensor and their length.
        self._views: dict[str, tuple[Tensor, int, Sequence[Tensor]]] = {}
        self._build_first = runner._build_attention_metadata
        runner.input_batch.block_table = self._tables
        runner._get_slot_mappings = self.slot_mappings
        runner._build_attention_metadata = self.metadata
        self._builders[0].all_groups = self

    def slot_mappings(
        self,
        num_tokens_padded: int,
        num_reqs_padded: int,
        num_tokens_unpadded: int,
        ubatch_slices: Any = None,
    ) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """Return the slots of new tokens by group and by layer, ``[tokens]`` each; see vLLM's own."""
        if num_tokens_padded > num_tokens_unpadded:
            self._tables.slots[:, num_tokens_unpadded:num_tokens_padded] = -1
        rows = self._by_group("slots", self._tables.slots, num_tokens_padded)
        return dict(enumerate(rows)), {name: rows[group] for name, group in self._layers}

    def metadata(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """Return the metadata by layer, and what draft tokens need; see vLLM's own."""
        # What vLLM does for each group, it does for the first alone.
        self._runner.kv_cache_config = self._first
        try:
            _, drafts = self._build_first(*args, **kwargs)
        finally:
            self._runner.kv_cache_config = self._config
        return {name: self._built[group] for name, group in self._layers}, drafts

    def build(self, common: Any) -> Any:
        """Build the metadata of all groups, and return that of the first.

        Args:
            common: vLLM's `CommonAttentionMetadata` of the first group.
        """
        number, tables = common.num_reqs, self._tables
        step = Step.of(common, self._specs[0].rule, tables.block_size)
        evicted = step.evicted[self._classes]
        gaps = evicted % tables.block_size
        if gaps.any():
            requests = torch.from_numpy(step.requests)
            tables.fill_slots(requests, common.positions[: len(requests)] - torch.from_numpy(gaps)[:, requests])
        left = step.lengths - evicted
        blocks = self._shifted(evicted, common.seq_lens, int(left.max()))
        views = (
            self._by_group("blocks", blocks, number),
            self._by_group("lengths", self._lengths, number),
            self._by_group("slots", tables.slots, len(common.slot_mapping)),
        )
        longest = left.max(axis=1).tolist()
        one_each = common.num_actual_tokens == number and common.max_query_len == 1 and not step.reading
        before, self._decoded = self._decoded, (*views, common.causal) if one_each else ()
        if before and one_each and all(map(operator.is_, before, self._decoded)):
            for builder, made, most in zip(self._builders, self._built, longest, strict=True):
                builder.lengthen(made, common.query_start_loc, most)
            return self._built[0]
        own = copy.copy(common)
        self._built = []
        parts = zip(self._builders, self._specs, *views, longest, strict=True)
        for builder, spec, table, lengths, slots, most in parts:
            own.block_table_tensor, own.seq_lens, own.slot_mapping, own.max_seq_len = table, lengths, slots, most
            made = builder.build_plain(own)
            made.prompt_rows = prompt_rows(table, step, spec) if step.reading else []
            self._built.append(made)
        return self._built[0]

    def _by_group(self, name: str, tensor: Tensor, number: int) -> Sequence[Tensor]:
        """Return the first rows of each group's part of a tensor; mostly those of the step before."""
        found = self._views.get(name)
        if found is None or found[0] is not tensor or found[1] != number:
            found = self._views[name] = tensor, number, tensor[:, :number].unbind(0)
        return found[2]

    def _shifted(self, evicted: np.ndarray, lengths: Tensor, longest: int) -> Tensor:
        """Return the tables that begin some blocks later, ``[groups, requests, blocks]``; note the lengths, too."""
        number, most = evicted.shape[1], self._blocks.shape[2]
        width = min(most, -(-longest // self._tables.block_size))
        key = evicted.tobytes(), width
        if self._shift is None or self._shift[0] != key:
            # The same from step to step as long as the same requests write.
            tokens = torch.from_numpy(evicted)
            where = torch.arange(width) + tokens[..., None] // self._tables.block_size
            self._shift = key, where.clamp_(max=most - 1), tokens.int()
        _, where, tokens = self._shift
        self._blocks[:, :number, :width] = self._tables.blocks[:, :number].gather(2, where)
        torch.sub(lengths[:number], tokens, out=self._lengths[:, :number])
        return self._blocks


def _share(buffer: Any, tensor: Tensor) -> None:
    """Let one of vLLM's pairs of buffers, for the host and for the device, be one view of a tensor."""
    buffer.cpu = buffer.gpu = tensor
    buffer.np = tensor.numpy()
