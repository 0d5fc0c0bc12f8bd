"""The cache of a forward call, under its name and the deprecated one."""

from __future__ import annotations

import pytest
import torch

import evolkv
from evolkv.models.forward import given_cache
from tiny import tiny_model, tokens


def test_given_cache_is_found_under_either_name_and_none_yields_to_one():
    assert given_cache({"cache": 1}) == given_cache({"past_key_values": 1}) == 1
    assert given_cache({"cache": None, "past_key_values": 1}) == 1
    assert given_cache({"cache": None}) is given_cache({"use_cache": True}) is None


def test_generate_inside_compress_gets_the_compressed_cache():
    model = tiny_model()
    profile = evolkv.BudgetProfile.uniform(model, 12, selector="knorm")
    with evolkv.compress(model, profile):
        output = model.generate(
            tokens(1, 40), max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )
    cache = output.cache
    assert isinstance(cache, evolkv.CompressedCache)
    assert all(len(cache.positions[layer][0]) == 12 for layer in range(len(cache.layers)))


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_old_name_still_works_for_callers():
    model = tiny_model()
    profile = evolkv.BudgetProfile.uniform(model, 12, selector="knorm")
    by_name = [evolkv.CompressedCache(model, profile) for _ in range(2)]
    new = model(tokens(1, 40), cache=by_name[0])
    old = model(tokens(1, 40), past_key_values=by_name[1])
    assert torch.equal(new.logits, old.logits)
    assert by_name[0].kv_bytes == by_name[1].kv_bytes > 0
