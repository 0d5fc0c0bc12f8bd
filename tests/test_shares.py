"""Budgets as a share of each prompt: exact for every prompt, in caches, files, evaluations and searches."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

import evolkv
from evolkv import BudgetProfile, CompressedCache
from evolkv.budgets import Share, read_budget, read_budgets
from evolkv.cli.search_command import _gaps
from evolkv.errors import BudgetError, ProfileError, UsageError
from evolkv.evaluation import NaiveEngine, ReplayEngine, get_method
from evolkv.evaluation.compare import compare_records
from evolkv.evaluation.lengths import ByLength
from evolkv.integrations.kvpress import press_source
from evolkv.report.comparisons import comparisons
from evolkv.report.sources import read_sources
from evolkv.selectors import get_selector
from evolkv.tasks import Example
from tiny import KV_HEADS, LAYERS, WINDOW, padded, tiny_model, tokens

SIZE = LAYERS * KV_HEADS
SELECTOR = "snapkv:window=4"


def uneven(model, share="10%", selector=SELECTOR):
    """A profile whose heads differ, one of which has more than any prompt of a test."""
    budgets = np.random.default_rng(1).integers(9, 60, (LAYERS, KV_HEADS))
    budgets[1, 0] = 400
    return BudgetProfile.from_budgets(model, budgets, selector, share=share)


def held(cache, row=None):
    """Prompt entries that a cache holds, of one sequence of a batch."""
    heads = [head if row is None else head[row] for layer in cache.positions for head in layer]
    return sum(len(head) for head in heads)


@pytest.mark.parametrize(
    ("text", "share"), [("10%", "10%"), (" 2.5% ", "2.5%"), ("05.50%", "5.5%"), ("0.5%", "0.5%"), ("30%", "30%")]
)
def test_a_share_is_its_shortest_text(text, share):
    read = read_budget(text)
    assert isinstance(read, Share)
    assert read == share
    assert pickle.loads(pickle.dumps(read)) == read
    assert Share.of_fraction(read.fraction) == read


def test_budgets_may_be_numbers_and_shares():
    assert read_budgets("64,10%,10.0%") == [64, "10%"]
    assert read_budgets(["5%", 32]) == ["5%", 32]


def test_only_what_takes_several_budgets_says_how_to_write_them():
    for read, several in ((read_budget, False), (read_budgets, True)):
        with pytest.raises(BudgetError) as caught:
            read("64,x", "--budget")
        assert ("(several: 64,128)" in str(caught.value)) == several


@pytest.mark.parametrize("text", ["0%", "0.0%", "100%", "120%", "10 %", "-5%", "%", "1e1%", "10%%", "ten%"])
def test_what_is_no_share_is_refused_in_one_line(text):
    with pytest.raises(BudgetError, match=r"expected a share of each prompt above 0% and below 100%") as error:
        read_budget(text, "--budget")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"--budget is {text}")


def test_a_fraction_is_told_how_shares_are_written():
    with pytest.raises(BudgetError, match="such as 10%"):
        read_budget(0.1)


@pytest.mark.parametrize("length", [45, 90, 123])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "method", ["profile", SELECTOR, f"pyramid+{SELECTOR}", f"adakv+{SELECTOR}", f"cake+{SELECTOR}"]
)
def test_a_cache_holds_exactly_the_share_of_its_prompt(family, method, length):
    model = tiny_model(family)
    cache = CompressedCache.prefill(
        model, uneven(model) if method == "profile" else method, tokens(1, length), budget="20%"
    )
    assert held(cache) == round(0.2 * length) * SIZE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["profile", "", "adakv+", "cake+"])
def test_each_row_of_a_padded_batch_holds_the_share_of_its_own_length(method, side):
    model = tiny_model()
    chosen = uneven(model) if method == "profile" else method + SELECTOR
    rows, batch, mask = padded([90, 41, 64], side)
    cache = CompressedCache.prefill(model, chosen, batch, mask, "20%")
    assert [held(cache, row) for row in range(3)] == [
        round(0.2 * len(row)) * SIZE for row in (range(90), range(41), range(64))
    ]
    for number, row in enumerate(rows):
        alone = CompressedCache.prefill(model, chosen, row[None], budget="20%")
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                assert torch.equal(cache.positions[layer][head][number], alone.positions[layer][head])


def test_windows_give_what_they_cannot_hold_to_other_layers():
    model = tiny_model("gemma3")
    cache = CompressedCache.prefill(model, uneven(model), tokens(1, 200), budget="25%")
    assert held(cache) == 50 * SIZE
    for layer in range(3):
        assert all(len(head) <= WINDOW for head in cache.positions[layer])


def test_a_share_that_windows_cannot_hold_fills_them():
    model = tiny_model("mistral")
    cache = CompressedCache.prefill(model, SELECTOR, tokens(1, 200), budget="50%")
    assert held(cache) == WINDOW * SIZE
    cache = CompressedCache.prefill(model, uneven(model), tokens(1, 200), budget="50%")
    assert held(cache) == WINDOW * SIZE


def test_a_prompt_whose_share_is_too_small_keeps_what_the_selector_always_keeps():
    model = tiny_model()
    least = get_selector(SELECTOR).min_budget
    for method in (SELECTOR, uneven(model)):
        assert held(CompressedCache.prefill(model, method, tokens(1, 20), budget="5%")) == least * SIZE
        assert held(CompressedCache.prefill(model, method, tokens(1, 3), budget="5%")) == 3 * SIZE


def test_a_cache_is_used_again_for_a_prompt_of_another_length():
    model = tiny_model()
    cache = CompressedCache(model, uneven(model))
    for length in (100, 60):
        cache.reset()
        model(tokens(1, length), cache=cache, use_cache=True)
        assert held(cache) == round(0.1 * length) * SIZE


def test_compress_takes_a_share_and_decodes_on():
    model = tiny_model()
    with evolkv.compress(model, SELECTOR, "20%"):
        output = model.generate(tokens(1, 50), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = output.get("cache") or output.past_key_values
    assert held(cache) == 10 * SIZE


def test_a_prompt_in_chunks_ends_with_the_share_of_all_of_it():
    model = tiny_model()
    cache = CompressedCache.prefill(model, SELECTOR, tokens(1, 120), budget="20%", prefill_chunk=32)
    assert held(cache) == 24 * SIZE


def test_a_share_grows_with_the_conversation(tmp_path):
    model = tiny_model()
    cache = CompressedCache.prefill(model, SELECTOR, tokens(1, 60), budget="20%", evict="again")
    assert held(cache) == 12 * SIZE
    model(tokens(1, 40, seed=1), cache=cache, use_cache=True)
    assert held(cache) == 20 * SIZE
    with pytest.raises(UsageError, match="share"):
        cache.save(tmp_path / "cache")


def test_a_saved_cache_of_a_share_is_read_as_it_was(tmp_path):
    model = tiny_model()
    cache = CompressedCache.prefill(model, uneven(model), tokens(1, 100))
    cache.save(tmp_path / "cache")
    assert held(CompressedCache.load(tmp_path / "cache", model)) == held(cache) == 10 * SIZE


def test_a_profile_with_a_share_survives_its_file(tmp_path):
    model = tiny_model()
    profile = uneven(model, "2.5%")
    profile.save(tmp_path / "profile.json")
    assert json.loads((tmp_path / "profile.json").read_text())["share"] == 0.025
    read = BudgetProfile.load(tmp_path / "profile.json")
    assert read == profile
    assert (read.share, read.target) == ("2.5%", "2.5%")
    np.testing.assert_array_equal(read.budgets_at(200), profile.budgets_at(200))


def test_a_profile_without_a_share_has_the_file_it_had(tmp_path):
    model = tiny_model()
    profile = uneven(model, None)
    assert "share" not in profile.to_dict()
    assert profile.target == profile.budget
    np.testing.assert_array_equal(profile.budgets_at(50), profile.budgets)


@pytest.mark.parametrize("share", [0, 1, 1.5, "10%", 0.123456789012])
def test_a_file_with_a_wrong_share_is_refused_by_its_place(tmp_path, share):
    data = {**uneven(tiny_model()).to_dict(), "share": share}
    with pytest.raises(ProfileError, match="share"):
        BudgetProfile.from_dict(data)


def test_expanding_changes_between_numbers_and_shares():
    profile = uneven(tiny_model(), None)
    shared = profile.expand("5%")
    assert (shared.share, shared.search["expanded_from"]) == ("5%", profile.budget)
    assert shared.budgets_at(300).sum() == 15 * SIZE
    fixed = shared.expand(20)
    assert (fixed.share, fixed.total) == (None, 20 * SIZE)
    assert fixed.search["expanded_from"] == profile.budget


def test_a_uniform_profile_takes_a_share():
    model = tiny_model()
    profile = BudgetProfile.uniform(model, "10%", SELECTOR)
    assert np.unique(profile.budgets_at(90)).tolist() == [9]
    assert held(CompressedCache.prefill(model, profile, tokens(1, 90))) == 9 * SIZE


@pytest.mark.parametrize("name", ["snapkv:ratio=0.9", "pyramidkv:ratio=0.9", "adakv+snapkv:ratio=0.9,window=4"])
def test_a_compression_ratio_is_the_share_that_goes(name):
    assert get_method(name).target == "10%"
    assert get_method({"name": "snapkv", "ratio": 0.75}).target == "25%"
    assert get_method({"name": "snapkv", "ratio": 0.1 + 0.2}).target == "70%"
    assert get_method({"name": "snapkv", "ratio": 1 / 3}).target == "66.66666667%"


def test_a_ratio_that_contradicts_the_budget_is_refused():
    method = get_method("snapkv:ratio=0.9")
    assert method.at(Share("10%")).share == "10%"
    for budget in (128, Share("5%")):
        with pytest.raises(UsageError, match=f"keeps 10% of each prompt, but the budget is {budget}; leave out one"):
            method.at(budget)


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.1", "nan", "much"])
def test_a_wrong_ratio_is_refused(ratio):
    with pytest.raises(UsageError, match=f"ratio is {ratio}; expected the share of each prompt to evict"):
        get_method(f"snapkv:ratio={ratio}")


def test_a_profile_with_a_share_is_not_exported_with_fixed_budgets():
    with pytest.raises(UsageError, match="expand"):
        press_source(uneven(tiny_model(), selector="knorm"))


def examples(*words):
    text = "The baker repaired a heavy clock near the quiet river and said nothing about it. "
    return [
        Example(f"e{count}", (text * 20)[: 6 * count] + f"Number {count}:", (f"{count} and more",)) for count in words
    ]


@pytest.mark.parametrize("by_head", [True, False])
def test_replay_scores_each_example_at_its_own_share_as_the_profile_would(small, by_head):
    model, tokenizer = small
    asked, selector = examples(50, 120, 80), get_selector(SELECTOR)
    shape = (LAYERS, KV_HEADS if by_head else 1)
    candidates = np.random.default_rng(0).integers(5, 60, (3, *shape)).repeat(1 if by_head else KV_HEADS, axis=-1)
    reference = 200
    # Each at exactly the share of the prompt that it is for.
    candidates = np.stack(
        [BudgetProfile.from_budgets(model, c, SELECTOR).expand(Share("15%").of(reference)).budgets for c in candidates]
    )
    lengths = ByLength((Share("15%"),), reference, selector.min_budget, by_head)
    replay = ReplayEngine(model, tokenizer, asked, selector, ceiling=10_000, lengths=lengths)
    naive = NaiveEngine(model, tokenizer, asked, selector, lengths=lengths)
    scores = replay.score(candidates)
    np.testing.assert_allclose(scores, naive.score(candidates), rtol=1e-4)
    for row, candidate in enumerate(candidates):
        granularity = "head" if by_head else "layer"
        profile = BudgetProfile.from_budgets(model, candidate, SELECTOR, share="15%", granularity=granularity)
        for column, question in enumerate(naive.questions):
            cache = CompressedCache(model, profile)
            first = model(question.prompt, cache=cache, use_cache=True).logits[:, -1]
            assert held(cache) == round(0.15 * question.tokens) * SIZE
            (answer,) = question.scorer.score(cache, first, [question])
            assert scores[row, column] == pytest.approx(answer.score, rel=1e-4)


def test_candidates_beside_the_target_stay_as_far_beside_it():
    lengths = ByLength((Share("10%"), Share("20%")), 400, 5, True)
    candidates = np.stack([np.full((LAYERS, KV_HEADS), 44), np.full((LAYERS, KV_HEADS), 80)])
    carried = lengths.carry(candidates, 200, [200] * LAYERS)
    assert carried.mean(axis=(1, 2)).tolist() == [22, 40]
    np.testing.assert_array_equal(lengths.carry(candidates, 400, [400] * LAYERS), candidates)


MIXED = "niah:context=160 && niah:context=240"
SETTINGS = {"task": MIXED, "selector": "snapkv:window=8", "train": 2, "val": 2, "max_evals": 8, "population": 4}


@pytest.mark.parametrize("engine", ["replay", "naive"])
@pytest.mark.parametrize("strategy", ["joint", "evolkv"])
def test_a_search_at_a_share_returns_a_profile_with_it(small, engine, strategy):
    found = evolkv.search(*small, budget="10%", engine=engine, strategy=strategy, workers=1, **SETTINGS)
    longest = found.profile.search["prompt_tokens"]
    assert 232 <= longest <= 240
    assert found.profile.share == "10%"
    assert found.profile.total == round(0.1 * longest) * SIZE
    assert found.profile.budgets_at(160).sum() == 16 * SIZE


@pytest.mark.slow
def test_a_curve_may_be_of_shares(small, tmp_path):
    curve = evolkv.evolution.search_curve(*small, budgets="20%,10%", workers=1, **SETTINGS)
    assert [point["budget"] for point in curve.points] == ["10%", "20%"]
    assert [result.profile.target for result in curve.results] == ["10%", "20%"]
    assert any(row["name"] == "expanded from 20%" for row in curve.results[0].validation)
    assert " at 10% (" in _gaps(curve.results)
    # As rows of an evaluation: what the prompts hold that the scores are of, one of 160 tokens and one of 240.
    longest = curve.results[0].profile.search["prompt_tokens"]
    for point, share in zip(curve.points, (0.1, 0.2), strict=True):
        assert point["mean_budget"] == pytest.approx(share * 200, abs=1.5) != share * longest
        assert point["kv_bytes"] == point["mean_budget"] * SIZE * 2 * small[0].config.head_dim * 4
    (tmp_path / "curve.json").write_text(json.dumps(curve.to_dict()))
    sources = read_sources([tmp_path / "curve.json"])
    (group,) = comparisons(sources.rows, sources.curves, sources.profiles)
    assert {entry.name for entry in group.rivals(group.evolved[0])} >= {"uniform"}


@pytest.mark.slow
def test_a_search_that_goes_on_knows_its_share(small, tmp_path):
    settings = {**SETTINGS, "storage": str(tmp_path / "study.db"), "workers": 1}
    first = evolkv.search(*small, budget="10%", **settings)
    again = evolkv.search(*small, budget="10%", **settings)
    assert again.history == first.history
    with pytest.raises(UsageError, match="shares"):
        evolkv.search(*small, budget="10.1%", **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "1%"}, "1% of the .* tokens of the longest prompt, 2, below the floor"),
        ({"budget": "50%", "ceiling": 40}, "the ceiling is 40, below the budget of 50% of"),
    ],
)
def test_a_share_that_cannot_be_searched_at_is_refused(small, changes, message):
    with pytest.raises(BudgetError, match=message):
        evolkv.search(*small, **{**SETTINGS, **changes})


def test_a_curve_of_numbers_and_shares_is_refused(small):
    with pytest.raises(UsageError, match="not both"):
        evolkv.evolution.search_curve(*small, budgets=["10%", 64], **SETTINGS)


@pytest.fixture(scope="module")
def evaluated(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shares")
    profile = folder / "profile.json"
    uneven(small[0], "10%", "snapkv:window=8").save(profile)
    methods = ["full", "snapkv:window=8", "adakv+snapkv:window=8", str(profile)]
    rows = evolkv.evaluate(
        *small, task=MIXED, methods=methods, budgets=["10%", "20%"], samples=4, records=folder / "records.jsonl"
    )
    return rows, folder / "records.jsonl", str(profile)


def test_rows_say_the_share_and_what_was_held(evaluated):
    rows, records, profile = evaluated
    lines = [json.loads(line) for line in records.read_text().splitlines()[1:]]
    for row in rows:
        own = [each for each in lines if (each["method"], each["budget"]) == (row["method"], row["budget"])]
        if row["method"] == "full":
            continue
        expected = [Share(row["budget"]).of(each["prompt_tokens"]) for each in own]
        assert [each["mean_budget"] for each in own] == expected
        assert row["mean_budget"] == np.mean(expected)
        assert row.get("expanded_from") == ("10%" if row["method"] == profile and row["budget"] == "20%" else None)


def test_methods_on_record_are_compared_at_a_share(evaluated):
    _, records, _ = evaluated
    found = compare_records([records], "full", "snapkv:window=8", "20%")
    assert found.b == "snapkv:window=8@20%"


def test_an_evaluation_warns_where_a_share_is_less_than_is_always_kept(small, caplog):
    evolkv.evaluate(*small, task="niah:context=160", methods="snapkv", budgets="10%", samples=1)
    assert "always keeps" in caplog.text


def test_a_method_with_a_ratio_needs_no_budget(small):
    (row,) = evolkv.evaluate(*small, task="niah:context=160", methods="snapkv:window=8,ratio=0.9", samples=1)
    assert row["budget"] == "10%"
    assert row["mean_budget"] in (15, 16)
