"""The scheduler's short cut: a token that has a slot in every group is not taken to each group.

A request's blocks keep their places, those that it gave back included. So its lists of blocks are equally long in all
groups, and one of them tells whether there is room.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks

from evolkv_vllm.manager import EvolKVManager


class _NoBlocks(KVCacheBlocks):
    """No new blocks of any group."""

    def get_block_ids(self, allow_none: bool = False, **kwargs: Any) -> Any:
        return None if allow_none else super().get_block_ids(**kwargs)


def shorten(manager: Any) -> None:
    """Let a manager take the short cut, where there are several groups and all have budgets.

    Args:
        manager: vLLM's `KVCacheManager`; changed.
    """
    managers = manager.coordinator.single_type_managers
    if len(managers) < 2 or not all(isinstance(each, EvolKVManager) for each in managers):
        return
    first, plain, longest = managers[0], manager.allocate_slots, manager.max_model_len
    nothing = manager.empty_kv_cache_blocks = _NoBlocks(manager.empty_kv_cache_blocks.blocks)

    @functools.lru_cache(maxsize=1 << 16)
    def hashes(prompt_tokens: int) -> bool:
        """Return whether answers to such prompts are hashed for the prefix cache."""
        return manager.enable_caching and not first.any_evicts(prompt_tokens)

    def allocate_slots(request: Any, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        if not args and kwargs.keys() <= {"num_lookahead_tokens"} and first.is_compressed(request.request_id):
            tokens = request.num_computed_tokens + num_new_tokens
            slots = len(first.req_to_blocks[request.request_id]) * first.block_size
            fits = min(tokens + kwargs.get("num_lookahead_tokens", 0), longest) <= slots
            if fits and not (hashes(request.num_prompt_tokens) and first.has_more_to_hash(request, tokens)):
                return nothing
        return plain(request, num_new_tokens, *args, **kwargs)

    manager.allocate_slots = allocate_slots
