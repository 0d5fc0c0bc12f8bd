"""Selectors: what they keep, held against definitions written out the slow way."""

from __future__ import annotations

import gc
import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from evolkv import BudgetProfile, CompressedCache
from evolkv.allocators import ALLOCATORS
from evolkv.allocators.adaptive import ADAPTIVE
from evolkv.errors import ModelError, UsageError
from evolkv.evaluation.prefill import Prefiller
from evolkv.models.rotary import rotary_of
from evolkv.selectors import SELECTORS, LayerContext, PromptAttention, SmallKV, get_selector
from tiny import HEAD_DIM, stretching_model, tiny_model, tokens

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 6, 2, 50, 8


ROTARY = rotary_of(tiny_model(head_dim=DIM), 0)


def prompt(sliding_window=None, softcap=None, length=LENGTH, layer=0):
    return PromptAttention(
        torch.randn(BATCH, HEADS, length, DIM),
        torch.randn(BATCH, KV_HEADS, length, DIM),
        torch.randn(BATCH, KV_HEADS, length, DIM),
        scaling=DIM**-0.5,
        softcap=softcap,
        sliding_window=sliding_window,
        layer=LayerContext(layer, lambda: ROTARY),
        repeated=torch.rand(BATCH, KV_HEADS, length),
    )


def full_attention(of):
    """Softmax attention ``[batch, kv_heads, group, queries, keys]``, entry by entry from its definition."""
    group = of.query.shape[1] // of.key.shape[1]
    logits = of.query @ of.key.repeat_interleave(group, 1).transpose(2, 3) / math.sqrt(DIM)
    if of.softcap is not None:
        logits = torch.tanh(logits / of.softcap) * of.softcap
    for i in range(of.num_tokens):
        for j in range(of.num_tokens):
            if j > i or (of.sliding_window is not None and j <= i - of.sliding_window):
                logits[..., i, j] = -math.inf
    return logits.softmax(-1).unflatten(1, (of.key.shape[1], group))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 11])
def test_probabilities_are_attention(window, softcap):
    of = prompt(window, softcap)
    torch.testing.assert_close(of.probabilities(20, 30), full_attention(of)[..., 20:30, :30])


def test_sinks_take_their_share_of_the_probabilities():
    plain = prompt()
    sinks = torch.randn(plain.query.shape[1])
    logits = plain.query[:, :, 30:40] @ plain.key.repeat_interleave(len(sinks) // plain.key.shape[1], 1).transpose(2, 3)
    logits = (logits[..., :40] * plain.scaling).masked_fill(
        torch.arange(40) > torch.arange(30, 40)[:, None], -torch.inf
    )
    total = logits.exp().sum(-1, keepdim=True) + sinks.exp()[:, None, None]
    got = replace(plain, sinks=sinks).probabilities(30, 40)
    torch.testing.assert_close(got.flatten(1, 2), logits.exp() / total)


def test_probabilities_of_a_continued_prompt_are_those_of_the_whole():
    of = prompt()
    rest = PromptAttention(of.query[:, :, 30:], of.key, of.value, of.scaling, first_query=30)
    torch.testing.assert_close(rest.probabilities(40, 50), of.probabilities(40, 50))


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_snapkv_keeps_what_the_window_attends_to(pooling):
    of = prompt()
    votes = full_attention(of)[..., -4:, :-4].mean(-2)
    pooled = torch.zeros_like(votes)
    for i in range(46):
        # Mean pooling counts positions beyond the ends as zeros, as the reference implementation does.
        near = votes[..., max(0, i - 1) : i + 2]
        pooled[..., i] = near.amax(-1) if pooling == "max" else near.sum(-1) / 3
    selector = get_selector({"name": "snapkv", "window": 4, "kernel": 3, "pooling": pooling})
    scores = selector.score(of)
    torch.testing.assert_close(scores[..., :-4], pooled.mean(2))
    assert torch.isinf(scores[..., -4:]).all()


def test_snapkv_can_take_the_query_head_that_attends_most():
    of = prompt()
    selector = get_selector({"name": "snapkv", "window": 4, "kernel": 1, "gqa": "max"})
    expected = full_attention(of)[..., -4:, :-4].mean(-2).amax(2)
    torch.testing.assert_close(selector.score(of)[..., :-4], expected)


def test_keydiff_keeps_keys_unlike_the_mean():
    of = prompt()
    scores = get_selector("keydiff").score(of)
    for row, found in zip(of.key.flatten(0, 1), scores.flatten(0, 1), strict=True):
        unit = row / row.norm(dim=-1, keepdim=True)
        anchor = unit.mean(0) / unit.mean(0).norm()
        torch.testing.assert_close(found, -(unit @ anchor))


def test_chunkkv_scores_whole_chunks_alike_for_all_heads():
    of = prompt()
    selector = get_selector({"name": "chunkkv", "chunk": 8, "window": 4})
    # 50 tokens: chunks 0-7, …, 40-47 and 48-49; the window is 46-49.
    votes = full_attention(of)[..., -4:, :].mean((1, 2, 3))
    by_head = full_attention(of)[..., -4:, :].mean((2, 3))
    scores = selector.score(of)
    for start in (0, 8, 16, 24, 32):
        expected = votes[:, start : start + 8].mean(-1)
        torch.testing.assert_close(scores[..., start : start + 8], expected[:, None, None].expand(-1, KV_HEADS, 8))
    # The window's two tokens of its chunk count as the most attended older token of each head.
    highest = by_head[..., :46].amax(-1).mean(1)
    last = (votes[:, 40:46].sum(-1) + 2 * highest) / 8
    torch.testing.assert_close(scores[..., 40:46], last[:, None, None].expand(-1, KV_HEADS, 6))
    assert torch.isinf(scores[..., 46:]).all()


def test_chunkkv_keeps_the_first_tokens_of_a_chunk_that_a_budget_cuts():
    ranking = get_selector({"name": "chunkkv", "chunk": 8, "window": 4}).rank(prompt())
    chunks = ranking[0, 0, 4:].tolist()
    assert all(b == a + 1 or b % 8 == 0 for a, b in itertools.pairwise(chunks))


def test_chunkkv_uses_a_choice_for_several_layers():
    selector = get_selector({"name": "chunkkv", "window": 4, "reuse": 2})
    memory = {}
    first, second, third = (replace(prompt(), layer=LayerContext(i, lambda: ROTARY, memory)) for i in range(3))
    assert torch.equal(selector.score(first), selector.score(second))
    assert not torch.equal(selector.score(second), selector.score(third))
    # A next prompt is not judged by what is remembered of the last one.
    again = replace(prompt(), layer=first.layer)
    assert not torch.equal(selector.score(again), selector.score(first))
    assert torch.equal(selector.score(first), selector.score(second))
    # Layers that see a window only decide for themselves.
    sliding = replace(second, sliding_window=20)
    assert not torch.equal(selector.score(sliding), selector.score(second))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_chunkkv_keeps_the_same_in_a_cache_of_its_own_as_in_a_recorded_prompt(family):
    model = tiny_model(family)
    selector = get_selector({"name": "chunkkv", "chunk": 4, "window": 4})
    prefill = Prefiller(model, [selector])
    for seed in range(2):
        ids = tokens(1, 60, seed=seed)
        recorded = prefill(ids)
        # The first layer keeps everything, and decides for the second all the same.
        budgets = [[60, 60], [20, 12], [20, 12], [20, 12]]
        cache = CompressedCache(model, BudgetProfile.from_budgets(model, budgets, selector=selector.to_dict()))
        model(ids, cache=cache)
        for layer, heads, row in zip(recorded.kv_layers, cache.positions, budgets, strict=True):
            for ranking, kept, budget in zip(layer.rankings[selector][0], heads, row, strict=True):
                window = min(budget, layer.sliding_window or budget)
                assert kept.tolist() == sorted(ranking[:window].tolist())


@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize("method", ["chunkkv:window=4", "cake+adakv+chunkkv:window=4"])
def test_nothing_that_chunkkv_remembered_outlives_the_prompt(method, padding):
    model = tiny_model()
    mask = torch.ones(2, 311, dtype=torch.long)
    mask[0, :padding] = 0
    cache = CompressedCache(model, method, 12)
    model(tokens(2, 311), attention_mask=mask, cache=cache)
    recorded = Prefiller(model, [get_selector("chunkkv")])(tokens(1, 311))
    assert recorded.kv_layers[0].context.memory == {}
    del recorded, mask
    gc.collect()
    # `type(...) is` rather than isinstance, which would wake lazy modules among all objects.
    found = [x.shape for x in gc.get_objects() if type(x) is torch.Tensor and {311, 291} & set(x.shape)]
    assert not found


def test_chunkkv_remembers_each_sequence_of_a_padded_batch_on_its_own():
    model = tiny_model()
    profile = BudgetProfile.uniform(model, 12, selector={"name": "chunkkv", "chunk": 4, "window": 4})
    rows = [tokens(1, length, seed=length) for length in (30, 50)]
    ids = torch.cat([torch.nn.functional.pad(row, (50 - row.shape[1], 0)) for row in rows])
    both = CompressedCache(model, profile)
    model(ids, attention_mask=(ids != 0).long(), cache=both)
    for i, row in enumerate(rows):
        alone = CompressedCache(model, profile)
        model(row, cache=alone)
        for together, single in zip(both.positions, alone.positions, strict=True):
            assert [head[i].tolist() for head in together] == [head.tolist() for head in single]


@pytest.mark.parametrize("covariance", [True, False])
def test_expected_attention_is_that_of_normally_distributed_queries(covariance):
    of = prompt()
    selector = get_selector(
        {"name": "expected_attention", "future": 3, "sinks": 2, "covariance": covariance, "value_norm": False}
    )
    scores = selector.score(of)
    assert torch.isinf(scores[..., :2]).all()
    # One future position after another: turn each query by hand, then average the turned ones.
    positions = torch.arange(2, LENGTH)
    before = ROTARY.undo(of.query[:, :, 2:], positions)
    turned = sum(before @ ROTARY.mean_turn(torch.tensor([p]), DIM) for p in range(LENGTH, LENGTH + 3)) / 3
    logits = []
    for head in range(HEADS):
        q, k = turned[:, head], of.key[:, head // (HEADS // KV_HEADS), 2:]
        value = torch.einsum("bd,bnd->bn", q.mean(1), k) / math.sqrt(DIM)
        if covariance:
            spread = torch.stack([torch.cov(row.T, correction=0) for row in q])
            value = value + torch.einsum("bni,bij,bnj->bn", k, spread, k) / DIM / 2
        logits.append(value.softmax(-1))
    expected = torch.stack(logits, 1).unflatten(1, (KV_HEADS, -1)).mean(2)
    torch.testing.assert_close(scores[..., 2:], expected)
    with_values = get_selector(selector.to_dict() | {"value_norm": True}).score(of)
    torch.testing.assert_close(with_values[..., 2:], expected * of.value[:, :, 2:].norm(dim=-1))


def test_expected_attention_undoes_the_angles_of_the_prompt_not_those_of_a_longer_text():
    def rotary():
        return rotary_of(stretching_model("dynamic", 16), 0)

    query, key = (torch.randn(BATCH, heads, LENGTH, HEAD_DIM) for heads in (HEADS, KV_HEADS))
    of = replace(prompt(), query=query, key=key, layer=LayerContext(0, rotary))
    selector = get_selector("expected_attention:future=30,sinks=0,covariance=false,value_norm=false")
    before = rotary().undo(of.query, torch.arange(LENGTH)).mean(2)
    turned = before @ rotary().mean_turn(torch.arange(LENGTH, LENGTH + 30), HEAD_DIM)
    logits = turned.unflatten(1, (KV_HEADS, -1)) @ of.key.transpose(2, 3) * of.scaling
    torch.testing.assert_close(selector.score(of), logits.softmax(-1).mean(2))


def test_expected_attention_is_the_same_in_blocks_of_tokens(monkeypatch):
    of, selector = prompt(), get_selector("expected_attention")
    whole, ranking = selector.score(of), selector.rank(of)
    monkeypatch.setattr("evolkv.selectors.expected_attention._BLOCK", 7)
    torch.testing.assert_close(selector.score(of), whole)
    assert torch.equal(selector.rank(of), ranking)


def test_expected_attention_needs_a_model():
    with pytest.raises(ModelError, match="rotary"):
        get_selector("expected_attention").score(replace(prompt(), layer=None))


# Families whose queries are made in one of the ways that the test makes them again.
@pytest.mark.parametrize(
    "family",
    [
        *("llama", "llama3", "mistral", "mixtral", "qwen2", "qwen3", "granite", "gemma2", "gemma3", "phi3"),
        *("cohere2", "smollm3", "glm"),
    ],
)
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_rotary_embedding_is_undone(family, layer):
    model = tiny_model(family)
    attention = model.model.layers[layer].self_attn
    before, after = {}, {}

    def record(module, args, kwargs):
        before["x"] = kwargs.get("hidden_states", args[0] if args else None)

    handle = attention.register_forward_pre_hook(record, with_kwargs=True)
    profile = BudgetProfile.uniform(model, 39, selector="knorm")
    cache = CompressedCache(model, profile)
    original = cache.layers[layer].store_prompt
    cache.layers[layer].store_prompt = lambda of, padding: (after.update(query=of.query), original(of, padding))
    model(tokens(1, 40), cache=cache)
    handle.remove()
    if family == "phi3":
        projected = attention.qkv_proj(before["x"])[..., : 8 * HEAD_DIM]
    else:
        projected = attention.q_proj(before["x"])
    projected = projected.view(1, 40, 8, HEAD_DIM).transpose(1, 2)
    if hasattr(attention, "q_norm"):
        projected = attention.q_norm(projected)
    rotary, positions = rotary_of(model, layer), torch.arange(40)
    torch.testing.assert_close(rotary.undo(after["query"], positions), projected, atol=1e-5, rtol=1e-4)
    turned = projected[:, :, 7] @ rotary.mean_turn(torch.tensor([7]), HEAD_DIM)
    torch.testing.assert_close(turned, after["query"][:, :, 7], atol=1e-5, rtol=1e-4)


def test_model_without_rotary_embedding_is_named():
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=128)
    with pytest.raises(ModelError, match="no rotary position embedding"):
        rotary_of(GPT2LMHeadModel(config), 0)


def test_a_layer_that_turns_keys_in_a_way_of_its_own_is_refused(monkeypatch):
    file = "transformers.models.llama.modeling_llama.apply_rotary_pos_emb"
    monkeypatch.setattr(file, lambda query, key, cos, sin: (query * cos[:, None], key * cos[:, None]))
    model = tiny_model()
    with pytest.raises(ModelError, match="layer 0 of LlamaForCausalLM uses positions in a way that EvolKV does not kn"):
        CompressedCache.prefill(model, "expected_attention", tokens(1, 40), budget=20)
    assert len(CompressedCache.prefill(model, "snapkv", tokens(1, 40), budget=36).positions) == 4


def test_h2o_sums_attention_over_all_queries():
    of = prompt()
    scores = get_selector({"name": "h2o", "window": 4}).score(of)
    torch.testing.assert_close(scores[..., :-4], full_attention(of).sum(-2).mean(2)[..., :-4])
    assert torch.isinf(scores[..., -4:]).all()


def test_h2o_holds_no_square_matrix(monkeypatch):
    import evolkv.selectors.h2o as module

    of = prompt()
    expected = get_selector("h2o").score(of)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", BATCH * HEADS * LENGTH * 7)
    sizes = []
    original = PromptAttention.probabilities
    monkeypatch.setattr(PromptAttention, "probabilities", lambda *a: sizes.append(original(*a).numel()) or original(*a))
    torch.testing.assert_close(get_selector("h2o").score(of), expected)
    assert max(sizes) <= BATCH * HEADS * LENGTH * 7


def test_tova_keeps_what_the_last_token_attends_to_alike_for_all_heads():
    of = prompt()
    scores = get_selector("tova").score(of)
    expected = full_attention(of)[..., -1, :].flatten(1, 2).mean(1)
    torch.testing.assert_close(scores[:, 0, :-1], expected[:, :-1])
    assert torch.equal(scores[:, 0], scores[:, 1])


def test_knorm_keeps_small_keys():
    of = prompt()
    ranking = get_selector("knorm").rank(of)
    norms = of.key.norm(dim=-1).gather(-1, ranking)
    assert (norms.diff(dim=-1) >= 0).all()


def test_streaming_llm_keeps_sinks_and_recent_tokens():
    ranking = get_selector("streaming_llm").rank(prompt())
    assert ranking[0, 0, :7].tolist() == [0, 1, 2, 3, 49, 48, 47]


@pytest.mark.parametrize("name", list(SELECTORS))
def test_rankings_are_permutations_with_protected_tokens_first(name):
    selector = get_selector(name)
    ranking = selector.rank(prompt())
    assert torch.equal(ranking.sort(-1).values, torch.arange(LENGTH).expand(BATCH, KV_HEADS, LENGTH))
    if name in ("snapkv", "h2o", "chunkkv"):
        assert (ranking[..., :32] >= LENGTH - 32).all()


@pytest.mark.parametrize("name", list(SELECTORS))
@pytest.mark.parametrize("length", [1, 3, 31, 33])
def test_prompts_shorter_than_the_window_are_ranked_too(name, length):
    ranking = get_selector(name).rank(prompt(length=length))
    assert ranking.shape == (BATCH, KV_HEADS, length)


@pytest.mark.parametrize("name", list(SELECTORS))
def test_tokens_outside_the_sliding_window_come_last(name):
    ranking = get_selector(name).rank(prompt(sliding_window=20))
    assert (ranking[..., :20] >= LENGTH - 20).all()


def test_ties_are_broken_alike_at_every_budget():
    of = PromptAttention(torch.zeros(1, 2, 40, 4), torch.zeros(1, 2, 40, 4), torch.zeros(1, 2, 40, 4), 1.0)
    ranking = get_selector({"name": "snapkv", "window": 2}).rank(of)
    assert ranking[0, 0].tolist() == [38, 39, *range(38)]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("snapvk", "Did you mean 'snapkv'"),
        ("SnapKV:window=8", "unknown selector 'SnapKV'. Did you mean 'snapkv'"),
        ("snapkv,keydiff", "A comma does not separate names here; give them one by one"),
        ("snapkv:window=8,keydiff", "'keydiff' begins another one. A comma does not separate names here"),
        ("snapkv:window=8,keydiff:x=1", "'keydiff:x=1' begins another one"),
        ("pyramidkv", "a method (an allocator and a selector); give a search --start pyramid --selector snapkv"),
        ("pyramid+snapkv:window=8", "a search --start pyramid --selector snapkv:window=8, and eval --method"),
        ("cake:tau1=2+adakv+snapkv", "give a search --selector snapkv, and eval --method cake:tau1=2+adakv+snapkv"),
        ("pyramid", "'pyramid' is an allocator, not a selector; give a search --start pyramid --selector snapkv, and"),
        ("adakv", "give a search --selector snapkv, and eval --method adakv+snapkv"),
        ("lukv", "give a search --start lukv --selector snapkv"),
        ({"name": "snapkv", "windw": 3}, "Did you mean 'window'"),
        ({"name": "snapkv", "window": 0}, "at least 1"),
        ({"name": "snapkv", "window": True}, "expected int"),
        ({"name": "snapkv", "kernel": 4}, "odd"),
        ({"name": "snapkv", "pooling": "median"}, "'max' or 'mean'"),
        ({"name": "snapkv", "gqa": "sum"}, "'mean' or 'max'"),
        ({"name": "chunkkv", "chunk": 0}, "chunk is 0"),
        ({"name": "chunkkv", "window": 0}, "chunkkv: window is 0"),
        ("kvzip:chunk=0", "chunk is 0"),
        ({"name": "expected_attention", "future": 0}, "future is 0"),
        ({"name": "expected_attention", "sinks": -1}, "must not be negative"),
        ("pyramidinfer:recent=1.5", "recent is 1.5"),
        ("pyramidinfer:protected=-1", "protected is -1"),
        ("pyramidinfer:weight=0", "above 0"),
        ("pyramidinfer:sinks=-1", "0 tokens or more"),
        ({"window": 3}, "with a 'name'"),
        (7, "name or a mapping"),
    ],
)
def test_unusable_specs_are_refused_with_a_hint(spec, words):
    with pytest.raises(UsageError) as caught:
        get_selector(spec)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted({*ALLOCATORS._own, *ADAPTIVE._own, "lukv"}))
def test_an_allocator_is_not_taken_for_a_selector(name):
    with pytest.raises(UsageError, match=f"'{name}' is an allocator, not a selector; give a search "):
        get_selector(name)


@pytest.mark.parametrize("name", list(SELECTORS))
def test_specs_round_trip(name):
    selector = get_selector(name)
    assert get_selector(selector.to_dict()) == selector


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(
    # The multi-turn variant of RocketKV and SmallKV drop nothing.
    "name",
    [name for name in SELECTORS if not SELECTORS[name].prunes_prefill and name not in ("rocketkv_mt", "smallkv")],
)
def test_smaller_budgets_keep_subsets_on_smollm2(smollm2, name):
    model, _ = smollm2
    prompt_ids = tokens(1, 120) + 500
    kept = []
    for budget in (40, 60):
        cache = CompressedCache(model, BudgetProfile.uniform(model, budget, selector=name))
        with torch.inference_mode():
            model(prompt_ids, cache=cache)
        kept.append(cache.positions)
    for small, large in zip(*kept, strict=True):
        for a, b in zip(small, large, strict=True):
            assert set(a.tolist()) < set(b.tolist())


@pytest.mark.parametrize("name", list(SELECTORS))
def test_a_selector_says_whether_budgets_are_what_it_holds(name):
    assert get_selector(name).budgets_cut == (name not in ("rocketkv_mt", "smallkv"))
    assert not get_selector("rocketkv:held=40").budgets_cut


def test_a_spec_can_be_read_back_with_a_comma_in_a_value():
    selector = SmallKV(model=r"models/a,b\\")
    assert get_selector(selector.spec) == selector


@pytest.mark.parametrize("word", ["nan", "7", "1e3", "true"])
def test_a_text_is_a_parameter_also_where_it_reads_as_a_number(word):
    assert get_selector(f"smallkv:model={word}") == SmallKV(model=word)
    assert get_selector(SmallKV(model=word).spec) == SmallKV(model=word)


def test_truth_values_are_parameters_like_others():
    selector = get_selector("expected_attention:covariance=False,value_norm=true")
    assert (selector.covariance, selector.value_norm) == (False, True)
    assert get_selector(selector.spec) == selector
