"""The search loop, on a random model with SmolLM2's tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import evolkv
from evolkv.errors import BudgetError, StudyError, UsageError
from evolkv.evaluation import NaiveEngine
from evolkv.evaluation.prefill import Prefiller, RecordingStore
from evolkv.evaluation.shards import ShardedEngine
from evolkv.evolution import OneBudget, SearchProgress, search_curve
from evolkv.evolution.choose import choose
from evolkv.evolution.kept import kept_positions
from evolkv.evolution.rivals import settled
from evolkv.evolution.study import read_studies
from evolkv.profile import BudgetProfile
from evolkv.selectors import get_selector
from evolkv.tasks import Example, encode_prompt, get_task
from tiny import KV_HEADS, LAYERS, tiny_model

#: Candidates of a generation for the budgets of `small`: one group of four layers.
GENERATION = 8
#: KV heads of `small`.
HEADS = LAYERS * KV_HEADS
SETTINGS = {
    "task": "niah:context=200",
    "budget": 48,
    "train": 2,
    "val": 2,
    "max_evals": 24,
    "seed": 0,
    "start": "uniform",
    "granularity": "layer",
}


@pytest.fixture(scope="module")
def result(small):
    progress = []
    found = evolkv.search(*small, on_progress=progress.append, **SETTINGS)
    return found, progress


def test_every_joint_candidate_has_exactly_the_target_memory(result):
    found, _ = result
    assert {np.sum(entry["budgets"]) for entry in found.history} == {48 * HEADS}
    assert {entry["cache_score"] for entry in found.history} == {1.0}
    assert found.profile.mean_budget == 48


def test_groups_of_layers_are_searched_by_two_threads_as_by_one(tokenizer):
    model = tiny_model(num_hidden_layers=16, vocab_size=len(tokenizer))
    settings = {**SETTINGS, "strategy": "evolkv", "group_size": 4, "train": 6, "max_evals": 32}
    histories = [
        evolkv.search(model, tokenizer, workers=workers, **settings, backend="local").history for workers in (2, 1)
    ]
    assert len({tuple(np.ravel(entry["budgets"])) for entry in histories[0]}) > 16
    assert histories[0] == histories[1]


def test_a_model_in_training_is_searched_without_dropout_and_left_in_training(tokenizer):
    model = tiny_model(attention_dropout=0.5, vocab_size=len(tokenizer), initializer_range=0.2)
    settings = {**SETTINGS, "task": "niah:context=120", "strategy": "start", "selector": "snapkv"}
    del settings["budget"]

    def validation():
        one = evolkv.search(model, tokenizer, budget=40, **settings)
        curve = search_curve(model, tokenizer, budgets=[40, 48], **settings)
        return [result.validation for result in (one, *curve.results)]

    plain = validation()
    model.train()
    assert validation() == plain
    assert model.training


def test_history_is_in_order_of_evaluation(result):
    found, _ = result
    generations = [entry["generation"] for entry in found.history]
    assert generations == sorted(generations)
    assert found.evaluations == len(found.history) == 24
    for entry in found.history:
        assert np.shape(entry["budgets"]) == (LAYERS, KV_HEADS)
        assert entry["fitness"] == pytest.approx(entry["score"] * 1.3)


def test_first_candidate_is_the_uniform_allocation(result):
    found, _ = result
    assert np.unique(found.history[0]["budgets"]).tolist() == [48]


def test_result_is_never_worse_on_validation_than_a_heuristic(result):
    found, _ = result
    scores = {entry["name"]: entry["score"] for entry in found.validation}
    assert set(scores) == {"best", "mean", "lukv", "uniform", "pyramid"}
    assert scores[found.chosen] == max(scores.values())
    assert found.improved == (
        max(scores["best"], scores["mean"]) > max(scores["uniform"], scores["pyramid"], scores["lukv"])
    )
    chosen = next(entry for entry in found.validation if entry["name"] == found.chosen)
    assert found.profile.budgets.tolist() == chosen["budgets"]


def test_result_is_json_and_says_where_it_came_from(result):
    found, _ = result
    data = json.loads(json.dumps(found.to_dict()))
    assert data["format"] == "evolkv.search/1"
    assert {"evaluations", "seconds", "best", "history", "validation"} <= set(data)
    assert data["best"]["fitness"] == max(entry["fitness"] for entry in data["history"])
    search = found.profile.search
    assert search["task"] == "niah:context=200"
    assert search["haystack"] == found.settings["haystack"] == "generated prose"
    assert (search["strategy"], search["seed"], search["evaluations"]) == ("joint", 0, 24)
    assert {"evolkv", "torch", "transformers", "cma"} <= set(search["versions"])


def test_progress_covers_every_stage_and_never_goes_back(result):
    _, progress = result
    for stage, total in (("prefill", 2), ("search", 24), ("validation", 2)):
        steps = [event for event in progress if event.stage == stage]
        assert [event.done for event in steps] == sorted(event.done for event in steps)
        assert steps[-1].done == steps[-1].total == total
    best = [event.best for event in progress if event.stage == "search"]
    assert best == sorted(best)


def test_same_seed_gives_the_same_history(small, result):
    again = evolkv.search(*small, **{**SETTINGS, "max_evals": 16})
    assert again.history == result[0].history[:16]


@pytest.mark.parametrize(
    ("changes", "group_mean"),
    [
        ({"strategy": "evolkv", "group_size": 2, "max_evals": 24}, True),
        ({"strategy": "random"}, False),
        ({"granularity": "head", "max_evals": 17}, False),
        ({"engine": "naive", "max_evals": 4, "population": 4, "train": 1, "val": 1}, False),
        ({"metric": "contains", "max_evals": 14}, False),
    ],
    ids=["evolkv", "random", "head", "naive", "contains"],
)
def test_every_strategy_granularity_engine_and_metric_gives_an_exact_profile(small, changes, group_mean):
    found = evolkv.search(*small, **{**SETTINGS, "max_evals": 14, **changes})
    assert found.profile.total == 48 * HEADS
    assert found.profile.budgets.min() >= 33 or found.chosen in ("uniform", "pyramid")
    scores = np.array([entry["cache_score"] for entry in found.history])
    assert (scores < 1).any() == group_mean
    if changes.get("granularity") == "head":
        assert any(np.ptp(entry["budgets"], axis=1).any() for entry in found.history)


def test_examples_of_the_profile_to_start_from_count_as_seen(small, caplog):
    settings = {**SETTINGS, "strategy": "start", "selector": "keydiff"}
    first = evolkv.search(*small, **settings).profile
    settings |= {"start": first, "train": 1}
    other = evolkv.search(*small, **{**settings, "seed": 1}).profile
    assert set(first.search["seen"]) < set(other.search["seen"])
    assert "the profile to start from" not in caplog.text
    evolkv.search(*small, **settings)
    assert "the profile to start from was evolved or chosen on 2 of the 2 validation examples" in caplog.text


def test_a_search_from_a_profile_is_under_its_selector(small, caplog):
    begun = BudgetProfile.from_budgets(small[0], [40, 60, 44, 48], selector="keydiff")
    settings = {**SETTINGS, "max_evals": GENERATION, "start": begun}
    found = evolkv.search(*small, **settings)
    assert found.profile.selector == begun.selector
    as_it_is = evolkv.search(*small, **settings, strategy="start")
    assert (as_it_is.profile.selector, as_it_is.profile.budgets.tolist()) == (begun.selector, begun.budgets.tolist())
    assert "has to beat" not in caplog.text
    assert evolkv.search(*small, **settings, selector="knorm").profile.selector["name"] == "knorm"
    assert "the profile to start from is under keydiff, and the search under knorm" in caplog.text


def test_a_profile_that_a_search_starts_from_is_among_what_it_has_to_beat(small):
    begun = BudgetProfile.from_budgets(small[0], [40, 60, 44, 48])
    found = evolkv.search(*small, **{**SETTINGS, "budget": 60, "max_evals": 14, "start": begun})
    rows = {row["name"]: row for row in found.validation}
    assert {"uniform", "pyramid", "start", "best"} <= set(rows)
    assert [name for name, row in rows.items() if not row["evolved"]] == [
        name for name in rows if name in ("uniform", "pyramid", "lukv", "start")
    ]
    budgets = np.array(rows["start"]["budgets"])
    assert budgets.sum() == 60 * HEADS
    # Brought from 48 to 60 entries, and otherwise as it was.
    assert np.corrcoef(budgets[:, 0], begun.budgets[:, 0])[0, 1] > 0.99


def test_a_search_scores_prompts_read_in_chunks_as_an_evaluation_does(small, tmp_path):
    model, tokenizer = small
    settings = {"engine": "naive", "max_evals": 4, "population": 4, "train": 1, "val": 2, "prefill_chunk": 60}
    found = evolkv.search(model, tokenizer, **{**SETTINGS, **settings}, storage=str(tmp_path / "study.db"))
    assert found.profile.search["prefill_chunk"] == found.settings["prefill_chunk"] == 60
    examples = get_task(SETTINGS["task"]).examples("validation", 2, tokenizer, SETTINGS["seed"])
    engine = NaiveEngine(model, tokenizer, examples, get_selector("snapkv"), prefill_chunk=60)
    assert engine.score(found.profile.budgets[None])[0].tolist() == pytest.approx(found.validation[0]["scores"])
    at_once = NaiveEngine(model, tokenizer, examples, get_selector("snapkv"))
    assert at_once.score(found.profile.budgets[None])[0].tolist() != pytest.approx(found.validation[0]["scores"])
    with pytest.raises(StudyError, match="prefill_chunk"):
        evolkv.search(
            model, tokenizer, **{**SETTINGS, **settings, "prefill_chunk": 64}, storage=str(tmp_path / "study.db")
        )


def test_interruption_keeps_the_best_so_far(small):
    def stop(event: SearchProgress):
        if event.stage == "search":
            raise KeyboardInterrupt

    found = evolkv.search(*small, on_progress=stop, **SETTINGS)
    assert found.interrupted
    assert found.evaluations == GENERATION
    assert found.validation == []
    assert found.profile.total == 48 * HEADS
    best = max(found.history, key=lambda entry: entry["fitness"])
    assert found.profile.budgets.tolist() == best["budgets"]
    assert found.profile.scores["train"]["score"] == best["score"]
    assert found.profile.search["interrupted"]


def test_the_training_score_in_a_profile_is_that_of_its_budgets(small):
    def stop(event: SearchProgress):
        if event.stage == "search":
            raise KeyboardInterrupt

    whole = evolkv.search(*small, **{**SETTINGS, "minibatch": 1, "max_evals": GENERATION})
    assert whole.profile.scores["train"] == {**whole.train, "metric": "logprob"}
    # Generations on examples in turn: what is left is the distribution's mean, which was not scored.
    found = evolkv.search(*small, on_progress=stop, **{**SETTINGS, "minibatch": 1, "train": 2})
    assert found.chosen == "mean"
    assert "train" not in found.profile.scores


def test_what_is_kept_of_an_example_says_where_its_answer_stands(result, small):
    found, _ = result
    (example,) = (
        e for e in get_task("niah:context=200").examples("validation", 2, small[1], 0) if e.id == found.kept["example"]
    )
    (answer,) = found.kept["answers"]
    ids = encode_prompt(small[1], example)[0]
    assert example.references[0] in small[1].decode(ids[answer["start"] : answer["end"]])
    assert answer["end"] - answer["start"] <= len(example.references[0]) + 1
    assert example.references[0] in answer["text"]


def test_budgets_of_two_names_have_one_score():
    """In bfloat16 an allocation that is scored twice differs from itself; "best" would beat what it is equal to."""

    class Noisy:
        def score(self, budgets, columns=None):
            assert len(budgets) == 2
            return np.linspace(0.2, 0.8, 2 * 3).reshape(2, 3)

    equal, other = np.full((2, 2), 8), np.array([[9, 7], [8, 8]])
    found = choose(Noisy(), {"8": {"uniform": equal, "best": equal.copy(), "mean": other}})
    assert [(row.name, row.score) for row in found["8"]] == [("mean", 0.68), ("uniform", 0.32), ("best", 0.32)]


@pytest.mark.parametrize(
    ("prompt", "answer", "there"),
    [
        ("他说密码是1234567吗?", "1234567", True),
        ("他住在北京市里。", "北京市", True),
        ("concatenate", "cat", False),
        ("It is 12345678.", "1234567", False),
    ],
)
def test_an_answer_is_found_in_text_without_spaces_but_not_within_a_word(small, prompt, answer, there):
    model, tokenizer = small
    profile = BudgetProfile.uniform(model, 48, selector="keydiff")
    found = kept_positions(model, tokenizer, Example("0", prompt, (answer,)), profile)
    assert ("answers" in found) == there


def test_interruption_during_validation_keeps_the_best_so_far(small):
    def stop(event: SearchProgress):
        if event.stage == "validation":
            raise KeyboardInterrupt

    found = evolkv.search(*small, on_progress=stop, **{**SETTINGS, "max_evals": 14})
    assert found.interrupted
    assert found.chosen == "best"


def test_interruption_after_validation_keeps_the_choice(small, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("evolkv.evolution.run.kept_positions", stop)
    found = evolkv.search(*small, **{**SETTINGS, "max_evals": 14})
    assert found.interrupted
    assert found.kept is None
    assert found.chosen == found.validation[0]["name"]


def test_interruption_before_the_first_score_is_passed_on(small):
    def stop(event: SearchProgress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evolkv.search(*small, on_progress=stop, **SETTINGS)
    assert small[0].config._attn_implementation == "sdpa"


def test_interruption_of_the_first_generation_keeps_the_descent(small, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardedEngine, "score", stop)
    settings = {**CONTEST, "selector": "snapkv:window=8"}
    found = evolkv.search(*small, budget=24, **settings)
    assert (found.interrupted, found.chosen, len(found.descent)) == (True, "gradient", 2)
    assert found.profile.budgets.tolist() == found.descent[-1]["budgets"]
    curve = search_curve(*small, budgets=[24, 32], **settings)
    assert curve.interrupted
    assert [result.profile for result in curve.results] == [found.profile]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"budget": 20}, BudgetError, "below the floor of 33; use --budget 33 or more, or a smaller window, such as"),
        ({"budget": 20}, BudgetError, "--selector snapkv:window=10"),
        ({"budget": 2, "selector": "chunkkv:window=2"}, BudgetError, "or a selector that always keeps fewer"),
        ({"budget": 200}, BudgetError, "nothing would be evicted"),
        ({"budget": 0}, BudgetError, "whole number"),
        ({"budget": "40,60"}, BudgetError, "'40,60'; evolkv.search takes one, evolkv.search_curve takes several"),
        ({"budget": [40, 60]}, BudgetError, "evolkv.search_curve takes several"),
        ({"floor": 8}, BudgetError, "always keeps 32"),
        ({"ceiling": 40}, BudgetError, "raise --ceiling"),
        ({"budget": 33}, BudgetError, "one allocation and nothing to search"),
        ({"budget": np.array([40, 48])}, BudgetError, "evolkv.search takes one"),
        ({"budget": np.array(48)}, BudgetError, "the budget is array(48); expected a whole number"),
        ({"lam": float("nan")}, UsageError, "lam"),
        ({"seed": "3"}, UsageError, "--seed is '3'"),
        ({"seed": -1}, UsageError, "--seed is -1"),
        ({"floor": "40"}, UsageError, "--floor is '40'"),
        ({"ceiling": 60.0}, UsageError, "--ceiling is 60.0"),
        ({"time_limit": "600"}, UsageError, "--time-limit is '600'"),
        ({"strategy": "jiont"}, UsageError, "Did you mean 'joint'"),
        ({"selector": "snapvk"}, UsageError, "Did you mean 'snapkv'"),
        ({"task": "nia:context=200"}, UsageError, "Did you mean 'niah'"),
        ({"metric": "logprobs"}, UsageError, "Did you mean 'logprob'"),
        ({"granularity": "heads"}, UsageError, "Did you mean 'head'"),
        ({"engine": "replai"}, UsageError, "Did you mean 'replay'"),
        ({"prefill_chunk": 64}, UsageError, "add --engine naive"),
        ({"prefill_chunk": 64, "engine": "naive", "selector": "chunkkv"}, UsageError, "reuse=1"),
        ({"train": 0}, UsageError, "--train is 0"),
        ({"val": 0}, UsageError, "--val is 0"),
        ({"gradient_steps": None}, UsageError, "--gradient-steps is None"),
        ({"group_size": None}, UsageError, "--group-size is None"),
        ({"max_evals": 0}, UsageError, "--max-evals is 0"),
        ({"strategy": "evolkv", "group_size": 0}, UsageError, "--group-size is 0"),
        ({"strategy": "evolkv", "granularity": "head"}, UsageError, "layers only"),
        ({"strategy": "evolkv", "start": "pyramid"}, UsageError, "starts from uniform"),
        ({"sigma": 0}, UsageError, "sigma must be a positive number"),
        ({"sigma": float("nan")}, UsageError, "sigma must be a positive number"),
        ({"population": 2}, UsageError, "population must be a whole number of at least 4"),
        ({"task": "niah:context=9000"}, UsageError, "more than the model's context of 8192"),
    ],
)
def test_unusable_settings_are_refused_in_one_line_and_block_no_study(small, tmp_path, changes, error, words):
    storage = tmp_path / "study.db"
    with pytest.raises(error) as caught:
        evolkv.search(*small, storage=str(storage), **{**SETTINGS, **changes})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    # A study without a generation takes other settings.
    assert not storage.exists() or not read_studies(storage)[0].stages


def test_numbers_of_numpy_are_settings_like_others(small, tmp_path):
    numbers = {"seed": np.int64(3), "population": np.int64(4), "max_evals": np.int64(4), "sigma": np.float32(0.5)}
    settings = {**SETTINGS, "task": "niah:context=120", "selector": "knorm", "storage": str(tmp_path / "study.db")}
    settings = {name: value for name, value in settings.items() if name not in numbers}
    found = evolkv.search(*small, **settings, **numbers)
    again = evolkv.search(*small, **settings, **{name: number.item() for name, number in numbers.items()})
    assert again.history == found.history


@pytest.mark.parametrize(("most", "expected"), [(GENERATION + 1, GENERATION), (2 * GENERATION, 2 * GENERATION), (3, 3)])
@pytest.mark.parametrize("strategy", ["joint", "evolkv", "random"])
def test_a_search_evaluates_no_more_candidates_than_it_may(small, strategy, most, expected):
    found = evolkv.search(*small, **{**SETTINGS, "task": "niah:context=120", "strategy": strategy, "max_evals": most})
    assert found.evaluations == len(found.history) == found.settings["max_evals"] == expected
    assert found.history[0]["budgets"] == [[48, 48]] * 4 or strategy == "evolkv"


def test_a_curve_names_a_setting_that_it_does_not_know():
    with pytest.raises(TypeError, match=r"search_curve\(\) got an unexpected keyword argument 'foo'"):
        search_curve(None, None, task="niah", budgets=[36, 40], foo=1)


@pytest.mark.parametrize("most", [GENERATION + 1, 5])
def test_a_curve_evaluates_at_most_twice_what_one_search_may(small, most):
    settings = {**SETTINGS, "task": "niah:context=120", "max_evals": most}
    del settings["budget"]
    counts = [result.evaluations for result in search_curve(*small, budgets=[36, 40, 48], **settings).results]
    assert counts[0] == min(most, GENERATION)
    assert sum(counts[1:]) <= most


def test_a_search_too_short_for_a_generation_says_so_and_is_continued_only_as_it_was(small, tmp_path, caplog):
    settings = {**SETTINGS, "task": "niah:context=120", "storage": str(tmp_path / "s.db")}
    first = evolkv.search(*small, **{**settings, "max_evals": 3})
    assert "--max-evals 3 is less than one generation of 8 candidates" in caplog.text
    assert evolkv.search(*small, **{**settings, "max_evals": 3}).history == first.history
    with pytest.raises(StudyError, match="max_evals: the study has 3, now nothing"):
        evolkv.search(*small, **{**settings, "max_evals": 16})


def test_of_several_selectors_the_best_on_unseen_examples_wins(small, tmp_path):
    selectors = ["knorm", {"name": "snapkv", "window": 8}]
    progress = []
    found = evolkv.search(
        *small, **SETTINGS, selector=selectors, storage=str(tmp_path / "s.db"), on_progress=progress.append
    )
    assert [row["selector"]["name"] for row in found.rivals] == ["knorm", "snapkv"]
    best = max(found.rivals, key=lambda row: row["score"])
    assert found.profile.selector == best["selector"]
    assert found.validation[0]["score"] == best["score"]
    rivals = [{key: row[key] for key in row if key != "seconds"} for row in found.rivals]
    assert found.profile.search["rivals"] == rivals
    assert {step.selector for step in progress} == {"knorm", "snapkv:window=8"}
    alone = evolkv.search(*small, **SETTINGS, selector=best["selector"])
    assert alone.history == found.history
    assert alone.profile.budgets.tolist() == found.profile.budgets.tolist()
    again = evolkv.search(*small, **SETTINGS, selector=selectors, storage=str(tmp_path / "s.db"))
    assert again.profile.budgets.tolist() == found.profile.budgets.tolist()


def test_interruption_of_a_later_selector_keeps_what_the_first_found(small):
    def stop(event: SearchProgress):
        if event.selector == "keydiff" and event.stage == "search":
            raise KeyboardInterrupt

    model, tokenizer = small
    settings = {**SETTINGS, "selector": ["knorm", "keydiff"], "on_progress": stop}
    found = evolkv.search(model=model, tokenizer=tokenizer, **settings)
    assert found.interrupted
    assert found.profile.selector["name"] == "knorm"
    assert found.validation
    with pytest.raises(UsageError, match="no selector"):
        evolkv.search(*small, **SETTINGS, selector=[])


def test_several_selectors_share_one_prefill_of_each_prompt(small, monkeypatch):
    computed = []
    prefill = Prefiller.__call__

    def counted(self, ids):
        computed.append(ids.shape[1])
        return prefill(self, ids)

    monkeypatch.setattr(Prefiller, "__call__", counted)
    selectors = ["knorm", "keydiff", "snapkv:window=8"]
    found = evolkv.search(*small, **SETTINGS, selector=selectors)
    assert len(computed) == SETTINGS["train"] + SETTINGS["val"]
    for row, selector in zip(found.rivals, selectors, strict=True):
        alone = evolkv.search(*small, **SETTINGS, selector=selector)
        assert alone.validation[0]["score"] == row["score"]


def test_a_full_store_leaves_prompts_to_be_prefilled_again(small):
    model, _ = small
    prefill = Prefiller(model, [get_selector("knorm")])
    recorded = prefill(torch.arange(5, 45)[None])
    size = recorded.nbytes
    store = RecordingStore(size)
    store.put("a", recorded)
    keys = recorded.kv_layers[0].held()[0].clone()
    store.put("b", prefill(torch.arange(90, 130)[None]))
    assert store.get("b", get_selector("knorm")) is None
    assert store.get("a", get_selector("keydiff")) is None
    held = store.get("a", get_selector("knorm"))
    assert torch.equal(held.kv_layers[0].held()[0], keys)


def test_validation_on_training_examples_is_refused(small, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i} " * 80, "answer": str(i)} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match="1 of 3 validation examples are training examples too"):
        evolkv.search(*small, **{**SETTINGS, "task": f"jsonl:path={path},split=all", "train": 3, "val": 3})


#: Of a search in which selectors compete.
CONTEST = {"task": "niah:context=120", "train": 2, "val": 2, "max_evals": 20, "gradient_steps": 2}


def test_by_default_selectors_compete_for_budgets_per_head(small):
    found = evolkv.search(*small, budget=12, **CONTEST)
    assert found.profile.granularity == "head"
    # A window of 32 does not fit a budget of 12.
    assert [get_selector(row["selector"]).spec for row in found.rivals] == ["chunkkv:window=2", "snapkv:window=8"]
    assert found.profile.search["start"] == "gradient"
    assert found.settings["train"]["n"] == 2
    small_share = evolkv.search(*small, budget="15%", **CONTEST)
    assert [row["selector"]["window"] for row in small_share.rivals] == [2, 8]
    assert not evolkv.search(*small, budget=12, **CONTEST, selector="knorm").rivals
    assert not evolkv.search(*small, budget=48, **CONTEST, start="uniform").rivals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": "gradient", "max_evals": 9, "population": 4, "sigma": 2.0}, "--max-evals, --population, --sigma"),
        (
            {"strategy": "start", "start": "pyramid", "max_evals": 9, "gradient_steps": 2},
            "--max-evals, --gradient-steps",
        ),
        ({"start": "uniform", "gradient_steps": 2, "group_size": 2}, "--group-size, --gradient-steps"),
        ({"strategy": "random", "max_evals": 9, "population": 4, "sigma": 2.0}, None),
        ({"max_evals": 9, "population": 4, "sigma": 2.0, "gradient_steps": 2}, None),
        ({"strategy": "evolkv", "max_evals": 9, "population": 4, "sigma": 2.0, "group_size": 2}, None),
    ],
)
def test_settings_that_are_not_used_are_named(caplog, settings, words):
    settled(None, OneBudget(task="niah:context=120", budget=24, selector="snapkv:window=8", **settings))
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == ([words] if words else [])


@pytest.mark.slow
def test_of_competing_selectors_the_best_descent_evolves(small, tmp_path):
    selectors = ["knorm", "keydiff", "snapkv:window=8"]
    settings = {**CONTEST, "budget": 24, "selector": selectors, "storage": str(tmp_path / "s.db")}
    found = evolkv.search(*small, **settings)
    evolved = [row["evaluations"] for row in found.rivals]
    assert sorted(evolved) == [0, 0, 20]
    # It is the search that this selector has alone, from its descent on.
    winner = found.rivals[evolved.index(20)]["selector"]
    alone = evolkv.search(*small, **{**settings, "selector": winner, "storage": None})
    first = evolkv.search(*small, **{**settings, "selector": winner, "storage": None, "strategy": "gradient"})
    assert alone.descent == first.descent
    assert found.profile.selector == winner
    assert (found.descent, found.history, found.validation) == (alone.descent, alone.history, alone.validation)
    descents = {row["selector"]["name"]: row["score"] for row in found.rivals}
    before = evolkv.search(*small, **{**settings, "storage": None, "strategy": "gradient"}).rivals
    assert all(row["score"] <= descents[row["selector"]["name"]] + 1e-4 for row in before)
    assert winner == max(before, key=lambda row: row["score"])["selector"]
    # The time of the winner's descent counts, too.
    (record,) = [each for each in read_studies(settings["storage"], "search") if "budget 24" in each.stages]
    recorded = sum(entry.seconds for part in record.stages.values() for entries in part for entry in entries)
    assert found.rivals[evolved.index(20)]["seconds"] >= recorded
    again = evolkv.search(*small, **settings)
    assert (again.rivals[0]["score"], again.history) == (found.rivals[0]["score"], found.history)


def test_an_interrupted_evolution_of_the_winner_leaves_what_was_chosen_among_descents(small, tmp_path):
    def stop(event: SearchProgress):
        if event.stage == "search":
            raise KeyboardInterrupt

    settings = {**CONTEST, "budget": 24, "selector": ["knorm", "keydiff"], "storage": str(tmp_path / "s.db")}
    found = evolkv.search(*small, **settings, on_progress=stop)
    assert found.interrupted
    assert found.validation
    assert all(row["score"] is not None for row in found.rivals)
    scored = []
    score = ShardedEngine.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedEngine, "score", lambda *given: scored.append(given[1]) or score(*given))
        again = evolkv.search(*small, **settings)
    whole = evolkv.search(*small, **{**settings, "storage": None})
    assert again.history == whole.history
    assert again.rivals[0]["score"] == whole.rivals[0]["score"]
    # The generations that were left, and the choice on training and validation examples: nothing of the contest.
    assert len(scored) == 20 // 10 - 1 + 2


def test_a_curve_evolves_under_the_best_descent_too(small):
    settings = {**CONTEST, "budgets": [20, 28], "selector": ["knorm", "keydiff"]}
    curve = search_curve(*small, **settings)
    evolved = [[row["evaluations"] for row in result.rivals] for result in curve.results]
    assert evolved in ([[20, 0], [20, 0]], [[0, 20], [0, 20]])


def test_the_preset_paper_is_algorithm_1_unless_told_otherwise(small):
    brief = {"task": "niah:context=120", "budget": 48, "train": 1, "val": 1, "max_evals": 8}
    found = evolkv.search(*small, preset="paper", gamma=0.5, **brief)
    of_paper = {"strategy": "evolkv", "start": "uniform", "sigma": 0.3, "group_size": 8, "lam": 0.3}
    assert of_paper.items() <= found.settings.items()
    assert found.settings["gamma"] == 0.5
    assert {"name": "snapkv", "window": 32, "kernel": 7}.items() <= found.profile.selector.items()
    assert found.profile.granularity == "layer"
    with pytest.raises(UsageError, match="Did you mean 'paper'"):
        evolkv.search(*small, preset="papr", **brief)
    with pytest.raises(UsageError, match="Did you mean 'paper'"):
        OneBudget(preset="papr", **brief)
    with pytest.raises(UsageError, match=r"give a OneBudget its settings: .*preset_settings\('paper'\)"):
        OneBudget(preset="paper", **brief)
