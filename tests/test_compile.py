"""A model that was compiled with `torch.compile` runs on a compressed cache like any other."""

from __future__ import annotations

import pytest
import torch

from evolkv import BudgetProfile, CompressedCache, compress
from tiny import tiny_model, tokens

pytestmark = pytest.mark.slow
BUDGETS = [[7, 12], [9, 9], [5, 30], [16, 4]]


def test_a_compiled_model_gives_what_the_model_gives():
    model = tiny_model()
    profile = BudgetProfile.from_budgets(model, BUDGETS, {"name": "snapkv", "window": 4})
    caches = [CompressedCache(model, profile) for _ in range(2)]
    for cache in caches:
        model(tokens(1, 40), cache=cache)
    # Without a backend's code generation: what must work is the tracing.
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for step in range(3):
        token = tokens(1, 1, seed=step)
        expected = model(token, cache=caches[0]).logits
        torch.testing.assert_close(compiled(token, cache=caches[1]).logits, expected, atol=1e-5, rtol=0)
    assert caches[1].kv_bytes == caches[0].kv_bytes
    assert caches[1].get_seq_length() == 43


def test_a_compiled_model_is_compressed_by_the_block_and_drafts_for_itself():
    model = tiny_model()
    profile = BudgetProfile.from_budgets(model, BUDGETS, {"name": "snapkv", "window": 4})
    compiled = torch.compile(model, backend="eager", dynamic=True)
    ids, settings = tokens(1, 40), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with compress(model, profile):
        expected, text = model(ids).logits, model.generate(ids, **settings)
    with compress(compiled, profile):
        torch.testing.assert_close(compiled(ids).logits, expected, atol=1e-5, rtol=0)
    drafted = compiled.generate(ids, cache=CompressedCache(compiled, profile), prompt_lookup_num_tokens=3, **settings)
    assert torch.equal(drafted, text)
