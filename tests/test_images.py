"""Models that read images: what they do to the text around them is done to compressed caches, too."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from transformers import (
    DynamicCache,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from evolkv import CompressedCache, compress
from evolkv.errors import ModelError, UsageError
from evolkv.evaluation.prefill import Prefiller, whole_cache
from evolkv.selectors import get_selector
from test_cache_files import edited, refused
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


def qwen(seed=0):
    """A Qwen3-VL: an image takes fewer positions than tokens, and adds to the states of the first layers."""
    torch.manual_seed(seed)
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "in_channels": 3, "patch_size": 4, "intermediate_size": 48}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 16}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**vision, "deepstack_visual_indexes": [0, 1]},
        image_token_id=IMAGE,
        video_token_id=131,
        vision_start_token_id=132,
        vision_end_token_id=133,
    )
    return Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return qwen()


def an_image():
    """A prompt with an image of 16 tokens, for Qwen-VL."""
    ids = tokens(1, 50)
    ids[0, 5], ids[0, 6:22], ids[0, 22] = 132, IMAGE, 133
    pixels = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    kinds = {"mm_token_type_ids": (ids == IMAGE).int(), "attention_mask": torch.ones_like(ids)}
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 8, 8]]), **kinds}


@pytest.fixture
def cache(model):
    """Of a prompt with an image, and the answer."""
    cache = CompressedCache(model, "snapkv:window=4", budget=20)
    cache.input_ids = model.generate(**an_image(), cache=cache, **GREEDY).sequences
    return cache


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


def test_positions_that_images_have_moved_are_not_undone(model):
    text = tokens(1, 40)
    new = lambda: CompressedCache(model, "expected_attention", budget=20)  # noqa: E731
    before = CompressedCache.prefill(model, "expected_attention", text, budget=20).positions
    with pytest.raises(ModelError, match=r"images in the text move the positions of its tokens in Qwen3VL.*snapkv"):
        model.generate(**an_image(), cache=new(), **GREEDY)
    after = new()
    model.generate(input_ids=text, attention_mask=torch.ones_like(text), cache=after, **GREEDY)
    assert all(map(torch.equal, chain(*before), chain(*after.positions)))


def test_prompts_are_not_read_in_chunks_where_tokens_look_ahead(paligemma):
    with pytest.raises(UsageError, match=r"look ahead in PaliGemmaForConditionalGeneration.*leave out prefill_chunk"):
        CompressedCache(paligemma, "snapkv:window=4", 12, prefill_chunk=8)


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


def test_a_saved_text_with_an_image_goes_on_in_another_process(model, cache, tmp_path):
    cache.save(tmp_path / "a.cache")
    expected = logits(model, **cache.followed_by(QUESTION))
    other = qwen()
    loaded = CompressedCache.load(tmp_path / "a.cache", other)
    assert torch.equal(logits(other, **loaded.followed_by(QUESTION)), expected)

    def longer(tensors, metadata, said):
        tensors["image_offsets"] = tensors["image_offsets"].repeat(2, 1)

    refused(edited(tmp_path / "a.cache", tmp_path / "b.cache", longer), model, "image_offsets do not fit")


def test_texts_with_and_without_images_do_not_place_each_others_tokens(model, cache):
    document = tokens(1, 40, seed=5)
    alone = qwen()
    text = CompressedCache.prefill(alone, "snapkv:window=4", document, budget=20)
    expected = logits(alone, **text.followed_by(QUESTION))
    branches = cache.copy(), cache.copy()
    placed = logits(model, **cache.followed_by(QUESTION))
    text = CompressedCache.prefill(model, "snapkv:window=4", document, budget=20)
    close(logits(model, **branches[0].followed_by(QUESTION)), placed)
    close(logits(model, **text.followed_by(QUESTION)), expected)
    branches[1].batch_repeat_interleave(2)
    twice = model.generate(**branches[1].followed_by(QUESTION), **GREEDY).logits
    close(torch.stack(twice), placed[:, None].expand(-1, 2, -1))


def test_what_images_add_to_deeper_layers_is_refused_where_tokens_are_dropped(model):
    with compress(model, "pyramidinfer", budget=16):
        with pytest.raises(UsageError, match="'pyramidinfer' cannot cut 'visual_pos_masks'"):
            model.generate(**an_image(), **GREEDY)
        assert len(logits(model, input_ids=tokens(1, 50))) == 6
