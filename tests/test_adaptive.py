"""Allocators that decide for each prompt: what they give, and that the memory is what they say."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import evolkv
from evolkv.allocators.adaptive import ADAPTIVE, CAKE, AdaKV, DynamicKV
from evolkv.errors import UsageError
from evolkv.evaluation import get_method
from evolkv.evaluation.prefill import Prefiller
from evolkv.models import model_facts
from evolkv.selectors import SELECTORS, PromptAttention, get_selector
from evolkv.tasks import encode_prompt, get_task
from evolkv.tasks.metrics import get_metric
from tiny import HEAD_DIM, KV_HEADS, LAYERS, WINDOW, padded, tiny_model, tokens

INF = math.inf


def test_adakv_gives_heads_what_they_have_among_the_highest_scores():
    scores = np.array([[INF, 9, 8, 7, 6, 1, 0.5], [INF, 5, 4, 0.4, 0.3, 0.2, 0.1]])
    # Budget 4: one protected token each, 6 others. Of the 6 highest scores the heads own 4 and 2.
    assert AdaKV(safeguard=0).heads([scores], np.array([4]), 1, np.array([7])).tolist() == [[5, 3]]
    # A safeguard of 1 shares equally; one of a half goes half of the way.
    assert AdaKV(safeguard=1).heads([scores], np.array([4]), 1, np.array([7])).tolist() == [[4, 4]]
    steep = np.array([[INF, 9, 8, 7, 6, 5.5, 5.1], [INF, 5, 4, 0.4, 0.3, 0.2, 0.1]])
    assert AdaKV(safeguard=0).heads([steep], np.array([4]), 1, np.array([7])).tolist() == [[7, 1]]
    assert AdaKV(safeguard=0.5).heads([steep], np.array([4]), 1, np.array([7])).tolist() in ([[5, 3]], [[6, 2]])


def test_allocators_take_parameters_by_name():
    method = get_method("cake:tau1=2,tau2=0.4,window=8+adakv:safeguard=0+snapkv:window=8")
    assert method.layers == CAKE(tau1=2.0, tau2=0.4, window=8)
    assert method.heads == AdaKV(safeguard=0.0)
    assert method.selector == get_selector({"name": "snapkv", "window": 8})
    assert get_method("dynamickv:most=3+keydiff").layers == DynamicKV(most=3)


def test_adakv_keeps_equal_shares_where_nothing_is_left_to_decide():
    scores = np.full((2, 6), INF)
    assert AdaKV().heads([scores], np.array([4]), 1, np.array([6])).tolist() == [[4, 4]]
    assert AdaKV().heads([np.ones((2, 6))], np.array([6]), 1, np.array([6])).tolist() == [[6, 6]]


def test_cake_prefers_layers_whose_attention_is_spread_and_shifts():
    torch.manual_seed(0)
    of = PromptAttention(torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8), scaling=8**-0.5)
    cake = CAKE(tau1=1.6, tau2=0.4, window=8)
    entropy = variance = 0.0
    for head in range(4):
        logits = of.query[0, head, 32:] @ of.key[0, head // 2].T / 8**0.5
        hidden = torch.arange(40) > torch.arange(32, 40)[:, None]
        attention = logits.masked_fill(hidden, -INF).softmax(-1)[:, :32]
        entropy += -(attention * attention.log()).sum().item()
        variance += attention.var(dim=0).sum().item()
    expected = entropy ** (1 / 1.6) * variance ** (1 / 0.4)
    assert float(cake.observe(of, torch.empty(0))) == pytest.approx(expected, rel=1e-4)


def test_cake_shares_out_what_is_beyond_the_window_in_proportion():
    seen = [np.array(3.0), np.array(1.0)]
    assert CAKE(window=4).layers(seen, 12, 4, np.array([100, 100])).tolist() == [4 + 12, 4 + 4]
    # What a ceiling takes goes to the others.
    assert CAKE(window=4).layers(seen, 12, 4, np.array([14, 100])).tolist() == [14, 10]
    assert CAKE(window=4).layers([np.array(0.0)] * 2, 12, 4, np.array([100, 100])).tolist() == [12, 12]


def test_dynamickv_gives_layers_what_they_have_among_the_highest_scores():
    first = np.array([[INF, 9, 8, 7, 0.1], [INF, 6, 5, 0.1, 0.1]])
    second = np.array([[INF, 4, 0.3, 0.2, 0.1], [INF, 0.4, 0.3, 0.2, 0.1]])
    # Budget 3: 2 beyond the protected token, 8 in all, of which the first layer owns 5 and the second 3 (4, 0.4, 0.3).
    budgets = DynamicKV().layers([first, second], 3, 1, np.array([5, 5]))
    assert budgets.sum() == 6
    assert budgets.tolist() in ([4, 2], [3, 3])
    # No more than `most` times the mean may come from one layer.
    assert DynamicKV(most=1).layers([first, second], 3, 1, np.array([5, 5])).tolist() == [3, 3]


@given(
    scores=st.lists(st.lists(st.floats(0, 1), min_size=24, max_size=24), min_size=3, max_size=3),
    protected=st.integers(0, 6),
    budget=st.integers(6, 11),
    name=st.sampled_from(sorted(ADAPTIVE)),
)
def test_totals_are_exact_and_bounds_are_kept(scores, protected, budget, name):
    ceilings = np.array([12, 12, 10])
    observed = []
    for row, ceiling in zip(scores, ceilings, strict=True):
        layer = -np.sort(-np.array(row).reshape(2, 12))[:, :ceiling]
        layer[:, :protected] = INF
        observed.append(np.array(layer[0, -1]) if name == "cake" else layer)
    allocator = ADAPTIVE[name]()
    if name == "adakv":
        budgets = allocator.heads(observed, np.array([budget, budget, 9]), 6, ceilings)
        assert budgets.sum(axis=1).tolist() == [2 * budget, 2 * budget, 18]
        assert (budgets <= ceilings[:, None]).all()
    else:
        budgets = allocator.layers(observed, budget, 6, ceilings)
        assert budgets.sum() == 3 * budget
        assert (budgets <= ceilings).all()
    assert (budgets >= 6).all()


#: Selectors whose caches have no layers of their own: budgets by the prompt's attention need ours.
_PLAIN = [name for name, selector in SELECTORS.items() if selector.layer is None]
METHODS = [
    "+".join(filter(None, parts))
    for parts in itertools.product(("", "uniform", "pyramid", "cake", "dynamickv"), ("", "adakv"), _PLAIN)
]


_MIXED = ["cake+adakv+snapkv", "dynamickv+h2o", "pyramid+chunkkv"]


@pytest.mark.parametrize(
    ("family", "name"),
    [*itertools.product(["llama", "gemma3"], METHODS), *itertools.product(["gpt_oss", "bamba"], _MIXED)],
)
def test_allocators_and_selectors_go_together(family, name):
    model = tiny_model(family)
    method = get_method(name)
    window = {"window": 4} if "window" in method.selector.parameters() else {}
    # A random model has no tokenizer to put words into.
    wordless = {"words": False} if "words" in method.selector.parameters() else {}
    method = replace(method, selector=get_selector({**method.selector.to_dict(), **window, **wordless}))
    budget, length = 12, 40
    start = method.resolve(model, budget)[1]
    recorded = Prefiller(model, [method.selector], method.observers)(tokens(1, length))
    layers = recorded.kv_layers
    seen, ceilings = [layer.observations for layer in layers], model_facts(model).most_held(length)
    budgets = method.budgets_for(seen, start, ceilings)
    assert budgets.shape == (LAYERS, KV_HEADS)
    assert budgets.sum() == budget * LAYERS * KV_HEADS
    assert (budgets >= method.selector.min_budget).all()
    assert (budgets <= ceilings[:, None]).all()
    # A cache that is filled by the prompt itself holds just that.
    cache = evolkv.CompressedCache(model, method, budget)
    for _ in range(2):
        with torch.no_grad():
            model(tokens(1, length), cache=cache)
        held = [[len(positions) for positions in layer] for layer in cache.positions]
        assert held == budgets.tolist()
        cache.reset()
    # Nothing is cut from a prompt that fits.
    for everything in (np.full_like(start, length), method.resolve(model, length)[1]):
        assert (method.budgets_for(seen, everything, ceilings) >= ceilings[:, None]).all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", ["adakv+snapkv:window=4", "cake+snapkv:window=4", "dynamickv+adakv+keydiff"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_prompt_of_a_padded_batch_gets_the_budgets_that_it_has_alone(family, name, side):
    model, budget = tiny_model(family), 12
    method = get_method(name)
    if "cake" in name:
        # Temperatures that tell apart even the layers of a random model.
        method = replace(method, layers=CAKE(window=4, tau1=0.05, tau2=0.05))
    rows, ids, mask = padded([70, 48, 53], side)
    cache = evolkv.CompressedCache(model, method, budget)
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache)
    assert len({str([[len(p) for p in head] for head in layer]) for layer in cache.positions}) > 1
    for number, row in enumerate(rows):
        alone = evolkv.CompressedCache(model, method, budget)
        with torch.no_grad():
            model(row[None], cache=alone)
        for mine, its in zip(cache.positions, alone.positions, strict=True):
            assert [head[number].tolist() for head in mine] == [head.tolist() for head in its]


@pytest.mark.parametrize("name", ["adakv+tova", "dynamickv+h2o:window=4"])
def test_a_sequence_of_padding_alone_leaves_the_others_as_they_are(name):
    model, ids = tiny_model("llama"), tokens(2, 40)
    cache = evolkv.CompressedCache.prefill(model, name, ids, torch.tensor([[1], [0]]).expand(-1, 40), budget=12)
    alone = evolkv.CompressedCache.prefill(model, name, ids[:1], budget=12)
    for mine, its in zip(cache.positions, alone.positions, strict=True):
        assert [[each.tolist() for each in head] for head in mine] == [[head.tolist(), []] for head in its]


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("name", ["adakv+snapkv", "cake+snapkv", "dynamickv+adakv+chunkkv"])
def test_generating_under_a_method_gives_the_answers_of_an_evaluation(smollm2, name):
    model, tokenizer = smollm2
    example = get_task("niah:context=300").examples("report", 1, tokenizer, 0)[0]
    ids = encode_prompt(tokenizer, example)
    with evolkv.compress(model, name, budget=100):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=example.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
    cache = output.cache
    new = output.sequences.shape[1] - ids.shape[1]
    # The last token generated was never fed to the model.
    assert cache.kv_bytes == (100 + new - 1) * 90 * 2 * 64 * 4
    text = tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    score = evolkv.evaluate(model, tokenizer, task="niah:context=300", methods=[name], budgets=[100], samples=1)
    assert score[0]["score"] == get_metric(example.metric)(text, list(example.references))


@pytest.mark.parametrize(
    ("profile", "budget", "words"),
    [("full", 8, "evicts nothing"), ("snapkv", None, "needs a budget"), ("snapk", 8, "Did you mean 'snapkv'")],
)
def test_methods_that_cannot_compress_are_refused_before_anything_runs(profile, budget, words):
    model = tiny_model("llama")
    with pytest.raises(UsageError, match=words), evolkv.compress(model, profile, budget):
        pass
    with pytest.raises(UsageError, match=words):
        evolkv.CompressedCache(model, profile, budget)


def test_a_method_that_is_the_same_for_every_prompt_equals_its_profile():
    model = tiny_model("llama")
    method = get_method("pyramid+snapkv:window=4")
    start = method.resolve(model, 12)[1]
    profile = evolkv.BudgetProfile.from_budgets(model, start, method.selector, budget=12)
    expanded = evolkv.CompressedCache(model, profile, 20)
    by_name, by_profile = (
        evolkv.CompressedCache(model, "pyramid+snapkv:window=4", 12),
        evolkv.CompressedCache(model, profile),
    )
    with torch.no_grad():
        for cache in (by_name, by_profile, expanded):
            model(tokens(1, 40), cache=cache)
    assert str(by_name.positions) == str(by_profile.positions)
    assert expanded.kv_bytes * 12 == by_name.kv_bytes * 20


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *itertools.product(
            ["pyramid+snapkv:window=4", "cosine+keydiff"], [{}, {"prefill_chunk": 16}, {"evict_every": 50}]
        ),
        ("pyramid+adakv+snapkv:window=4", {}),
    ],
)
def test_layers_of_a_pyramid_get_no_more_than_the_prompt_has(name, settings):
    model = tiny_model("llama")
    entry = LAYERS * KV_HEADS * 2 * HEAD_DIM * 4
    rows, batch, mask = padded([40, 52], "left")
    for budget, held in ((36, [36, 36]), (44, [40, 44]), (60, [40, 52])):
        alone = [evolkv.CompressedCache.prefill(model, name, row[None], budget=budget, **settings) for row in rows]
        assert [cache.kv_bytes for cache in alone] == [mean * entry for mean in held]
        if settings != {"prefill_chunk": 16}:
            both = evolkv.CompressedCache.prefill(model, name, batch, mask, budget=budget, **settings)
            assert both.kv_bytes_by_sequence == [mean * entry for mean in held]


def test_a_pyramid_that_is_cut_again_is_not_saved(tmp_path):
    model = tiny_model()
    cache = evolkv.CompressedCache.prefill(model, "pyramid+keydiff", tokens(1, 40), budget=36, evict_every=8)
    with pytest.raises(UsageError, match="laid out anew"):
        cache.save(tmp_path / "a.cache")


@pytest.mark.slow
@pytest.mark.model
def test_memory_is_the_sum_of_ragged_rows_on_smollm2(smollm2, tmp_path):
    model, tokenizer = smollm2
    methods = ["snapkv", "adakv+snapkv", "cake+snapkv", "cake+adakv+chunkkv", "dynamickv+expected_attention"]
    rows = evolkv.evaluate(
        model, tokenizer, task="niah:context=300", methods=methods, budgets=[64], samples=2, metric="logprob"
    )
    entry = 2 * 64 * 4
    assert [row["kv_bytes"] for row in rows] == [64 * 30 * 3 * entry] * len(methods)
    # And they do not keep the same.
    assert len({round(row["score"], 6) for row in rows}) == len(methods)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adakv+cake+snapkv", "more than one allocator"),
        ("cake+pyramid+snapkv", "more than one allocator"),
        ("adakv+adakv+snapkv", "more than one allocator"),
        ("cak+snapkv", "Did you mean 'cake'"),
        ("cak:window=8+snapkv", "Did you mean 'cake'"),
        ("cake:windw=8+snapkv", "Did you mean 'window'"),
        ("cake:window=1.5+snapkv", "expected int like 32"),
        ("cake:window=0+snapkv", "at least 1 token"),
        ("cake:tau1=0+snapkv", "a number from 0.05 to 20"),
        ("cake:tau2=nan+snapkv", "a number from 0.05 to 20"),
        ("adakv:safeguard=1.5+snapkv", "between 0 and 1"),
        ("dynamickv:most=0+snapkv", "at least 1"),
        ("pyramid:beta=1+snapkv", "takes no parameters"),
        ("full:window=8", "takes no parameters"),
        ("cake+snapvk", "Did you mean 'snapkv'"),
        ("cake", "'cake' is an allocator, which needs a selector; write for example cake+snapkv"),
        ("snapkv:gqa=sum", "'mean' or 'max'"),
        ("snapkv:gqua=max", "Did you mean 'gqa'"),
    ],
)
def test_unusable_combinations_are_refused(name, words):
    with pytest.raises(UsageError) as caught:
        get_method(name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_selector_may_have_parameters():
    method = get_method("cake+snapkv:window=16,gqa=max")
    assert method.selector == get_selector({"name": "snapkv", "window": 16, "gqa": "max"})


def test_an_expanded_profile_holds_its_whole_budget_beside_sliding_windows(tmp_path):
    model = tiny_model("gemma3")
    evolkv.BudgetProfile.from_budgets(model, [20, 20, 8, 8], "keydiff").save(tmp_path / "p.json")
    method = get_method(str(tmp_path / "p.json"))
    windows = np.array([WINDOW, WINDOW, WINDOW, 512])
    budgets = method.resolve(model, 28)[1][:, 0]
    assert np.minimum(budgets, windows).sum() == 28 * LAYERS
    assert method.resolve(model, 14)[1][:, 0].tolist() == [20, 20, 8, 8]
    # More than all windows hold on average: each layer holds what it can.
    for budget in (147, 400):
        assert np.minimum(method.resolve(model, budget)[1][:, 0], windows).tolist() == windows.tolist()
