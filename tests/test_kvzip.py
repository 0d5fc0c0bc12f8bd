"""KVzip: what is kept, held against a slow reference; and that reading a prompt again leaves no trace."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import evolkv
from evolkv import BudgetProfile, CompressedCache
from evolkv.cache.recording import from_rankings
from evolkv.cache.rereading import words_of
from evolkv.errors import UsageError
from evolkv.evaluation.prefill import Prefiller
from evolkv.selectors import Words, get_selector
from tiny import KV_HEADS, LAYERS, tiny_model, tokens

WORDLESS = "kvzip:words=false"
IN_PARTS = "kvzip:words=false,chunk=7,overlap=2,sinks=2"


def received(model, ids, selector):
    """What each entry of a prompt receives, ``[layers, kv_heads, tokens]``, from the model's own attention weights."""
    found = torch.zeros(LAYERS, KV_HEADS, ids.shape[1])
    for passage in selector.passages(ids[0].tolist(), None):
        read = torch.cat([ids, torch.tensor([passage.ids])], dim=1)
        sinks = min(selector.sinks, passage.start)
        chosen = [*range(sinks), *range(passage.start, passage.stop), *range(ids.shape[1], read.shape[1])]
        for layer, weights in enumerate(model(read, output_attentions=True).attentions):
            asked = weights[0, :, ids.shape[1] :]
            # A softmax over some keys: their weights, and what goes to the model's own sinks, made to sum to 1.
            other = 1 - asked.sum(-1, keepdim=True)
            among = asked[..., chosen] / (asked[..., chosen].sum(-1, keepdim=True) + other)
            part = among[..., sinks : sinks + passage.stop - passage.start].unflatten(0, (KV_HEADS, -1))
            found[layer, :, passage.start : passage.stop] = part.amax(dim=(1, 2))
    return found


def kept(cache):
    return [[head.tolist() for head in layer] for layer in cache.positions]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("spec", [WORDLESS, IN_PARTS])
def test_entries_receive_what_the_models_own_attention_gives_them(family, spec):
    model, ids, selector = tiny_model(family, attention="eager"), tokens(1, 40), get_selector(spec)
    expected = received(model, ids, selector)
    profile = BudgetProfile.uniform(model, 12, selector=spec)
    cache = CompressedCache.prefill(model, profile, ids)
    for layer, scores, positions in zip(cache.kv_layers, expected, cache.positions, strict=True):
        oldest = 0 if layer.sliding_window is None else ids.shape[1] - layer.sliding_window
        scores[:, : selector.sinks] = torch.inf
        scores[:, :oldest] = -1
        for head, found in zip(scores, positions, strict=True):
            assert found.tolist() == head.topk(12).indices.sort().values.tolist()


def test_the_passages_cover_the_prompt_and_name_what_came_before():
    selector = get_selector("kvzip:chunk=4,overlap=2")
    passages = list(selector.passages([*range(10)], Words([100], [101], [102])))
    assert [(each.start, each.stop) for each in passages] == [(0, 4), (4, 8), (8, 10)]
    assert [list(each.ids) for each in passages] == [
        [100, 102, 0, 1, 2, 3],
        [101, 2, 3, 102, 4, 5, 6, 7],
        [101, 6, 7, 102, 8, 9],
    ]


def test_reading_again_leaves_no_trace_in_the_cache():
    model, ids = tiny_model(), tokens(1, 30)
    whole = DynamicCache(config=model.config)
    model(ids, cache=whole)
    cache = CompressedCache(model, BudgetProfile.uniform(model, 9, selector=IN_PARTS))
    model(ids, cache=cache)
    assert cache.get_seq_length() == 30
    assert cache.prefill_factor == pytest.approx((30 + 30 + 4 * 2) / 30)
    for layer, plain, positions in zip(cache.kv_layers, whole.layers, cache.positions, strict=True):
        (group,) = layer.groups
        expected = torch.stack([plain.keys[0, head, at] for head, at in enumerate(positions)])
        torch.testing.assert_close(group.keys.view_as(expected), expected)


def test_a_budget_that_covers_the_prompt_changes_nothing_and_reads_nothing_again():
    model, ids = tiny_model(), tokens(1, 30)
    cache = CompressedCache(model, WORDLESS, 30)
    model(ids[:, :-1], cache=cache)
    assert cache.prefill_factor == 1
    torch.testing.assert_close(model(ids[:, -1:], cache=cache).logits[:, -1], model(ids).logits[:, -1])


@pytest.mark.parametrize("method", [IN_PARTS, f"adakv+{IN_PARTS}", f"cake+{IN_PARTS}"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_sequence_of_a_padded_batch_keeps_what_it_keeps_alone(method, side):
    model, lengths = tiny_model(), (30, 23)
    rows = [tokens(1, length, seed=length)[0] for length in lengths]
    ids, mask = torch.zeros(2, 30, dtype=torch.long), torch.zeros(2, 30, dtype=torch.long)
    for row, (own, length) in enumerate(zip(rows, lengths, strict=True)):
        place = slice(30 - length, 30) if side == "left" else slice(length)
        ids[row, place], mask[row, place] = own, 1
    together = CompressedCache.prefill(model, method, ids, mask, budget=10)
    for row, own in enumerate(rows):
        alone = CompressedCache.prefill(model, method, own[None], budget=10)
        assert [[head[row].tolist() for head in layer] for layer in together.positions] == kept(alone)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_recorded_prompt_is_ranked_as_a_cache_ranks_it(family):
    model, spec = tiny_model(family), get_selector(IN_PARTS)
    prefill = Prefiller(model, [get_selector("keydiff"), spec])
    first, second = tokens(1, 60), tokens(1, 60)
    second[0, 45:] = tokens(1, 15, seed=9)
    for ids in (first, second):
        recorded = prefill(ids)
        cache = CompressedCache.prefill(model, BudgetProfile.uniform(model, 11, selector=IN_PARTS), ids)
        held = [layer.held() for layer in recorded.kv_layers]
        rankings = [layer.rankings[spec] for layer in recorded.kv_layers]
        again = from_rankings(model, held, rankings, cache_budgets(model, 11), spec)
        assert kept(again) == kept(cache)
        assert recorded.prefill_factor(spec) == cache.prefill_factor
        assert recorded.prefill_factor(get_selector("keydiff")) == 1
    # What both prompts share was read once; each was then repeated in whole.
    repeated = sum(round((prefill(ids).prefill_factor(spec) - 1) * ids.shape[1]) for ids in (first, second))
    assert prefill.tokens_to_compute([first, second]) == 60 + 15 + repeated
    assert repeated > 2 * 60


def cache_budgets(model, budget):
    return BudgetProfile.uniform(model, budget, selector=IN_PARTS).budgets[None]


def test_layers_and_heads_can_be_ranked_together_as_in_the_paper():
    model, ids = tiny_model(), tokens(1, 40)
    scores = received(tiny_model(attention="eager"), ids, get_selector(WORDLESS))
    scores[..., :4] = torch.inf
    cache = CompressedCache.prefill(model, f"dynamickv+adakv:safeguard=0+{WORDLESS}", ids, budget=10)
    counts = torch.tensor([[len(head) for head in layer] for layer in cache.positions])
    assert counts.sum() == 10 * LAYERS * KV_HEADS
    best = torch.zeros(scores.numel()).scatter(0, scores.flatten().topk(int(counts.sum())).indices, 1)
    # A layer's total is a whole number of entries per head.
    expected = best.view_as(scores).sum((1, 2))
    assert (counts.sum(1) - expected).abs().max() <= KV_HEADS


def test_generation_under_compress_is_that_with_a_cache():
    model, ids = tiny_model(), tokens(2, 24)
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    cache = CompressedCache(model, WORDLESS, 8)
    expected = model.generate(ids, cache=cache, **settings)
    with evolkv.compress(model, WORDLESS, 8):
        assert torch.equal(model.generate(ids, **settings), expected)


@pytest.mark.parametrize(
    ("spec", "settings", "words"),
    [
        (WORDLESS, {"prefill_chunk": 8}, "leave out prefill_chunk"),
        (WORDLESS, {"evict": "again"}, "leave out prefill_chunk, evict"),
        ("kvzip", {}, "kvzip:words=false"),
    ],
)
def test_what_cannot_be_done_is_refused_when_the_cache_is_made(spec, settings, words):
    with pytest.raises(UsageError) as caught:
        CompressedCache(tiny_model(), spec, 8, **settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_models_with_recurrent_states_are_refused():
    with pytest.raises(UsageError, match="recurrent states of Qwen3NextForCausalLM cannot be taken back"):
        CompressedCache(tiny_model("qwen3_next"), WORDLESS, 8)


def test_drafts_embeddings_and_passages_beyond_the_context_are_refused():
    model = tiny_model(max_position_embeddings=64)
    cache = CompressedCache(model, WORDLESS, 8)
    with pytest.raises(UsageError, match="generate without assistance"):
        cache.activate_past_recording()
    with pytest.raises(UsageError, match="give input_ids"):
        model(inputs_embeds=torch.randn(1, 20, 64), cache=cache)
    with pytest.raises(UsageError, match="up to 40 tokens behind a prompt of 40, which are more than the 64"):
        model(tokens(1, 40), cache=cache)
    # A refused call changes nothing.
    model(tokens(1, 30), cache=cache)
    assert cache.get_seq_length() == 30


def test_of_a_row_that_is_padding_alone_nothing_is_read_again():
    model, ids = tiny_model(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1] = 0
    cache = CompressedCache.prefill(model, WORDLESS, ids, mask, budget=8)
    assert [len(head[1]) for layer in cache.positions for head in layer] == [0] * LAYERS * KV_HEADS
    alone = CompressedCache.prefill(model, WORDLESS, ids[:1], budget=8)
    assert [[head[0].tolist() for head in layer] for layer in cache.positions] == kept(alone)
    assert cache.prefill_factor == alone.prefill_factor


@pytest.mark.model
def test_the_words_are_the_papers_in_the_models_chat_template(smollm2):
    model, tokenizer = smollm2
    words = words_of(model, get_selector("kvzip"))
    assert tokenizer.decode(words.first) == "\n\nRepeat the previous context exactly."
    assert tokenizer.decode(words.later) == "\n\nRepeat the part of the previous context exactly, starting with"
    assert tokenizer.decode(words.answer) == "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.model
def test_results_say_what_reading_again_costs(smollm2):
    model, tokenizer = smollm2
    rows = evolkv.evaluate(
        model,
        tokenizer,
        task="niah:context=150",
        methods=["full", "keydiff", "kvzip"],
        budgets=16,
        samples=1,
        protocol="agnostic",
    )
    full, keydiff, kvzip = (row["prefill_factor"] for row in rows)
    assert (full, keydiff) == (1, 1)
    assert 2 < kvzip < 2.2
