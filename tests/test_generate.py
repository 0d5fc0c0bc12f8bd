"""generate() on a compressed cache: every decoding strategy of transformers gives what a token-by-token loop gives."""

from __future__ import annotations

import copy
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AttentionInterface,
    DynamicCache,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from evolkv import BudgetProfile, CompressedCache, compress
from evolkv.errors import EvolKVError, ModelError, RunError, UsageError
from evolkv.generation import generate_text, save_document
from evolkv.methods import get_method
from tiny import KV_HEADS, LAYERS, padded, stretching_model, tiny_model, tokens

SNAPKV = {"name": "snapkv", "window": 4}
DENSE = [9, 12, 7, 16]
RAGGED = [[7, 12], [9, 9], [5, 30], [16, 4]]
BUDGETS = pytest.mark.parametrize("budgets", [DENSE, RAGGED], ids=["layers", "heads"])
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 8}


def profile(model, budgets):
    return BudgetProfile.from_budgets(model, budgets, SNAPKV)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# transformers looks at what a tokenizer makes of "abcdef" when it is to stop at a string.
WORDS = ["<pad>", "<end>", "<start>", *(f"w{i}" for i in range(3, 127)), "abcdef"]


def tokenizer():
    """One token for each word; a chat template that puts a word before a message and one after."""
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w3")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "bos_token": "<start>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)
    fast.chat_template = "{% for message in messages %}w4 {{ message['content'] }} w5 {% endfor %}"
    return fast


def words(ids):
    return " ".join(WORDS[i] for i in ids.tolist())


class Loop:
    """A model read token by token: the prompts under a profile, what follows appended to the same cache."""

    def __init__(self, model, prompt, budgets, mask=None):
        self.model = model
        self.mask = torch.ones_like(prompt) if mask is None else mask
        with compress(model, profile(model, budgets)):
            places = (self.mask.cumsum(-1) - 1).clamp(min=0)
            output = model(prompt, attention_mask=self.mask, position_ids=places)
        self.cache, self.logits = output.cache, output.logits[:, -1]

    def feed(self, ids):
        """Reads one token per sequence."""
        self.mask = torch.cat([self.mask, torch.ones_like(ids)[:, None]], dim=1)
        arguments = {"cache": self.cache}
        places = self.mask.sum(-1, keepdim=True) - 1
        self.logits = self.model(ids[:, None], attention_mask=self.mask, position_ids=places, **arguments).logits[:, -1]

    def greedy(self, count):
        """The next tokens, ``[batch, count]``; the last one is not read."""
        found = []
        for step in range(count):
            found.append(self.logits.argmax(-1))
            if step < count - 1:
                self.feed(found[-1])
        return torch.stack(found, dim=1)


def masked(model, turns, kept, count):
    """Greedy continuation where every entry is held and those evicted after the first of the turns are masked.

    This knows nothing of compressed caches.
    """
    at = turns[0].shape[1]
    hidden = torch.zeros(LAYERS, KV_HEADS, at, dtype=torch.bool)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            hidden[layer, head] = ~torch.isin(torch.arange(at), kept[layer][head])

    def attention(module, query, key, value, mask, scaling=None, **kwargs):
        fold = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(fold, 1).transpose(2, 3) * scaling
        if mask is not None:
            logits = logits + mask[..., : key.shape[2]]
        if key.shape[2] > at:
            unseen = hidden[module.layer_idx].repeat_interleave(fold, 0)[None, :, None]
            logits[..., :at] = logits[..., :at].masked_fill(unseen, float("-inf"))
        return (logits.softmax(-1) @ value.repeat_interleave(fold, 1)).transpose(1, 2), None

    AttentionInterface.register("masked", attention)
    AttentionMaskInterface.register("masked", eager_mask)
    own, model.config._attn_implementation = model.config._attn_implementation, "masked"
    try:
        cache = DynamicCache()
        for turn in turns:
            output = model(turn, cache=cache)
        found = [output.logits[0, -1].argmax()]
        for _ in range(count - 1):
            output = model(found[-1].view(1, 1), cache=cache)
            found.append(output.logits[0, -1].argmax())
        return torch.stack(found)
    finally:
        model.config._attn_implementation = own


def generated(model, inputs, budgets, explicit, **settings):
    """What generate() returns under a profile, by either way of asking for it."""
    if explicit:
        cache = CompressedCache(model, profile(model, budgets))
        return model.generate(inputs, cache=cache, **settings)
    with compress(model, profile(model, budgets)):
        return model.generate(inputs, **settings)


@BUDGETS
@pytest.mark.parametrize("explicit", [False, True], ids=["with block", "explicit cache"])
def test_greedy_equals_masking_what_was_evicted(model, budgets, explicit):
    prompt = tokens(1, 40)
    found = generated(model, prompt, budgets, explicit, **GREEDY)[0, 40:]
    kept = Loop(model, prompt, budgets).cache.positions
    assert torch.equal(found, masked(model, [prompt], kept, 8))
    assert not torch.equal(found, model.generate(prompt, **GREEDY)[0, 40:])


@BUDGETS
@pytest.mark.parametrize("explicit", [False, True], ids=["with block", "explicit cache"])
def test_greedy_on_a_padded_batch_equals_a_loop(model, budgets, explicit):
    _, batch, mask = padded([40, 33, 15], "left")
    found = generated(model, batch, budgets, explicit, attention_mask=mask, **GREEDY)
    assert torch.equal(found[:, 40:], Loop(model, batch, budgets, mask).greedy(8))


@BUDGETS
@pytest.mark.parametrize("explicit", [False, True], ids=["with block", "explicit cache"])
def test_sampling_several_sequences_equals_sampling_in_a_loop(model, budgets, explicit):
    _, batch, mask = padded([40, 33], "left")
    settings = {**GREEDY, "do_sample": True, "temperature": 0.7, "top_k": 20, "num_return_sequences": 3}
    torch.manual_seed(5)
    found = generated(model, batch, budgets, explicit, attention_mask=mask, **settings)
    loop = Loop(model, batch.repeat_interleave(3, 0), budgets, mask.repeat_interleave(3, 0))
    torch.manual_seed(5)
    for step in range(8):
        logits = loop.logits / 0.7
        logits = logits.masked_fill(logits < logits.topk(20).values[:, -1:], float("-inf"))
        token = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        assert torch.equal(token, found[:, 40 + step])
        loop.feed(token)


@BUDGETS
@pytest.mark.parametrize("explicit", [False, True], ids=["with block", "explicit cache"])
@pytest.mark.parametrize("sample", [False, True], ids=["beams", "sampled beams"])
def test_beam_search_on_a_padded_batch_scores_as_a_loop_does(model, budgets, explicit, sample):
    _, batch, mask = padded([40, 33], "left")
    settings = {**GREEDY, "num_beams": 3, "num_return_sequences": 3, "do_sample": sample, "top_k": 0}
    settings |= {"return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    output = generated(model, batch, budgets, explicit, attention_mask=mask, **settings)
    loop = Loop(model, batch.repeat_interleave(3, 0), budgets, mask.repeat_interleave(3, 0))
    total = torch.zeros(6)
    for token in output.sequences[:, 40:].unbind(1):
        total += loop.logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        loop.feed(token)
    torch.testing.assert_close(output.sequences_scores, total, atol=1e-3, rtol=0)
    assert len({tuple(sequence.tolist()) for sequence in output.sequences}) == 6


@BUDGETS
def test_scores_and_logits_are_those_of_the_loop(model, budgets):
    settings = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = generated(model, tokens(1, 40), budgets, True, repetition_penalty=1.3, **settings, **GREEDY)
    loop = Loop(model, tokens(1, 40), budgets)
    for step, logits in enumerate(output.logits):
        torch.testing.assert_close(logits, loop.logits, atol=1e-5, rtol=0)
        loop.feed(output.sequences[:, 40 + step])
    assert not torch.equal(output.scores[-1], output.logits[-1])
    assert isinstance(output.cache, CompressedCache)


def test_attention_weights_are_those_of_the_prompt_or_refused():
    model = tiny_model(attention="eager")
    expected = model(tokens(1, 40), output_attentions=True).attentions
    with compress(model, profile(model, DENSE)):
        output = model(tokens(1, 40), output_attentions=True)
        assert all(map(torch.equal, output.attentions, expected))
        with pytest.raises(UsageError, match="output_attentions cannot be had of tokens that follow"):
            model(tokens(1, 1), output_attentions=True, cache=output.cache)
        with pytest.raises(UsageError, match="output_attentions"):
            model.generate(tokens(1, 40), output_attentions=True, return_dict_in_generate=True, **GREEDY)


@pytest.mark.parametrize("budgets", [[400] * LAYERS, RAGGED], ids=["covering", "heads"])
def test_stopping_works_as_ever(model, budgets):
    prompt = tokens(1, 40)
    expected = Loop(model, prompt, budgets).greedy(8)[0]
    third = int(expected[2])
    first = expected.tolist().index(third)
    long = {**GREEDY, "max_new_tokens": 8}

    class AfterFive(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 45)

    by_token = generated(model, prompt, budgets, False, **{**long, "eos_token_id": third})
    by_criterion = generated(model, prompt, budgets, False, stopping_criteria=[AfterFive()], **long)
    by_string = generated(model, prompt, budgets, False, stop_strings=[WORDS[third]], tokenizer=tokenizer(), **long)
    assert by_token[0, 40:].tolist() == expected[: first + 1].tolist()
    assert by_criterion[0, 40:].tolist() == expected[:5].tolist()
    assert by_string[0, 40:].tolist() == expected[: first + 1].tolist()
    at_least = generated(model, prompt, budgets, False, **{**long, "eos_token_id": third, "min_new_tokens": 6})
    assert at_least.shape[1] >= 46
    assert third not in at_least[0, 40:46].tolist()


def test_streamers_get_the_same_text(model, capsys):
    words_of, prompt = tokenizer(), tokens(1, 40)
    expected = Loop(model, prompt, RAGGED).greedy(8)[0]
    generated(model, prompt, RAGGED, False, streamer=TextStreamer(words_of, skip_prompt=True), **GREEDY)
    assert capsys.readouterr().out.split() == words(expected).split()
    streamer = TextIteratorStreamer(words_of, skip_prompt=True)
    settings = {**GREEDY, "streamer": streamer}
    thread = threading.Thread(target=generated, args=(model, prompt, RAGGED, True), kwargs=settings)
    thread.start()
    assert "".join(streamer).split() == words(expected).split()
    thread.join()


def test_constrained_choice_of_tokens_works(model):
    prompt = tokens(1, 40)
    found = generated(model, prompt, RAGGED, False, prefix_allowed_tokens_fn=lambda row, ids: [10, 11, 12], **GREEDY)
    loop = Loop(model, prompt, RAGGED)
    for token in found[0, 40:]:
        assert int(token) == 10 + int(loop.logits[0, 10:13].argmax())
        loop.feed(token[None])


@pytest.mark.parametrize(
    "settings",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 2, "force_words_ids": [[5]]},
        {"dola_layers": "low"},
    ],
    ids=["contrastive", "groups", "constraints", "dola"],
)
def test_strategies_that_transformers_moved_to_its_hub_are_refused_by_it(model, settings):
    with pytest.raises(ValueError, match="trust_remote_code"):
        generated(model, tokens(1, 40), DENSE, False, **{**GREEDY, **settings})


# Assisted decoding: drafts that are rejected must leave no trace.


@BUDGETS
@pytest.mark.parametrize("assistant", ["itself", "another", "prompt"])
def test_assisted_decoding_gives_the_greedy_text(model, budgets, assistant):
    # A prompt that repeats itself, so that there is something to look up.
    prompt = tokens(1, 13).repeat(1, 3)
    expected = Loop(model, prompt, budgets).greedy(24)
    helper = {"another": tiny_model(seed=1), "itself": tiny_model()}.get(assistant)
    help_with = {"prompt_lookup_num_tokens": 3} if helper is None else {"assistant_model": helper}
    cache = CompressedCache(model, profile(model, budgets))
    output = model.generate(
        prompt, cache=cache, return_dict_in_generate=True, **help_with, **{**GREEDY, "max_new_tokens": 24}
    )
    assert torch.equal(output.sequences[:, 39:], expected)
    assert cache.get_seq_length() == output.sequences.shape[1] - 1
    assert [layer.prompt_width for layer in cache.layers] == [39] * LAYERS
    # And what the cache holds afterwards is what the loop's holds.
    loop = Loop(model, prompt, budgets)
    loop.greedy(24)
    assert cache.kv_bytes == loop.cache.kv_bytes
    cache.input_ids = output.sequences
    more = model.generate(**cache.followed_by(tokens(1, 3, seed=8)), **GREEDY)
    for token in torch.cat([expected[:, -1:], tokens(1, 3, seed=8)], dim=1)[0]:
        loop.feed(token[None])
    assert torch.equal(more[:, 39 + 24 + 3 :], loop.greedy(8))


def test_drafts_of_the_first_layers_alone_give_the_greedy_text(model):
    prompt = tokens(1, 13).repeat(1, 3)
    found = generated(model, prompt, RAGGED, True, assistant_early_exit=2, **GREEDY)
    assert torch.equal(found, generated(model, prompt, RAGGED, True, **GREEDY))


def test_assisted_decoding_under_budgets_of_the_prompt_gives_the_greedy_text(model):
    prompt = tokens(1, 13).repeat(1, 3)
    plain, assisted = (CompressedCache(model, "adakv+snapkv:window=4", 9) for _ in range(2))
    expected = model.generate(prompt, cache=plain, **GREEDY)
    found = model.generate(prompt, cache=assisted, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(found, expected)
    assert assisted.kv_bytes == plain.kv_bytes


@BUDGETS
@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss", "cohere2"])
def test_assisted_decoding_with_sliding_windows_gives_the_greedy_text(family, budgets):
    model, prompt = tiny_model(family), tokens(1, 13).repeat(1, 3)
    settings = {**GREEDY, "max_new_tokens": 40}
    caches = [CompressedCache(model, profile(model, budgets)) for _ in range(2)]
    taken_back = []
    crop = caches[0].crop
    caches[0].crop = lambda count: (taken_back.append(-count), crop(count))
    found, expected = (
        model.generate(prompt, cache=cache, **settings, **how)
        for cache, how in zip(caches, ({"prompt_lookup_num_tokens": 3}, {}), strict=True)
    )
    assert torch.equal(found, expected)
    assert sum(taken_back) > 0
    # The next turn reads from the same entries.
    for cache, ids in zip(caches, (found, expected), strict=True):
        cache.input_ids = ids
    again = [model.generate(**cache.followed_by(tokens(1, 3)), **GREEDY) for cache in caches]
    assert torch.equal(*again)


def test_assisted_decoding_with_left_padding_gives_the_greedy_text(model):
    prompt, mask = tokens(1, 13).repeat(1, 3), torch.ones(1, 39, dtype=torch.long)
    prompt[:, :5], mask[:, :5] = 0, 0
    cache = CompressedCache(model, profile(model, RAGGED))
    found = model.generate(prompt, attention_mask=mask, cache=cache, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(found[:, 39:], Loop(model, prompt, RAGGED, mask).greedy(8))


def test_assisted_decoding_is_refused_where_it_cannot_be_exact(model):
    prompt = tokens(1, 13).repeat(1, 3)
    for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}):
        with pytest.raises(UsageError, match="cannot tell where they begin"):
            generated(model, prompt, DENSE, False, **how, **GREEDY)
    # transformers sets it to that of the drafts, and leaves it so if drafting raises.
    assert model.config.num_hidden_layers == LAYERS
    compete = CompressedCache(model, "cake+snapkv:window=4", 9)
    with pytest.raises(UsageError, match="cuts no layer before all have read"):
        model.generate(prompt, cache=compete, prompt_lookup_num_tokens=3, **GREEDY)
    # What transformers before 5.24 does, which announces nothing.
    sliding = CompressedCache.prefill(tiny_model("mistral"), "snapkv:window=4", tokens(1, 40), budget=9)
    with pytest.raises(RunError, match="cannot take back 1 tokens"):
        sliding.crop(-1)
    # Where one layer cannot, none does.
    mixed = tiny_model("gemma3", layer_types=["full_attention", *["sliding_attention"] * 2, "full_attention"])
    cache = CompressedCache.prefill(mixed, "snapkv:window=4", tokens(1, 40), budget=9)
    mixed(tokens(1, 3), cache=cache)
    with pytest.raises(RunError, match="cannot take back 1 tokens"):
        cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.kv_layers] == [43] * LAYERS
    cache = CompressedCache.prefill(model, profile(model, DENSE), tokens(1, 40))
    with pytest.raises(UsageError, match="cannot go on from a cache"):
        model.generate(**cache.followed_by(tokens(1, 3)), prompt_lookup_num_tokens=3, **GREEDY)


def test_a_call_after_refused_assistance_is_a_prompt_without_drafts(model):
    expected, cache = (CompressedCache(model, profile(model, RAGGED)) for _ in range(2))
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(tokens(2, 40), cache=cache, prompt_lookup_num_tokens=3, **GREEDY)
    logits = model(tokens(2, 40), cache=expected).logits
    assert torch.equal(model(tokens(2, 40), cache=cache).logits, logits)
    assert cache.kv_bytes == expected.kv_bytes


# What else a prompt can look like.


@BUDGETS
@pytest.mark.parametrize("explicit", [False, True], ids=["with block", "explicit cache"])
def test_prompt_embeddings_give_the_text_of_the_prompt(model, budgets, explicit):
    prompt = tokens(1, 40)
    embeddings = model.get_input_embeddings()(prompt)
    found = generated(model, None, budgets, explicit, inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(found, Loop(model, prompt, budgets).greedy(8))


@pytest.mark.parametrize("explicit", [False, True], ids=["with block", "explicit cache"])
@pytest.mark.parametrize("tell_mask", [False, True])
def test_prompts_beyond_the_limit_of_a_long_rotary_embedding_are_compressed(explicit, tell_mask):
    model = stretching_model("longrope", 32)
    prompt = tokens(1, 60)
    settings = {"return_dict_in_generate": True, **({"attention_mask": torch.ones_like(prompt)} if tell_mask else {})}
    found = generated(model, prompt, RAGGED, explicit, **settings, **GREEDY)
    assert torch.equal(found.sequences[0, 60:], Loop(model, prompt, RAGGED).greedy(8)[0])
    assert isinstance(found.cache, CompressedCache)
    assert found.cache.get_seq_length() == 67


def test_a_text_that_outgrows_a_long_rotary_embedding_is_read_anew_or_refused():
    model = stretching_model("longrope", 44)
    prompt = tokens(1, 40)
    settings = {**GREEDY, "max_new_tokens": 12, "return_dict_in_generate": True}
    expected = model.generate(prompt, **settings).sequences
    # Read anew, its budgets cover the text as they did.
    assert torch.equal(generated(model, prompt, [400] * LAYERS, False, **settings).sequences, expected)
    with pytest.raises(
        UsageError, match="more than 44 tokens, so that a cache that holds 44 tokens cannot take it to 45"
    ):
        generated(model, prompt, DENSE, True, **settings)
    _, batch, mask = padded([40, 25], "left")
    with pytest.raises(UsageError, match="cannot take it to 45"):
        generated(model, batch, DENSE, True, attention_mask=mask, **settings)


def test_without_a_cache_nothing_is_compressed(model):
    prompt = tokens(1, 40)
    expected = model.generate(prompt, use_cache=False, **GREEDY)
    assert torch.equal(generated(model, prompt, DENSE, False, use_cache=False, **GREEDY), expected)


@pytest.mark.parametrize("where", ["config", "generation_config"])
def test_a_model_that_does_not_cache_by_default_is_compressed_or_says_why_not(where):
    plain = tiny_model()
    prompt, settings = tokens(1, 40), {**GREEDY, "return_dict_in_generate": True}
    expected = generated(plain, prompt, DENSE, True, **settings).sequences
    model = tiny_model()
    getattr(model, where).use_cache = False
    cache = CompressedCache.prefill(model, profile(model, DENSE), prompt[:, :-1])
    assert torch.equal(model.generate(**cache.followed_by(prompt[:, -1:]), **GREEDY)[:, :40], prompt)
    with compress(model, profile(model, DENSE)):
        assert isinstance(model(prompt).cache, CompressedCache)
        found = model.generate(prompt, use_cache=True, **settings)
        assert isinstance(found.cache, CompressedCache)
        assert torch.equal(found.sequences, expected)
        if where == "generation_config":
            with pytest.raises(UsageError, match=r"generation_config says use_cache=False.*generate\(use_cache=True\)"):
                model.generate(prompt, **GREEDY)


@pytest.mark.parametrize("explicit", [False, True], ids=["with block", "explicit cache"])
def test_a_prompt_in_chunks_of_generate_is_refused_where_only_the_first_would_be_cut(model, explicit):
    with pytest.raises(UsageError, match=r"prefill_chunk_size.*prefill_chunk=N"):
        generated(model, tokens(1, 40), DENSE, explicit, prefill_chunk_size=16, **GREEDY)
    cache = CompressedCache.prefill(model, profile(model, DENSE), tokens(1, 40))
    # A question is kept whole, so it may come in pieces.
    model.generate(**cache.followed_by(tokens(1, 20)), prefill_chunk_size=8, **GREEDY)


def test_a_default_cache_of_another_kind_is_named_with_where_it_comes_from():
    model = tiny_model()
    model.generation_config.cache_implementation = "static"
    with (
        compress(model, profile(model, DENSE)),
        pytest.raises(UsageError, match=r"generation_config.cache_impl.* = None"),
    ):
        model.generate(tokens(1, 40), **GREEDY)


@pytest.mark.parametrize(
    ("length", "words"), [(60, "differs from what the cache has read at token 0"), (40, "seen 40"), (9, "seen 40")]
)
@pytest.mark.parametrize("how", ["prefill", "load"])
def test_another_text_than_the_cache_has_read_is_refused(model, length, words, how, tmp_path):
    cache = CompressedCache.prefill(model, profile(model, DENSE), tokens(1, 40))
    if how == "load":
        cache.save(tmp_path / "cache")
        cache = CompressedCache.load(tmp_path / "cache", model)
    with pytest.raises(UsageError, match=words):
        model.generate(tokens(1, length, seed=7), cache=cache, **GREEDY)
    assert cache.get_seq_length() == 40


def test_the_text_that_the_cache_has_read_goes_on_whole_or_by_its_end(model):
    prompt, question = tokens(1, 40), tokens(1, 5, seed=1)
    whole, mask = torch.cat([prompt, question], dim=1), torch.ones(1, 45, dtype=torch.long)
    first, second = (CompressedCache.prefill(model, profile(model, DENSE), prompt) for _ in range(2))
    expected = model.generate(**first.followed_by(question), **GREEDY)
    assert torch.equal(model.generate(whole, cache=second.copy(), **GREEDY), expected)
    found = model.generate(question, attention_mask=mask, cache=second, **GREEDY)
    assert torch.equal(found[:, 5:], expected[:, 45:])


def test_a_mask_of_another_text_is_refused_in_a_call(model):
    cache = CompressedCache.prefill(model, profile(model, DENSE), tokens(1, 40))
    with pytest.raises(UsageError, match="attention_mask covers 3 tokens, but the cache has seen 40"):
        model(tokens(1, 3), attention_mask=torch.ones(1, 3), cache=cache)


class Wrapper(torch.nn.Module):
    """What passes everything on to the model inside, as adapters' wrappers do."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_wrapped_model_is_given_its_cache_by_the_name_it_wants(model):
    class Alone(type(model)):
        """A class that no other test has had a cache for."""

    wrapped, prompt, question = Wrapper(Alone(copy.deepcopy(model.config)).eval()), tokens(1, 40), tokens(1, 5, seed=1)
    wrapped.load_state_dict({f"base_model.{name}": weight for name, weight in model.state_dict().items()})
    cache = CompressedCache.prefill(wrapped, profile(model, DENSE), prompt)
    output = wrapped(question, cache=cache)
    expected = CompressedCache.prefill(model, profile(model, DENSE), prompt)
    assert torch.equal(output.logits, model(question, cache=expected).logits)
    again = CompressedCache.prefill(wrapped, profile(model, DENSE), prompt)
    with pytest.raises(UsageError, match="differs from what the cache has read"):
        wrapped.generate(tokens(1, 60, seed=7), cache=again, **GREEDY)


def test_a_cache_that_the_block_has_replaced_is_not_taken_for_another_prompt(model):
    # What it would mean: each further token read as a prompt of its own.
    plain = DynamicCache()
    with compress(model, profile(model, DENSE)):
        output = model(tokens(1, 40), cache=plain)
        with pytest.raises(UsageError, match=r"stayed empty.*go on with the one that the model's output holds"):
            model(tokens(1, 1), cache=plain)
        more = model(tokens(1, 1), cache=output.cache)
    assert more.cache is output.cache


def test_a_compressed_cache_without_caching_is_refused(model):
    cache = CompressedCache(model, profile(model, DENSE))
    with pytest.raises(UsageError, match="says use_cache=False"):
        model.generate(tokens(1, 40), cache=cache, use_cache=False, **GREEDY)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("implementation", ["offloaded", "static", "quantized"])
def test_other_kinds_of_cache_are_refused(model, implementation):
    with pytest.raises((UsageError, ImportError), match=r"compress\(\) replaces the default cache|quant"):
        generated(model, tokens(1, 40), DENSE, False, cache_implementation=implementation, **GREEDY)


def test_calls_from_several_threads_keep_to_their_own_caches(model):
    kept = [DENSE, RAGGED, [40] * LAYERS, [5] * LAYERS]
    settings = [{}, {"prefill_chunk": 16}, {}, {"evict_every": 3}]
    prompts = [tokens(1, 40 - i, seed=i) for i in range(4)]

    def told(i):
        cache = CompressedCache(model, profile(model, kept[i]), **settings[i])
        return model.generate(prompts[i], cache=cache, **GREEDY)

    expected = [told(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(map(torch.equal, pool.map(told, range(4)), expected))


# Going on.


@BUDGETS
def test_second_turn_attends_to_the_compressed_first_turn(model, budgets):
    first, second = tokens(1, 40), tokens(1, 6, seed=9)
    cache = CompressedCache(model, profile(model, budgets))
    answer = model.generate(first, cache=cache, **GREEDY)
    kept = cache.positions
    text = torch.cat([answer, second], dim=1)
    found = model.generate(text, cache=cache, **GREEDY)
    assert torch.equal(found[0, text.shape[1] :], masked(model, [first, text[:, 40:]], kept, 8))
    assert cache.get_seq_length() == text.shape[1] + 7


@BUDGETS
def test_second_turn_of_a_padded_batch_equals_a_loop(model, budgets):
    _, batch, mask = padded([40, 33, 15], "left")
    cache = CompressedCache.prefill(model, profile(model, budgets), batch, mask)
    question = tokens(3, 6, seed=9)
    loop = Loop(model, batch, budgets, mask)
    for token in question.unbind(1):
        loop.feed(token)
    found = model.generate(**cache.followed_by(question), **GREEDY)
    assert torch.equal(found[:, :40], batch)
    assert torch.equal(found[:, 46:], loop.greedy(8))


def test_prefilled_prompt_holds_what_a_forward_call_keeps(model):
    _, batch, mask = padded([40, 33], "left")
    cache = CompressedCache.prefill(model, "snapkv:window=4", batch, mask, budget=9)
    loop = Loop(model, batch, [9] * LAYERS, mask)
    for mine, other in zip(cache.layers, loop.cache.layers, strict=True):
        assert np.array_equal(mine.budgets, other.budgets)
        for left, right in zip(mine.groups, other.groups, strict=True):
            assert torch.equal(left.keys, right.keys)
            assert torch.equal(left.positions, right.positions)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
def test_one_prompt_serves_several_beams_once_it_is_repeated(model, settings):
    cache = CompressedCache.prefill(model, profile(model, RAGGED), tokens(1, 40))
    question = tokens(1, 6, seed=9)
    with pytest.raises(UsageError, match=r"holds 1 sequences, but this call brings 3"):
        model.generate(**cache.copy().followed_by(question), **{**GREEDY, **settings})
    asked = cache.followed_by(question)
    cache.batch_repeat_interleave(3)
    torch.manual_seed(1)
    found = model.generate(**asked, **{**GREEDY, **settings})
    # The same from a batch that was read three times; no path here but repetition is different.
    torch.manual_seed(1)
    again = CompressedCache.prefill(model, profile(model, RAGGED), tokens(1, 40).repeat(3, 1))
    expected = model.generate(**{**asked, "cache": again}, **{**GREEDY, **settings})
    assert torch.equal(found, expected)


def test_what_the_cache_does_not_know_it_asks_for(model):
    cache = CompressedCache(model, profile(model, DENSE))
    answer = model.generate(tokens(1, 40), cache=cache, **GREEDY)
    with pytest.raises(UsageError, match="seen 47 tokens and knows the ids of 0"):
        cache.followed_by(tokens(1, 3))
    cache.input_ids = answer
    assert cache.followed_by(tokens(1, 3))["input_ids"].shape == (1, 51)
    with pytest.raises(UsageError, match=r"\[2, 3\]; expected \[1, tokens\]"):
        cache.followed_by(tokens(2, 3))


@pytest.mark.parametrize(
    ("given", "named"),
    [([1, 2, 3], "list"), ("Who?", "str"), (torch.rand(1, 3), "a tensor of torch.float32 and shape .*")],
)
def test_what_is_no_tensor_of_ids_does_not_go_on(model, given, named):
    cache = CompressedCache.prefill(model, profile(model, DENSE), tokens(1, 40))
    with pytest.raises(UsageError, match=f"input_ids is {named}; expected a tensor of token ids"):
        cache.followed_by(given)


@pytest.mark.parametrize("repeats", [0, -1, 1.5, True])
def test_sequences_are_repeated_a_whole_number_of_times(model, repeats):
    cache = CompressedCache.prefill(model, profile(model, DENSE), tokens(1, 40))
    with pytest.raises(UsageError, match="expected a whole number from 1"):
        cache.batch_repeat_interleave(repeats)
    assert cache.num_rows == 1


def test_a_cache_does_not_go_on_in_another_dtype():
    model = tiny_model()
    cache = CompressedCache.prefill(model, profile(model, DENSE), tokens(1, 40))
    asked = cache.followed_by(tokens(1, 3))
    model.bfloat16()
    with pytest.raises(UsageError, match=r"holds torch\.float32, but the model now computes in torch\.bfloat16"):
        model.generate(**asked, **GREEDY)
    cache.reset()
    model.generate(tokens(1, 40), cache=cache, **GREEDY)
    assert cache.kv_bytes


def ended(model, cache, question, count=12):
    """Two rows answer, of which the first stops at its third token; what they say, and the end's id."""
    asked = cache.copy().followed_by(question)
    told = model.generate(**asked, **{**GREEDY, "max_new_tokens": count})
    end = int(told[0, asked["input_ids"].shape[1] + 2])
    assert end not in told[1, asked["input_ids"].shape[1] :]
    found = model.generate(
        **cache.followed_by(question), max_new_tokens=count, do_sample=False, eos_token_id=end, pad_token_id=0
    )
    assert (found[0, -count + 3 :] == 0).all()
    return found, end


@BUDGETS
def test_rows_that_ended_before_others_go_on_as_if_alone(model, budgets, tmp_path):
    prompts, questions, more = tokens(2, 40), tokens(2, 5, seed=9), tokens(2, 6, seed=8)
    cache = CompressedCache.prefill(model, profile(model, budgets), prompts)
    cache.input_ids, end = ended(model, cache, questions)
    cache.save(tmp_path / "a.cache")
    loaded = CompressedCache.load(tmp_path / "a.cache", model)
    cache.input_ids = model.generate(**cache.followed_by(more[:, :1]), **GREEDY)
    # The padding is known in the turn after the next one, too, and in a file.
    cache.save(tmp_path / "b.cache")
    both = [cache, CompressedCache.load(tmp_path / "b.cache", model)]
    third = [model.generate(**each.followed_by(more), **GREEDY) for each in both]
    assert torch.equal(*third)
    second = model.generate(**loaded.followed_by(more[:, :1]), **GREEDY)
    assert torch.equal(second, cache.input_ids)
    for i in range(2):
        alone = CompressedCache.prefill(model, profile(model, budgets), prompts[i : i + 1])
        settings = {**GREEDY, "max_new_tokens": 12, "eos_token_id": end, "pad_token_id": 0}
        alone.input_ids = model.generate(**alone.followed_by(questions[i : i + 1]), **settings)
        alone.input_ids = model.generate(**alone.followed_by(more[i : i + 1, :1]), **GREEDY)
        assert torch.equal(second[i, -8:], alone.input_ids[0, -8:])
        expected = model.generate(**alone.followed_by(more[i : i + 1]), **GREEDY)
        assert torch.equal(third[0][i, -8:], expected[0, -8:])


def test_the_end_of_an_answer_is_no_padding_where_both_are_one_token(model):
    cache = CompressedCache.prefill(model, profile(model, DENSE), tokens(2, 40))
    cache.input_ids = torch.cat([cache.input_ids, torch.tensor([[9, 1, 1], [9, 9, 1]])], dim=1)
    pads = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    try:
        for model.generation_config.pad_token_id in (1, None):
            mask = cache.followed_by(tokens(1, 2))["attention_mask"]
            assert mask[:, 40:].tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]
        model.generation_config.eos_token_id = None
        assert cache.followed_by(tokens(1, 2))["attention_mask"].all()
    finally:
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = pads


@BUDGETS
@pytest.mark.parametrize(
    "family", ["gemma3", *(pytest.param(each, marks=pytest.mark.slow) for each in ("llama", "mistral", "gpt_oss"))]
)
@pytest.mark.parametrize("how", ["of the turn", "of everything", "read before"])
def test_questions_of_several_lengths_are_answered_as_if_alone(family, budgets, how, tmp_path):
    model = tiny_model(family)
    prompts, prompt, prompt_mask = padded([40, 33], "left")
    questions, question, mask = padded([4, 7], "left")
    turns, more, more_mask = padded([3, 12], "left")
    cache = CompressedCache.prefill(model, profile(model, budgets), prompt, prompt_mask)
    whole = torch.cat([prompt_mask, mask], dim=1)
    if how == "read before":
        model(question, attention_mask=whole, position_ids=(whole.cumsum(1) - 1)[:, 40:], cache=cache)
        cache.input_ids = torch.cat([prompt, question], dim=1)
        cache.save(tmp_path / "a.cache")
        loaded = CompressedCache.load(tmp_path / "a.cache", model)
        found = model.generate(**cache.followed_by(more, more_mask), **GREEDY)
        assert torch.equal(found, model.generate(**loaded.followed_by(more, more_mask), **GREEDY))
    else:
        given = mask if how == "of the turn" else whole
        cache.input_ids = model.generate(**cache.followed_by(question, given), **GREEDY)
        found = model.generate(**cache.followed_by(more, more_mask), **GREEDY)
    for i, one in enumerate(prompts):
        alone = CompressedCache.prefill(model, profile(model, budgets), one[None])
        text, then = questions[i][None], turns[i][None]
        if how == "read before":
            text = torch.cat([text, then], dim=1)
        else:
            alone.input_ids = model.generate(**alone.followed_by(text), **GREEDY)
            text = then
        assert torch.equal(found[i, -8:], model.generate(**alone.followed_by(text), **GREEDY)[0, -8:])


def test_a_mask_of_another_shape_is_refused(model):
    cache = CompressedCache.prefill(model, profile(model, DENSE), tokens(2, 40))
    with pytest.raises(UsageError, match=r"is of shape \[1, 4\]; expected .* \[2, 43\] \(the whole text\) or \[2, 3\]"):
        cache.followed_by(tokens(2, 3), torch.ones(1, 4))


@pytest.mark.parametrize("returned", [1, 3])
def test_beams_are_not_taken_for_what_was_returned(model, returned, tmp_path):
    cache = CompressedCache.prefill(model, profile(model, RAGGED), tokens(1, 40))
    asked = cache.followed_by(tokens(1, 6, seed=9))
    cache.batch_repeat_interleave(3)
    branch = cache.copy()
    cache.input_ids = model.generate(**asked, num_beams=3, num_return_sequences=returned, **GREEDY)
    for each in (cache, cache.copy()):
        with pytest.raises(UsageError, match="beam search has been through the cache"):
            each.followed_by(tokens(1, 3))
        with pytest.raises(UsageError, match="beam search has been through the cache"):
            each.save(tmp_path / "a.cache")
    branch.input_ids = tokens(2, 40)
    with pytest.raises(UsageError, match="input_ids has 2 rows, but the cache holds 3 sequences"):
        branch.followed_by(tokens(1, 3))
    cache.reset()
    model(tokens(1, 40), cache=cache)
    cache.input_ids = tokens(1, 40)
    cache.followed_by(tokens(1, 3))


# Pipelines.


def test_text_generation_pipeline_runs_compressed(model):
    speak = pipeline("text-generation", model=model, tokenizer=tokenizer())
    prompts = [tokens(40), tokens(33, seed=1), tokens(15, seed=2)]
    texts = [words(prompt) for prompt in prompts]
    settings = {**GREEDY, "return_full_text": False}
    with compress(model, profile(model, RAGGED)):
        alone = [speak(text, **settings)[0]["generated_text"] for text in texts]
        together = speak(texts, batch_size=3, **settings)
        chat = speak([{"role": "user", "content": texts[0]}], **settings)
    for prompt, text in zip(prompts, alone, strict=True):
        assert text.split() == words(Loop(model, prompt[None], RAGGED).greedy(8)[0]).split()
    assert [rows[0]["generated_text"].split() for rows in together] == [text.split() for text in alone]
    framed = torch.cat([torch.tensor([4]), prompts[0], torch.tensor([5])])[None]
    assert chat[0]["generated_text"].split() == words(Loop(model, framed, RAGGED).greedy(8)[0]).split()


# One prompt with its text, as `evolkv generate` answers it.


@pytest.mark.parametrize("raw", [True, False])
def test_a_document_is_asked_as_it_was_read_also_where_the_template_has_one_token_behind_the_bos(model, raw, tmp_path):
    own, path = tokenizer(), str(tmp_path / "document.cache")
    own.chat_template = f"{{{{ bos_token }}}} {own.chat_template}"
    own.backend_tokenizer.post_processor = TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 2)])
    save_document(model, own, "w7 w8 w9 w10 w11", get_method("streaming_llm"), 6, path, raw=raw)
    document = CompressedCache.load(path, model)
    answer = generate_text(model, own, "w20", raw=raw, document=document, max_new_tokens=2)
    assert answer.new_tokens > 0


@pytest.mark.parametrize(
    ("method", "chunk", "less"),
    [
        (None, None, "keep less of it, with --profile FILE"),
        ("snapkv:window=4", None, "read it in chunks, with --prefill-chunk 512"),
        ("snapkv:window=4", 512, "use a smaller --prefill-chunk"),
        ("kvzip:words=false", None, "use a shorter one"),
    ],
)
def test_a_prompt_that_memory_does_not_hold_is_answered_with_what_takes_less(model, monkeypatch, method, chunk, less):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "generate", fail)
    chosen = method and get_method(method)
    with pytest.raises(RunError, match=re.escape(f"out of memory on a prompt of 5 tokens; {less}")):
        generate_text(model, tokenizer(), "w7 w8 w9", chosen, method and 16, prefill_chunk=chunk)


def test_a_document_of_tokens_that_the_model_does_not_know_is_refused(tmp_path):
    small, path = tiny_model(vocab_size=100), tmp_path / "document.cache"
    with pytest.raises(ModelError, match="token 120, but the model has embeddings for 100"):
        save_document(small, tokenizer(), "w120 w7", get_method("streaming_llm"), 6, str(path))
    assert not path.exists()


def test_what_the_receiver_of_the_text_raises_comes_out_as_it_is(model):
    def refuse(text):
        raise ValueError("no terminal")

    with pytest.raises(ValueError, match=r"^no terminal$") as caught:
        generate_text(model, tokenizer(), "w7", on_text=refuse, max_new_tokens=3)
    assert not isinstance(caught.value, EvolKVError)
