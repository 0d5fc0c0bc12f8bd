"""The line at start that says what the budgets come to."""

from __future__ import annotations

import logging
from typing import Any

from evolkv_vllm.manager import EvolKVManager
from evolkv_vllm.spec import EvolKVSpec

logger = logging.getLogger("vllm.evolkv")


def announce(manager: Any) -> None:
    """Log what the budgets come to at the model's length, where there are any.

    Args:
        manager: vLLM's `KVCacheManager`.
    """
    if any(isinstance(each, EvolKVManager) for each in manager.coordinator.single_type_managers):
        logger.info(description(manager.kv_cache_config, manager.max_model_len))


def description(config: Any, length: int) -> str:
    """Return one line: groups, blocks of a prompt of the model's length, and how many of these fit.

    A block here is one layer's, or one head's where budgets differ from head to head. Prompts fill their blocks while
    they are read, and give back what budgets drop then.

    Args:
        config: vLLM's `KVCacheConfig`.
        length: tokens of the prompt.
    """
    held, full, part = 0, 0, "layer"
    sizes = [len(group.layer_names) for group in config.kv_cache_groups]
    for group in config.kv_cache_groups:
        spec, layers = group.kv_cache_spec, len(group.layer_names)
        blocks = -(-length // spec.block_size)
        window = getattr(spec, "sliding_window", None)
        if window is not None:
            blocks = min(blocks, -(-window // spec.block_size) + 1)
        full += layers * blocks
        # A block of the pool has room for the largest group's layers, whichever group it goes to.
        held += max(sizes) * (blocks - (spec.dropped_blocks(length) if isinstance(spec, EvolKVSpec) else 0))
        if isinstance(spec, EvolKVSpec) and spec.rule.heads > 1:
            part = "head"
    pool = (config.num_blocks - 1) * max(sizes)
    few = sorted(set(sizes))
    groups = f"{len(sizes)} {'group' if len(sizes) == 1 else 'groups'} of {few[0]}"
    groups += f" to {few[-1]} {part}s" if len(few) > 1 else f" {part if few[0] == 1 else part + 's'}"
    return (
        f"EvolKV: {groups}; a prompt of {length:,} tokens holds {held:,} of its {full:,} one-{part} blocks once it is "
        f"read, so {pool // held:,} such prompts fit where {pool // full:,} did"
    )
