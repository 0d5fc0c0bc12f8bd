"""Selectors: what they keep, held against definitions written out the slow way."""

from __future__ import annotations

import math

import pytest
import torch

from evolkv import BudgetProfile, CompressedCache
from evolkv.errors import UsageError
from evolkv.selectors import SELECTORS, PromptAttention, get_selector
from tiny import tokens

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 6, 2, 50, 8


def prompt(sliding_window=None, softcap=None, length=LENGTH):
    return PromptAttention(
        torch.randn(BATCH, HEADS, length, DIM),
        torch.randn(BATCH, KV_HEADS, length, DIM),
        torch.randn(BATCH, KV_HEADS, length, DIM),
        scaling=DIM**-0.5,
        softcap=softcap,
        sliding_window=sliding_window,
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
    if name in ("snapkv", "h2o"):
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
        ({"name": "snapkv", "windw": 3}, "Did you mean 'window'"),
        ({"name": "snapkv", "window": 0}, "at least 1"),
        ({"name": "snapkv", "window": True}, "expected int"),
        ({"name": "snapkv", "kernel": 4}, "odd"),
        ({"name": "snapkv", "pooling": "median"}, "'max' or 'mean'"),
        ({"window": 3}, "with a 'name'"),
        (7, "name or a mapping"),
    ],
)
def test_unusable_specs_are_refused_with_a_hint(spec, words):
    with pytest.raises(UsageError) as caught:
        get_selector(spec)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(SELECTORS))
def test_specs_round_trip(name):
    selector = get_selector(name)
    assert get_selector(selector.to_dict()) == selector


@pytest.mark.model
@pytest.mark.parametrize("name", list(SELECTORS))
def test_smaller_budgets_keep_subsets_on_smollm2(smollm2, name):
    model, _ = smollm2
    prompt_ids = tokens(1, 120) + 500
    kept = []
    for budget in (40, 60):
        cache = CompressedCache(model, BudgetProfile.uniform(model, budget, selector=name))
        with torch.inference_mode():
            model(prompt_ids, past_key_values=cache)
        kept.append(cache.positions)
    for small, large in zip(*kept, strict=True):
        for a, b in zip(small, large, strict=True):
            assert set(a.tolist()) < set(b.tolist())
