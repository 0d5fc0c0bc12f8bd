"""Models that read images: what they do to the text around them is done to compressed caches, too."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PaliGemmaConfig, PaliGemmaForConditionalGeneration

from evolkv import CompressedCache
from evolkv.evaluation.prefill import Prefiller, whole_cache
from evolkv.selectors import get_selector
from tiny import padded, tokens

TEXT = {
    "vocab_size": 140,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
IMAGE = 130
GREEDY = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
QUESTION = tokens(1, 6, seed=9)


@pytest.fixture(scope="module")
def paligemma():
    """Its positions count from 1, and without a mask its tokens look ahead."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma"},
        vision_config={**vision, "image_size": 16, "patch_size": 8, "projection_dim": 64},
        image_token_id=IMAGE,
    )
    return PaliGemmaForConditionalGeneration(config).eval().requires_grad_(False)


def logits(model, **inputs):
    return torch.cat(model.generate(**inputs, **GREEDY).logits)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lengths", [(40,), (40, 33)], ids=str)
def test_prefill_places_a_text_where_generate_would(paligemma, lengths):
    _, ids, mask = padded(lengths, "left")
    questions = QUESTION.expand(len(ids), -1)
    text, seen = torch.cat([ids, questions], dim=1), torch.cat([mask, torch.ones_like(questions)], dim=1)
    plain = DynamicCache(config=paligemma.config)
    paligemma(ids, attention_mask=mask, position_ids=mask.cumsum(-1), cache=plain)
    cache = CompressedCache.prefill(paligemma, "snapkv:window=4", ids, mask, budget=400)
    close(
        logits(paligemma, **cache.followed_by(QUESTION)),
        logits(paligemma, input_ids=text, attention_mask=seen, cache=plain),
    )


def test_prompts_share_nothing_where_tokens_look_ahead(paligemma):
    prefill = Prefiller(paligemma, [get_selector("streaming_llm")])
    prefill(torch.cat([tokens(1, 60), tokens(1, 3, seed=7)], dim=1))
    prompt = torch.cat([tokens(1, 60), tokens(1, 4, seed=8)], dim=1)
    plain = DynamicCache(config=paligemma.config)
    first = paligemma(prompt, cache=plain).logits[0, -1]
    recorded = prefill(prompt)
    close(recorded.next_logits, first)
    # What follows is placed right behind it.
    answer = first.argmax()[None, None]
    cache = whole_cache(paligemma, recorded, room=1)
    found = paligemma(answer, position_ids=torch.tensor([[64]]), cache=cache).logits
    close(found, paligemma(answer, cache=plain).logits)
