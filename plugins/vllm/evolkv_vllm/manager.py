"""The scheduler's side: which blocks of a group are freed, hashed for the prefix cache, and found again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from evolkv.errors import RunError
from evolkv_vllm.spec import EvolKVSpec

#: Tokens in the prompt of the request whose prefix is being looked up. vLLM's look-up hands on only hashes, and those
#: of a request that was preempted are of its answer, too.
_LOOKED_UP: ContextVar[int | None] = ContextVar("evolkv_prompt_tokens", default=None)


@contextlib.contextmanager
def looking_up(prompt_tokens: int) -> Iterator[None]:
    """Say how long the prompt is whose prefix is looked up within the block."""
    token = _LOOKED_UP.set(prompt_tokens)
    try:
        yield
    finally:
        _LOOKED_UP.reset(token)


def keep_answers_out(coordinator: Any) -> None:
    """Let the prefix cache of a server with budgets hold no answer to a prompt that was compressed, in any group.

    Layers that keep the whole prompt got the answer's keys and values from layers that do not. A prompt that holds the
    answer is read without such losses.

    Args:
        coordinator: vLLM's `KVCacheCoordinator`; changed.
    """
    own = next((each for each in coordinator.single_type_managers if isinstance(each, EvolKVManager)), None)
    if own is None:
        return
    plain = coordinator.cache_blocks

    def cache_blocks(request: Request, num_computed_tokens: int) -> None:
        if own.any_evicts(request.num_prompt_tokens):
            num_computed_tokens = min(num_computed_tokens, request.num_prompt_tokens)
        plain(request, num_computed_tokens)

    coordinator.cache_blocks = cache_blocks


class EvolKVManager(FullAttentionManager):
    """The blocks of the layers of one group."""

    kv_cache_spec: EvolKVSpec

    def __init__(self, kv_cache_spec: EvolKVSpec, *args: Any, **kwargs: Any):
        super().__init__(kv_cache_spec, *args, **kwargs)
        if self.block_size != kv_cache_spec.pool_block_size:
            raise RunError(
                f"EvolKV: vLLM changed the block size of a layer from {kv_cache_spec.pool_block_size} to "
                f"{self.block_size} tokens; set --block-size {self.block_size}"
            )
        #: Requests whose prompts are compressed.
        self._compressed: set[str] = set()

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the head of a prompt once the workers have compressed it.

        Args:
            request_id: the request.
            processed_computed_tokens: tokens whose step has come back from the workers, so that nothing in flight
                reads what is freed.
            num_prompt_tokens: length of the prompt.
        """
        if request_id in self._compressed or num_prompt_tokens is None:
            return
        if processed_computed_tokens < num_prompt_tokens:
            return
        self._compressed.add(request_id)
        self._remove_blocks_in_range(request_id, 0, self.kv_cache_spec.dropped_blocks(num_prompt_tokens))

    def any_evicts(self, prompt_tokens: int) -> bool:
        """Return whether any group does without entries of a prompt of so many tokens."""
        return self.kv_cache_spec.rule.any_evicts(prompt_tokens, self.block_size)

    def is_compressed(self, request_id: str) -> bool:
        """Return whether the request's prompt is compressed, and what it gave back is free."""
        return request_id in self._compressed

    def has_more_to_hash(self, request: Request, num_tokens: int) -> bool:
        """Return whether so many tokens of a request, computed or about to be, fill a block that has no hash yet."""
        blocks = min(num_tokens, request.num_tokens) // self.block_size
        return blocks > self.num_cached_block.get(request.request_id, 0)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """Forget a request that has finished or is preempted, and return its blocks."""
        self._compressed.discard(request_id)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Let the prefix cache find the blocks that compression never writes to: those that it drops."""
        evicted = self.kv_cache_spec.evicted_tokens(request.num_prompt_tokens)
        if evicted:
            num_tokens = min(num_tokens, evicted // self.block_size * self.block_size)
        super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)

    @classmethod
    def find_longest_cache_hit(cls, block_hashes: Any, max_length: int, *args: Any, **kwargs: Any) -> Any:
        """Return the blocks of a prefix that are in the cache, never so many that compression would write to them."""
        spec: EvolKVSpec = kwargs["kv_cache_spec"]
        prompt_tokens = _LOOKED_UP.get()
        # Nobody said whose prefix it is, so none can be reused safely.
        limit = 0 if prompt_tokens is None else spec.reusable_tokens(prompt_tokens)
        if limit is not None:
            max_length = min(max_length, limit)
        return super().find_longest_cache_hit(block_hashes, max_length, *args, **kwargs)
