"""What the server keeps and answers is what EvolKV's own cache keeps and answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import answers, engine

TINY = ["snapkv", "uniform", "chunkkv", "tova", "keydiff", "knorm", "streaming"]


def cases_of(reference, profile):
    return [case for case in reference["cases"] if case["profile"] == profile]


def settings_of(reference, name, profile):
    return {"profile": str(Path(reference["folder"], f"{name}-{profile}.json"))}


def check(reference, profile, llm, kept):
    """Compare greedy answers, and the positions that were kept of every prompt in every layer and head."""
    cases = cases_of(reference, profile)
    assert len(cases) >= 20
    prompts = [reference["prompts"][case["prompt"]] for case in cases]
    assert answers(llm, prompts, len(cases[0]["tokens"])) == [case["tokens"] for case in cases]
    compared = 0
    for case, prompt in zip(cases, prompts, strict=True):
        for layer, positions in enumerate(case["positions"]):
            for found in kept.get((len(prompt), layer), []):
                assert found == positions
                compared += 1
            if len(positions[0]) < len(prompt):
                assert kept[len(prompt), layer], "a layer kept less than the prompt, and nothing was ranked"
    assert compared > len(cases)


@pytest.mark.parametrize("profile", TINY)
@pytest.mark.parametrize("chunk", [7, 500])
def test_tiny_model_answers_as_with_evolkvs_cache(profile, chunk, tiny, kept):
    settings = {"max_num_batched_tokens": chunk, "max_num_seqs": min(chunk, 16)}
    with engine(tiny["model"], settings_of(tiny, "tiny", profile), **settings) as llm:
        check(tiny, profile, llm, kept)


@pytest.mark.parametrize("chunk", [1, 2048])
def test_chunks_of_one_token_and_whole_prompts(chunk, tiny, kept):
    settings = {"max_num_batched_tokens": chunk, "max_num_seqs": min(chunk, 16)}
    with engine(tiny["model"], settings_of(tiny, "tiny", "snapkv"), **settings) as llm:
        check(tiny, "snapkv", llm, kept)


@pytest.mark.parametrize("chunk", [7, 2048])
def test_layers_with_a_sliding_window_stay_vllms(chunk, windows, kept):
    settings = {"max_num_batched_tokens": chunk, "max_num_seqs": min(chunk, 16)}
    with engine(windows["model"], settings_of(windows, "windows", "mixed"), **settings) as llm:
        cases = cases_of(windows, "mixed")
        prompts = [windows["prompts"][case["prompt"]] for case in cases]
        assert answers(llm, prompts) == [case["tokens"] for case in cases]
        assert {layer for _, layer in kept} == {0, 2, 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "chunk"), [("uniform", 2048), ("classes", 2048), ("classes", 100), ("varied", 500)]
)
def test_smollm_answers_as_with_evolkvs_cache(profile, chunk, smollm, kept):
    with engine(smollm["model"], settings_of(smollm, "smollm", profile), max_num_batched_tokens=chunk) as llm:
        check(smollm, profile, llm, kept)
