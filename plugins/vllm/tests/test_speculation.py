"""Draft tokens taken from the text. The last file of all: on CPUs vLLM's proposer leaves kernels behind that keep other
engines from starting in the same process.
"""

from __future__ import annotations

from pathlib import Path

from conftest import answers, engine
from test_engine import random_prompts


def test_drafts_from_the_text_change_no_answer(tiny):
    profile = {"profile": str(Path(tiny["folder"], "tiny-snapkv.json"))}
    prompts = random_prompts(20, 300)
    # Texts that repeat themselves, so that some drafts are right.
    prompts += [prompt[:20] * 8 for prompt in prompts[:10]]
    with engine(tiny["model"], profile) as llm:
        expected = answers(llm, prompts, 40)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(tiny["model"], profile, speculative_config=drafts) as llm:
        assert answers(llm, prompts, 40) == expected
