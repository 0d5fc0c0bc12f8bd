"""The KV-cache spec of a layer with a budget, or of one KV head that has its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from evolkv_vllm.rule import BudgetRule


@dataclass(frozen=True, kw_only=True)
class EvolKVSpec(FullAttentionSpec):
    """Full attention while the prompt is read, and a budget of it afterwards.

    Layers with equal specs form a group with a block table of its own; vLLM does that by comparing specs.

    Attributes:
        rule: what the budgets come to.
        part_class: the class in `rule` that the layer, or the head, belongs to.
        pool_block_size: tokens of a block in vLLM's pool, to notice a kernel that wants smaller ones.
    """

    rule: BudgetRule
    part_class: int
    pool_block_size: int

    @classmethod
    def of_layer(cls, plain: FullAttentionSpec, rule: BudgetRule, layer: int, head: int = 0) -> EvolKVSpec:
        """Return the spec of a layer, or of one KV head of it, from the one that it has without a budget.

        Args:
            plain: vLLM's own.
            rule: what the budgets come to.
            layer: number of the layer among those with keys and values.
            head: number of the KV head, where budgets differ from head to head.
        """
        own: dict[str, Any] = {field.name: getattr(plain, field.name) for field in fields(plain) if field.init}
        part_class = rule.classes[layer * rule.heads + head]
        return cls(**own, rule=rule, part_class=part_class, pool_block_size=plain.block_size)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Return the spec of a group, which is that of each of its layers.

        Raises:
            AssertionError: for specs that differ, which tells vLLM to give them different groups.
        """
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("different budgets need groups of their own")
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: Mapping[str, KVCacheSpec]) -> bool:
        """Return whether all layers can share one block table: where all have the same budgets."""
        return all(spec == self for spec in kv_cache_specs.values())

    def evicted_tokens(self, prompt_tokens: int) -> int:
        """Return how many entries of a prompt of so many tokens the layer, or the head, does without."""
        return int(self.rule.evicts(prompt_tokens, self.block_size)[self.part_class])

    def dropped_blocks(self, prompt_tokens: int) -> int:
        """Return how many blocks at the head of a prompt of so many tokens the layer, or the head, gives back."""
        return self.evicted_tokens(prompt_tokens) // self.block_size

    def reusable_tokens(self, prompt_tokens: int) -> int | None:
        """Return how many tokens of a prompt may come from the prefix cache; None for no limit.

        What is moved when the prompt is compressed lies behind the dropped blocks, so these slots must be the
        request's own. All queries that the selector looks at are computed, and a block at least, because a step that
        computes a few tokens looks like a step of decoding. A layer that keeps everything needs no limit, because vLLM
        takes no more from the cache than the layers with the lowest limit allow.
        """
        evicted = self.evicted_tokens(prompt_tokens)
        if not evicted:
            return None
        limit = prompt_tokens - max(self.block_size, self.rule.selector.observed_queries or 0)
        return max(0, min(limit, evicted // self.block_size * self.block_size))
