"""The backends for GPUs. These tests have not been run yet: the project has had no GPU for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import answers, engine
from test_parity import cases_of, settings_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def prompts_of(reference, cases):
    return [reference["prompts"][case["prompt"]] for case in cases]


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("chunk", [64, 2048])
@pytest.mark.parametrize("profile", ["snapkv", "heads"])
def test_triton_answers_as_evolkvs_cache(profile, eager, chunk, tiny):
    cases = cases_of(tiny, profile)
    settings = {"attention_backend": "TRITON_ATTN", "enforce_eager": eager, "max_num_batched_tokens": chunk}
    with engine(tiny["model"], settings_of(tiny, "tiny", profile), **settings) as llm:
        assert answers(llm, prompts_of(tiny, cases)) == [case["tokens"] for case in cases]


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
@pytest.mark.parametrize("profile", ["snapkv", "heads"])
def test_graphs_answer_as_eager_steps(profile, backend, tiny):
    cases = cases_of(tiny, profile)
    seen = []
    for eager in (True, False):
        settings = {"attention_backend": backend, "enforce_eager": eager, "dtype": "bfloat16"}
        with engine(tiny["model"], settings_of(tiny, "tiny", profile), **settings) as llm:
            seen.append(answers(llm, prompts_of(tiny, cases), 40))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
def test_prompts_whose_last_chunk_is_one_token_are_compressed(backend, tiny, kept):
    """vLLM replays a graph for steps of one token, and nothing is compressed in a graph."""
    prompt = tiny["prompts"][30][:193]
    assert len(prompt) == 193
    settings = {"attention_backend": backend, "dtype": "bfloat16", "max_num_batched_tokens": 64, "max_num_seqs": 4}
    config = {"profile": str(Path(tiny["folder"], "tiny-uniform.json"))}
    with engine(tiny["model"], config, enforce_eager=False, **settings) as llm:
        answers(llm, [prompt], 8)
    assert {layer for tokens, layer in kept if tokens == 193} == set(range(6))
