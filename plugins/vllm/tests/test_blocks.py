"""The scheduler's blocks: freed exactly, shared safely, and all back in the end. No model is needed."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from evolkv.selectors import get_selector
from evolkv_vllm.chunks import end_of_chunk
from evolkv_vllm.hooks import install
from evolkv_vllm.rule import BudgetRule
from evolkv_vllm.spec import EvolKVSpec
from evolkv_vllm.startup import description
from test_settings import config_of as vllm_config_of
from tiny_model import write_tiny_model

install()
init_none_hash(sha256)
LENGTH = 4096


def rule_of(budgets, selector="snapkv:window=4"):
    return BudgetRule.fixed(np.array(budgets), get_selector(selector), [None] * len(budgets))


def config_of(rule, block_size, blocks=4000):
    """One group for each class of layers."""
    plain = FullAttentionSpec(block_size=block_size, num_kv_heads=2, head_size=8, dtype=torch.float32)
    groups = {}
    for layer in range(rule.num_layers):
        spec = EvolKVSpec.of_layer(plain, rule, layer)
        groups.setdefault(spec, []).append(f"layers.{layer}.attn")
    return KVCacheConfig(blocks, [], [KVCacheGroupSpec(names, spec) for spec, names in groups.items()])


def manager_of(rule, block_size, blocks=4000, caching=False):
    return KVCacheManager(config_of(rule, block_size, blocks), LENGTH, block_size, block_size, enable_caching=caching)


def request_of(name, prompt, block_size):
    parameters = SamplingParams(max_tokens=64)
    hasher = get_request_block_hasher(block_size, sha256)
    return Request(name, prompt, parameters, None, block_hasher=hasher)


def held(manager, request):
    """Blocks that a request holds, by group."""
    groups = manager.get_blocks(request.request_id).blocks
    return [sum(not block.is_null for block in group) for group in groups]


def read(manager, request, chunk=None):
    """Let a request's tokens be computed, as the scheduler does, and return how many came from the prefix cache."""
    blocks, found, _ = manager.get_computed_blocks(request)
    assert manager.allocate_slots(request, min(chunk or LENGTH, request.num_tokens - found), found, blocks) is not None
    request.num_computed_tokens = min(request.num_tokens, found + (chunk or LENGTH))
    while request.num_computed_tokens < request.num_tokens:
        number = min(chunk, request.num_tokens - request.num_computed_tokens)
        assert manager.allocate_slots(request, number) is not None
        request.num_computed_tokens += number
    return found


def decode(manager, request, tokens=1):
    for _ in range(tokens):
        request.append_output_token_ids(7)
        assert manager.allocate_slots(request, 1) is not None
        request.num_computed_tokens += 1


@settings(max_examples=200, deadline=None)
@given(
    budgets=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    prompt=st.integers(1, 700),
    block_size=st.sampled_from([16, 32, 64]),
    chunk=st.sampled_from([None, 1, 7, 500]),
    new=st.integers(1, 40),
)
def test_blocks_are_what_budgets_say(budgets, prompt, block_size, chunk, new):
    rule = rule_of(budgets)
    manager = manager_of(rule, block_size)
    free = manager.block_pool.get_num_free_blocks()
    request = request_of("a", list(range(prompt)), block_size)
    read(manager, request, chunk)
    whole = -(-prompt // block_size)
    assert held(manager, request) == [whole] * (max(rule.classes) + 1)
    decode(manager, request, new)
    # Of each layer the blocks of what it keeps, rounded so that it ends where the prompt ends, and of the new tokens.
    expected = [-(-(prompt + new) // block_size) - max(0, prompt - budget) // block_size for budget in budgets]
    by_layer = dict(zip(rule.classes, expected, strict=True))
    assert held(manager, request) == [by_layer[number] for number in sorted(by_layer)]
    manager.free(request)
    assert manager.block_pool.get_num_free_blocks() == free


def test_nothing_is_freed_before_the_workers_have_compressed():
    manager = manager_of(rule_of([40]), 32)
    request = request_of("a", list(range(320)), 32)
    read(manager, request)
    # The step with the prompt's end is still on its way.
    request.num_in_flight_tokens = 320
    decode(manager, request)
    assert held(manager, request) == [11]
    request.num_in_flight_tokens = 1
    decode(manager, request)
    assert held(manager, request) == [11 - (320 - 40) // 32]


@pytest.mark.parametrize("caching", [False, True])
def test_a_step_in_flight_reads_only_what_its_requests_still_hold(caching, tmp_path):
    """With asynchronous scheduling a step is laid out while the one before runs."""
    settings = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "enable_prefix_caching": caching, "block_size": 16}
    served = vllm_config_of(write_tiny_model(tmp_path), {"method": "snapkv:window=4", "budget": 40}, **settings)
    rule = rule_of([40, 100])
    config = config_of(rule, 16, blocks=48)
    served.cache_config.num_gpu_blocks = config.num_blocks
    scheduler = AsyncScheduler(served, config, StructuredOutputManager(served), 16)
    manager = scheduler.kv_cache_manager
    free = manager.block_pool.get_num_free_blocks()
    for number in range(12):
        prompt = [number % 3] * 30 + list(range(5 + 37 * number % 250))
        scheduler.add_request(request_of(str(number), prompt, 16))
    flying, compressed, preempted = deque(), 0, 0

    def read_by(name, number):
        """The blocks that a request reads of each group, in a step that computes some tokens."""
        request = scheduler.requests[name]
        written = request.num_computed_tokens - number >= request.num_prompt_tokens
        dropped = rule.evicts(request.num_prompt_tokens, 16) // 16 * written
        end = -(-request.num_computed_tokens // 16)
        groups = manager.get_blocks(name).blocks
        return [[each.block_id for each in group[first:end]] for group, first in zip(groups, dropped, strict=True)]

    while scheduler.has_unfinished_requests() or flying:
        output = scheduler.schedule()
        preempted += len(output.preempted_req_ids or ())
        if output.num_scheduled_tokens:
            lengths = {name: scheduler.requests[name].num_computed_tokens for name in output.num_scheduled_tokens}
            read = {name: read_by(name, number) for name, number in output.num_scheduled_tokens.items()}
            assert all(0 not in group for groups in read.values() for group in groups)
            flying.append((output, lengths, read))
        if len(flying) < 2 and output.num_scheduled_tokens:
            continue
        output, lengths, read = flying.popleft()
        sampled = []
        for name, length in lengths.items():
            request = scheduler.requests.get(name)
            sampled.append([7] if request is None or length >= request.num_tokens else [])
            if request is None or request.num_computed_tokens < length:
                # It has finished, or is preempted.
                continue
            for group, blocks in zip(manager.get_blocks(name).blocks, read[name], strict=True):
                held = {each.block_id for each in group}
                assert held.issuperset(blocks)
                compressed += 0 in held
        order = {name: at for at, name in enumerate(lengths)}
        scheduler.update_from_output(output, ModelRunnerOutput(list(lengths), order, sampled))
    assert compressed
    assert preempted
    assert manager.block_pool.get_num_free_blocks() == free


@settings(max_examples=60, deadline=None)
@given(data=st.data(), budgets=st.lists(st.integers(4, 200), min_size=1, max_size=4), caching=st.booleans())
def test_pool_is_as_at_the_start_after_any_requests(data, budgets, caching):
    """Requests share beginnings, are preempted and read again, are aborted, or finish: about a thousand in all."""
    manager = manager_of(rule_of(budgets), 16, blocks=3000, caching=caching)
    free = manager.block_pool.get_num_free_blocks()
    text = list(range(1000, 1600))
    running = []
    for number in range(18):
        prompt = text[: data.draw(st.integers(1, 400))] + [number] * data.draw(st.integers(0, 60))
        request = request_of(str(number), prompt, 16)
        read(manager, request, data.draw(st.sampled_from([None, 30])))
        decode(manager, request, data.draw(st.integers(0, 20)))
        running.append(request)
        if data.draw(st.booleans()):
            other = running.pop(data.draw(st.integers(0, len(running) - 1)))
            manager.free(other)
            if data.draw(st.booleans()):
                # Preempted: it comes back with its answer so far.
                other.num_computed_tokens = 0
                read(manager, other)
                decode(manager, other)
                running.append(other)
    for request in running:
        manager.free(request)
    assert manager.block_pool.get_num_free_blocks() == free
    assert all(not single.req_to_blocks for single in manager.coordinator.single_type_managers)
    assert all(not single._compressed for single in manager.coordinator.single_type_managers)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), budgets=st.lists(st.integers(4, 200), min_size=2, max_size=4), caching=st.booleans())
def test_the_short_cut_for_tokens_with_slots_changes_nothing(data, budgets, caching):
    rule = rule_of(budgets)
    short, plain = (manager_of(rule, 16, caching=caching) for _ in range(2))
    if len(set(budgets)) > 1:
        assert "allocate_slots" in vars(short)
        del plain.allocate_slots
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))
    requests = [[request_of(str(at), list(range(length)), 16) for at, length in enumerate(lengths)] for _ in range(2)]
    for pair in zip(*requests, strict=True):
        for manager, request in zip((short, plain), pair, strict=True):
            read(manager, request, 50)
    for at in data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=100)):
        for manager, mine in zip((short, plain), requests, strict=True):
            decode(manager, mine[at])
        blocks = [manager.get_block_ids(str(at)) for manager in (short, plain)]
        assert blocks[0] == blocks[1]
    pools = [manager.block_pool for manager in (short, plain)]
    assert pools[0].get_num_free_blocks() == pools[1].get_num_free_blocks()
    hashes = [[block.block_hash for block in pool.blocks] for pool in pools]
    assert hashes[0] == hashes[1]


@settings(max_examples=100, deadline=None)
@given(
    budgets=st.lists(st.integers(4, 300), min_size=1, max_size=4),
    first=st.integers(20, 500),
    second=st.integers(20, 500),
    shared=st.integers(0, 500),
    answered=st.integers(0, 200),
)
def test_shared_blocks_are_never_written_to(budgets, first, second, shared, answered):
    """Compression writes to the blocks behind those that it drops; a block that two requests hold is not among them."""
    rule = rule_of(budgets)
    manager = manager_of(rule, 16, caching=True)
    text = list(range(1000, 1500))
    one = request_of("one", text[: min(first, shared)] + [1] * (first - min(first, shared)), 16)
    two = request_of("two", text[: min(second, shared)] + [2] * (second - min(second, shared)), 16)
    read(manager, one)
    decode(manager, one, answered)
    before = {block.block_id for group in manager.get_blocks("one").blocks for block in group if not block.is_null}
    found = read(manager, two)
    assert found <= min(first, second, shared)
    for index, group in enumerate(manager.get_blocks("two").blocks):
        dropped = int(rule.evicts(second, 16)[index]) // 16
        if dropped:
            written = {block.block_id for block in group[dropped:]}
            assert not written & before
            assert all(block.ref_cnt == 1 and block.block_hash is None for block in group[dropped:])


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.integers(60, 200),
    rooms=st.lists(st.integers(0, 12), max_size=20),
    drafts=st.integers(0, 3),
    selector=st.sampled_from(["snapkv:window=8", "keydiff"]),
)
def test_on_a_gpu_no_chunk_that_matters_looks_like_decoding(prompt, rooms, drafts, selector):
    """vLLM replays a graph for steps of one token, or of one and the drafts, and no query is noted in a graph."""
    config, least = config_of(rule_of([40], selector), 16), 2 + drafts
    devices = SimpleNamespace(device_config=SimpleNamespace(device_type="cuda"))
    scheduler = SimpleNamespace(kv_cache_config=config, num_spec_tokens=drafts, vllm_config=devices)
    request = SimpleNamespace(num_prompt_tokens=prompt)
    first, computed = prompt - (8 if "snapkv" in selector else 0), prompt - 30
    # With room enough a request never waits for ever.
    for room in [*rooms, *[2 * least] * 30]:
        number = end_of_chunk(scheduler, request, computed, min(room, prompt + 1 - computed))
        assert 0 <= number <= room
        computed += number
        assert not number or number >= least or computed <= first
        if computed == prompt:
            break
    assert computed == prompt


def test_a_prefix_is_found_up_to_what_was_dropped():
    manager = manager_of(rule_of([40, 100]), 16, caching=True)
    prompt = list(range(1000, 1400))
    first = request_of("first", prompt, 16)
    assert read(manager, first) == 0
    decode(manager, first, 3)
    manager.free(first)
    again = request_of("again", prompt, 16)
    assert read(manager, again) == (400 - 100) // 16 * 16
    manager.free(again)
    shorter = request_of("shorter", prompt[:200], 16)
    assert read(manager, shorter) == (200 - 100) // 16 * 16
    covered = request_of("covered", prompt[:90], 16)
    # A budget of 100 covers it; the layers that keep 40 write behind the first 50 tokens.
    assert read(manager, covered) == 48


@pytest.mark.parametrize("chunk", [None, 30])
def test_no_prompt_finds_an_answer_to_a_compressed_prompt(chunk):
    """Layers that keep the whole prompt got the answer's entries from layers that do not."""
    config = config_of(rule_of([40, 400]), 16)
    window = SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32, sliding_window=400)
    config.kv_cache_groups.append(KVCacheGroupSpec(["window"], window))
    manager = KVCacheManager(config, LENGTH, 16, 16, enable_caching=True)
    prompt = list(range(1000, 1200))
    first = request_of("first", prompt, 16)
    read(manager, first, chunk)
    decode(manager, first, 64)
    for group in manager.get_blocks("first").blocks:
        assert all(block.block_hash is None for block in group[200 // 16 :])
    manager.free(first)
    chat = [*prompt, *[7] * 64, *range(2000, 2100)]
    second, third = request_of("second", chat, 16), request_of("third", chat, 16)
    assert read(manager, second) == 200 - 40
    clean = [[block.block_id for block in group] for group in manager.get_blocks("second").blocks]
    found = read(manager, third) // 16
    assert found == (364 - 40) // 16
    again = [[block.block_id for block in group] for group in manager.get_blocks("third").blocks]
    assert [group[200 // 16 : found] for group in again] == [group[200 // 16 : found] for group in clean]


def test_a_preempted_request_finds_its_prompt_but_not_its_answer():
    manager = manager_of(rule_of([40]), 16, caching=True)
    request = request_of("a", list(range(1000, 1200)), 16)
    read(manager, request)
    decode(manager, request, 100)
    manager.free(request)
    request.num_computed_tokens = 0
    _, found, _ = manager.get_computed_blocks(request)
    assert found == (200 - 40) // 16 * 16


def test_line_at_start():
    config = config_of(rule_of([64, 64, 96, 96]), 32, blocks=129)
    assert description(config, 1024) == (
        "EvolKV: 2 groups of 2 layers; a prompt of 1,024 tokens holds 10 of its 128 one-layer blocks once it is read, "
        "so 25 such prompts fit where 2 did"
    )


def test_line_at_start_promises_no_more_prompts_than_fit():
    """A block of the pool costs as much for the smaller group: a prompt takes two and three of the thousand."""
    config = config_of(rule_of([64] * 4 + [96] * 6), 32, blocks=1001)
    assert "holds 30 of its 320 one-layer blocks" in description(config, 1024)
    assert "so 200 such prompts fit where 18 did" in description(config, 1024)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 500])
def test_a_budget_that_covers_the_prompt_drops_nothing(tokens):
    assert not rule_of([500, 600]).any_evicts(tokens, 32)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 600), st.sampled_from([16, 32, 128]))
def test_a_layer_keeps_its_budget_and_less_than_a_block_more(tokens, budget, block_size):
    left = tokens - int(rule_of([budget]).evicts(tokens, block_size)[0])
    assert min(tokens, budget) <= left < min(tokens, budget) + block_size
