"""The ends of a prompt's chunks."""

from __future__ import annotations

from typing import Any

from evolkv_vllm.spec import EvolKVSpec


def end_of_chunk(scheduler: Any, request: Any, computed: int, number: int) -> int:
    """Return how many tokens of a request to compute in a step, at most `number`.

    A request that was preempted is read again with its answer so far. Its prompt has to be compressed in between, as
    it was before, because the answer was written by what the compressed prompt says.

    On a GPU a chunk with an observed query, and the last one, has more tokens than a step of decoding: vLLM replays a
    CUDA graph for a batch of such steps, and in a graph nothing is compressed and no query is noted. Where there is no
    room for so many, the request waits.

    Args:
        scheduler: vLLM's.
        request: vLLM's.
        computed: its tokens that are computed.
        number: how many vLLM would compute.
    """
    prompt = request.num_prompt_tokens
    if number <= 0 or computed >= prompt:
        return number
    specs = (group.kv_cache_spec for group in scheduler.kv_cache_config.kv_cache_groups)
    spec = next((spec for spec in specs if isinstance(spec, EvolKVSpec)), None)
    if spec is None or not spec.rule.any_evicts(prompt, spec.block_size):
        return number
    end = computed + number
    if end >= prompt:
        return prompt - computed
    if scheduler.vllm_config.device_config.device_type == "cpu":
        return number
    least = 2 + scheduler.num_spec_tokens
    number = min(end, prompt - least) - computed
    first = prompt - (spec.rule.selector.observed_queries or 0)
    return number if number >= least or 0 < number <= first - computed else 0
