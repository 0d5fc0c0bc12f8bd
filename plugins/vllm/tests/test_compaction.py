"""One layer's prompt, moved within vLLM's blocks: by vLLM's own kernels, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import FullAttentionSpec

from evolkv.selectors import PromptAttention, get_selector
from evolkv_vllm.backends.cpu import CPUStorage, _halves, _places
from evolkv_vllm.backends.paged import PagedStorage
from evolkv_vllm.builder import BudgetBuilder
from evolkv_vllm.compaction import Compactor, Part
from evolkv_vllm.rule import BudgetRule
from evolkv_vllm.spec import EvolKVSpec

HEADS, KV_HEADS, DIM = 4, 2, 32
SELECTORS = ["snapkv:window=8", "chunkkv:window=4,reuse=1", "tova", "keydiff", "knorm", "streaming_llm"]


class PlainBuilder:
    """The end of the chain of builders: hands on what it gets."""

    def __init__(self, kv_cache_spec, layer_names, config, device):
        self.kv_cache_spec, self.device = kv_cache_spec, device

    def build(self, common_prefix_len, common, fast_build=False):
        return SimpleNamespace(common=common)


class Builder(BudgetBuilder, PlainBuilder):
    pass


class Layer:
    """One layer with requests whose tokens arrive in chunks, as vLLM's runner would bring them.

    With `part` it is one KV head of a layer that has budgets by head: `budgets` are those of the layer's heads.
    """

    def __init__(self, budgets, selector, block_size, seed, dtype=torch.float32, paged=False, exact=False, part=None):
        self.generator = torch.Generator().manual_seed(seed)
        self.block_size, self.dtype, self.paged, self.part = block_size, dtype, paged, part
        budgets = np.array(budgets) if part is None else np.array([budgets])
        rule = BudgetRule.fixed(budgets, get_selector(selector), [None] * len(budgets), exact)
        heads = KV_HEADS if part is None else 1
        plain = FullAttentionSpec(block_size=block_size, num_kv_heads=heads, head_size=DIM, dtype=dtype)
        self.spec = EvolKVSpec.of_layer(plain, rule, 0, part or 0)
        model_config = SimpleNamespace(rswa_window=1 << 30)
        config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4), model_config=model_config)
        self.builder = Builder(self.spec, ["layers.0"], config, torch.device("cpu"))
        self.compactor = Compactor(rule.selector, 0, len(budgets), DIM**-0.5, parts=KV_HEADS // heads)
        self.isa = _get_attn_isa(dtype, block_size, DIM)
        self.cache = torch.randn(200, heads, block_size, 2 * DIM, generator=self.generator).to(dtype)
        self.layer = SimpleNamespace(isa=self.isa, _k_scale_float=1.0, _v_scale_float=1.0)
        self.storage = PagedStorage() if paged else CPUStorage(self.layer)
        self.free = (torch.randperm(199, generator=self.generator) + 1).tolist()

    def request(self, prompt, total):
        blocks = [self.free.pop() for _ in range(-(-total // self.block_size))]
        shape = (total, HEADS + 2 * KV_HEADS, DIM)
        states = torch.randn(shape, generator=self.generator).to(self.dtype)
        layer = states.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        query, key, value = layer if self.part is None else (each.chunk(KV_HEADS, dim=1)[self.part] for each in layer)
        mine = {"query": query, "key": key, "value": value}
        return SimpleNamespace(prompt=prompt, blocks=blocks, computed=0, layer=layer, **mine)

    def step(self, requests, counts):
        """Compute some more tokens of each request, and return the metadata that attention would get."""
        ends = [0, *np.cumsum(counts).tolist()]
        width = max(len(request.blocks) for request in requests)
        table = torch.tensor([request.blocks + [0] * (width - len(request.blocks)) for request in requests])
        lengths = [request.computed + count for request, count in zip(requests, counts, strict=True)]
        slots = torch.cat(
            [
                torch.tensor([request.blocks[at // self.block_size] * self.block_size + at % self.block_size])
                for request, length in zip(requests, lengths, strict=True)
                for at in range(request.computed, length)
            ]
        )
        query, key, value = (
            torch.cat([getattr(r, name)[r.computed : length] for r, length in zip(requests, lengths, strict=True)])
            for name in ("query", "key", "value")
        )
        positions = [torch.arange(r.computed, length) for r, length in zip(requests, lengths, strict=True)]
        common = CommonAttentionMetadata(
            query_start_loc=torch.tensor(ends, dtype=torch.int32),
            query_start_loc_cpu=torch.tensor(ends, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
            num_reqs=len(requests),
            num_actual_tokens=ends[-1],
            max_query_len=max(counts),
            max_seq_len=max(lengths),
            block_table_tensor=table.int(),
            slot_mapping=slots,
            positions=torch.cat(positions),
            rswa_prefix_lens=torch.tensor([request.prompt for request in requests], dtype=torch.int32),
        )
        metadata = self.builder.build(0, common)
        # As vLLM does it: when all metadata is there, with the slots that the builder was given.
        self.put(key, value, slots)
        self.compactor.run(Part(metadata.prompt_rows, query, self.cache, self.storage), self.part or 0)
        for request, length in zip(requests, lengths, strict=True):
            request.computed = length
        return metadata.common

    def put(self, key, value, slots):
        if self.paged:
            entries = torch.cat([key, value], dim=-1)
            self.cache.transpose(1, 2)[slots // self.block_size, slots % self.block_size] = entries
        else:
            ops.cpu_attn_reshape_and_cache(
                key.contiguous(),
                value.contiguous(),
                *_halves(self.cache),
                slots,
                self.isa,
                k_scale=1.0,
                v_scale=1.0,
                kv_cache_dtype="auto",
            )

    def seen(self, common, row):
        """The keys and values that attention reads for a request, ``[kv_heads, entries, dim]`` each."""
        length = int(common.seq_lens[row])
        blocks = common.block_table_tensor[row, : -(-length // self.block_size)].long()
        return tuple(part[:, :length] for part in self.storage.read(self.cache, blocks))

    def expected(self, request):
        """What EvolKV's selector keeps of the whole prompt, and every token since."""
        prompt = request.prompt
        states = [part[:prompt].transpose(0, 1)[None] for part in request.layer]
        held = prompt - self.spec.evicted_tokens(prompt)
        ranking = self.spec.rule.selector.rank(PromptAttention(*states, scaling=DIM**-0.5))[0]
        ranking = ranking if self.part is None else ranking[self.part : self.part + 1]
        index = ranking[:, :held].sort(dim=-1).values[..., None].expand(-1, -1, DIM)
        entries = [part[: request.computed].transpose(0, 1) for part in (request.key, request.value)]
        return tuple(torch.cat([each[:, :prompt].gather(1, index), each[:, prompt:]], dim=1) for each in entries)


def chunks(total, chunk):
    return [min(chunk, total - at) for at in range(0, total, chunk)]


@settings(max_examples=200, deadline=None)
@given(
    budgets=st.lists(st.integers(8, 200), min_size=1, max_size=KV_HEADS),
    prompts=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    block_size=st.sampled_from([16, 32, 64]),
    chunk=st.sampled_from([1, 7, 50, 500]),
    selector=st.sampled_from(SELECTORS),
    seed=st.integers(0, 10_000),
    paged=st.booleans(),
    exact=st.booleans(),
)
def test_attention_sees_what_the_selector_keeps(budgets, prompts, block_size, chunk, selector, seed, paged, exact):
    """One budget is that of the layer; several are those of its heads, which have blocks of their own."""
    parts = [None] if len(budgets) == 1 else range(KV_HEADS)
    layers = [Layer(budgets, selector, block_size, seed, paged=paged, exact=exact, part=part) for part in parts]
    for layer in layers:
        layer.compactor = layers[0].compactor
    requests = [[layer.request(prompt, prompt + 5) for layer in layers] for prompt in prompts]
    # In turns, so that some decode while others are being read.
    while any(request.computed < request.prompt + 5 for request, *_ in requests):
        active, counts, room = [], [], chunk
        for request in requests:
            first = request[0]
            reading = first.computed < first.prompt
            left = (first.prompt if reading else first.prompt + 5) - first.computed
            count = min(left if reading else min(left, 1), max(room, 0) if reading else 1)
            if count > 0:
                active.append(request)
                counts.append(count)
                room -= count
        by_layer = list(zip(*active, strict=True))
        commons = [layer.step(each, counts) for layer, each in zip(layers, by_layer, strict=True)]
        for layer, each, common in zip(layers, by_layer, commons, strict=True):
            for row, request in enumerate(each):
                if request.computed > request.prompt:
                    for found, wanted in zip(layer.seen(common, row), layer.expected(request), strict=True):
                        assert torch.equal(found, wanted)
    assert not layers[0].compactor._queries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_places_of_entries_in_a_block_are_found(dtype, block_size, head_dim):
    isa = _get_attn_isa(dtype, block_size, head_dim)
    for places in _places(isa, dtype, block_size, head_dim):
        assert places.shape == (block_size, head_dim)
        assert len(places.flatten().unique()) == block_size * head_dim


def test_queries_of_an_aborted_prompt_are_not_taken_for_anothers():
    layer = Layer([16], "snapkv:window=8", 16, 0)
    aborted = layer.request(100, 105)
    layer.step([aborted], [96])
    assert len(layer.compactor._queries) == 1
    other = layer.request(100, 105)
    # The pool gives it the very blocks that the first one had.
    other.blocks = aborted.blocks
    for count in (50, 46, 4, 1):
        common = layer.step([other], [count])
    for found, wanted in zip(layer.seen(common, 0), layer.expected(other), strict=True):
        assert torch.equal(found, wanted)


def test_a_step_shifts_only_what_was_compressed():
    layer = Layer([16], "snapkv:window=8", 16, 0)
    done, reading, short = layer.request(100, 110), layer.request(200, 205), layer.request(10, 30)
    layer.step([done], [100])
    layer.step([short], [10])
    common = layer.step([done, reading, short], [1, 60, 1])
    dropped = (100 - 16) // 16
    assert common.seq_lens.tolist() == [101 - 16 * dropped, 60, 11]
    assert common.block_table_tensor[0, :2].tolist() == done.blocks[dropped : dropped + 2]
    assert common.block_table_tensor[1, :4].tolist() == reading.blocks[:4]
    assert common.rswa_prefix_lens is None
    assert common.max_seq_len == 60


def test_past_the_end_of_a_prompt_in_one_chunk_is_an_error_not_a_wrong_text():
    from evolkv.errors import RunError

    layer = Layer([16], "snapkv:window=8", 16, 0)
    with pytest.raises(RunError, match="past the end of a prompt"):
        layer.step([layer.request(100, 110)], [105])
