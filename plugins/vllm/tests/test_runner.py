"""What vLLM's second runner, the one for GPUs, hands to the builder: its own code up to there, without a device."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from evolkv.errors import RunError
from evolkv_vllm.hooks import install, lengths_on_host
from evolkv_vllm.plan import RULE
from test_compaction import Builder, Layer

install()
PROMPT = 100
DROPPED = (PROMPT - 16) // 16


@pytest.fixture
def layer():
    return Layer([16], "snapkv:window=8", 16, 0)


def batch_of(rows, graph, length=PROMPT + 1):
    """Requests that write their first token, in a graph for some more."""
    buffers = InputBuffers(8, 8, torch.device("cpu"))
    batch = InputBatch.make_dummy(graph, graph, buffers)
    batch.num_reqs, batch.idx_mapping_np = rows, batch.idx_mapping_np[:rows]
    batch.seq_lens[:rows], batch.seq_lens[rows:] = length, 0
    batch.seq_lens_cpu_upper_bound = batch.seq_lens.clone()
    batch.query_start_loc_np[rows:] = rows
    batch.positions[:] = PROMPT
    return batch


def built(layer, batch, capture=False):
    """The metadata of a batch that a graph is captured or replayed for."""
    state = SimpleNamespace(max_model_len=128, supports_mm_inputs=False)
    groups = [[SimpleNamespace(kv_cache_spec=layer.spec, layer_names=["layer"], get_metadata_builder=None)]]
    groups[0][0].get_metadata_builder = lambda _: layer.builder
    for name in ("build_metadata", "build_metadata_for_cudagraph_capture"):
        setattr(groups[0][0], name, lambda common, _: layer.builder.build(0, common))
    number = batch.num_reqs_after_padding
    tables = torch.arange(1, 1 + 8 * number, dtype=torch.int32).view(number, 8)
    config = SimpleNamespace(kv_cache_groups=[None])
    slots = torch.zeros(1, number, dtype=torch.int64)
    made = DefaultModelState.prepare_attn(state, batch, CUDAGraphMode.FULL, (tables,), slots, groups, config, capture)
    return made["layer"]


def test_a_rehearsal_of_a_graph_has_no_prompts(layer):
    batch = batch_of(4, 4)
    assert batch.prompt_lens is None
    metadata = built(layer, batch, capture=True)
    assert metadata.common.seq_lens.tolist() == [PROMPT + 1] * 4
    assert metadata.prompt_rows == []


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_what_pads_a_graph_has_no_prompt(rows, layer):
    batch = batch_of(rows, 4)
    batch.prompt_lens = torch.tensor([PROMPT] * rows, dtype=torch.int32)
    common = built(layer, batch).common
    assert common.seq_lens.tolist() == [PROMPT + 1 - 16 * DROPPED] * rows + [0] * (4 - rows)
    assert common.block_table_tensor[:rows, 0].tolist() == [1 + 8 * row + DROPPED for row in range(rows)]


@pytest.mark.parametrize("backend", ["flash_attn.EvolKVFlash", "triton.EvolKVTriton"])
def test_no_graph_holds_a_prompt_that_is_compressed(backend, layer):
    name, kind = backend.split(".")
    builder = getattr(importlib.import_module(f"evolkv_vllm.backends.{name}"), f"{kind}Builder")
    plain = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
    builders = builder.__mro__[2]
    assert builder.get_cudagraph_support(None, plain) == builders.get_cudagraph_support(None, plain)
    assert builder.get_cudagraph_support(None, layer.spec) == AttentionCGSupport.UNIFORM_BATCH


def test_lengths_of_prompts_are_the_hosts(layer):
    assert GPUModelRunner.prepare_inputs.__wrapped__
    given = np.array([7, 20, 30, 40], dtype=np.int32)
    runner = SimpleNamespace(req_states=SimpleNamespace(prompt_len=SimpleNamespace(np=given)))
    for additional, expected in (({}, None), ({RULE: layer.spec.rule.text}, [7, 20, 30])):
        runner.vllm_config = SimpleNamespace(additional_config=additional)
        lengths = lengths_on_host(lambda self: batch_of(3, 4), runner).prompt_lens
        assert (lengths if lengths is None else lengths.tolist()) == expected


def test_a_vllm_that_hides_prompts_is_refused(layer):
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4))
    config.model_config = SimpleNamespace(rswa_window=None)
    with pytest.raises(RunError, match="how long the prompts are"):
        Builder(layer.spec, ["layers.0"], config, torch.device("cpu"))
