"""The task general, and scores that count each of its examples by what budgets can gain on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import evolkv
from evolkv.errors import TaskError
from evolkv.evaluation import ReplayEngine
from evolkv.evaluation.balance import LEAST_GAIN, LEAST_LOSS, BalancedEngine
from evolkv.evaluation.scoring import text_score
from evolkv.evolution import OneBudget
from evolkv.evolution.plan import make_plan
from evolkv.selectors import get_selector
from evolkv.tasks import Task, encode_prompt, get_task
from evolkv.tasks.general import KINDS
from evolkv.tasks.protocol import under_protocol
from tiny import KV_HEADS, LAYERS

TURN = len(KINDS)
DRAWN = {"train": 5, "validation": 2, "report": 1}


@pytest.fixture(scope="module")
def drawn(tokenizer):
    return {split: get_task("general").examples(split, n * TURN, tokenizer) for split, n in DRAWN.items()}


def lengths(tokenizer, examples):
    return [encode_prompt(tokenizer, example).shape[1] for example in examples]


def test_kinds_take_turns_and_each_has_every_length(tokenizer, drawn):
    examples = drawn["train"]
    assert [example.extra["kind"] for example in examples] == list(KINDS) * 5
    for kind in range(TURN):
        sizes = sorted(lengths(tokenizer, examples[kind::TURN]))
        for length, most in zip(sizes, (400, 600, 800, 1200, 2000), strict=True):
            assert most - 150 <= length <= most


def test_the_default_training_examples_prefill_few_tokens(tokenizer):
    task = get_task("general")
    assert task.train_examples == 24
    assert sum(lengths(tokenizer, task.examples("train", 24, tokenizer))) < 25_000


def test_needles_come_in_five_languages(drawn):
    needles = [example.prompt for example in drawn["train"] if example.extra["kind"] == "needle"]
    assert len({prompt.split("\n")[3] for prompt in needles}) == 5


def test_splits_share_no_prompt_and_no_answer_that_is_a_number(drawn):
    for first, second in (("train", "validation"), ("train", "report"), ("validation", "report")):
        assert not {e.prompt for e in drawn[first]} & {e.prompt for e in drawn[second]}
        answers = [{e.references[0] for e in drawn[split] if e.extra["kind"] != "code"} for split in (first, second)]
        assert not {answer for answer in answers[0] & answers[1] if " " not in answer}


def test_more_examples_begin_with_the_fewer(tokenizer, drawn):
    assert get_task("general").examples("train", TURN, tokenizer) == drawn["train"][:TURN]
    other = get_task("general").examples("train", TURN, tokenizer, seed=1)
    assert not {example.prompt for example in other} & {example.prompt for example in drawn["train"]}


def test_what_the_target_says_is_right(drawn):
    for example in drawn["train"]:
        assert text_score(example.metric, example.target, example) == 1


def test_each_context_stands_apart_from_its_question(drawn):
    for aware, agnostic in zip(drawn["train"], under_protocol("agnostic", drawn["train"]), strict=True):
        assert agnostic.prompt + agnostic.later == aware.prompt
        assert len(agnostic.later) < 400
        # What a context says once is not what is asked, except for the answer.
        if aware.extra["kind"] in ("needle", "keys", "variables", "dialogue", "cloze", "counting"):
            assert aware.references[0] in agnostic.prompt
            assert aware.references[0] not in agnostic.later


def test_a_tokenizer_without_a_chat_template_gets_plain_texts(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    examples = get_task("general").examples("train", TURN, tokenizer)
    assert not any("<|im_start|>" in example.prompt for example in examples)
    conversation = examples[KINDS.index("dialogue")].prompt
    assert conversation.startswith("User: ")
    assert "\nAssistant: " in conversation


@pytest.mark.parametrize("context", [1, 2, 100, 600, 1000])
def test_a_context_that_is_too_small_is_refused_with_one_that_is_not(tokenizer, context):
    with pytest.raises(TaskError, match=rf"general: context={context} gives .* tokens, and needs") as error:
        get_task(f"general:context={context}").examples("train", 5 * TURN, tokenizer)
    least = int(str(error.value).rpartition("context=")[2])
    assert len(get_task(f"general:context={least}").examples("train", 5 * TURN, tokenizer)) == 5 * TURN


def test_a_length_must_be_positive():
    with pytest.raises(TaskError, match="context=0 is not a length"):
        get_task("general:context=0")


@pytest.fixture(scope="module")
def engine(small):
    return ReplayEngine(*small, get_task("niah:context=120").examples("train", 3, small[1]), get_selector("knorm"))


def test_uniform_budgets_score_a_half_and_the_full_cache_one(engine):
    uniform = np.full((LAYERS, KV_HEADS), 10)
    everything = np.full((LAYERS, KV_HEADS), 200)
    plain = engine.score(np.stack([uniform, everything]))
    balanced = BalancedEngine(engine, uniform).score(np.stack([uniform, everything]))
    np.testing.assert_allclose(balanced[0], 0.5)
    expected = 0.5 + 0.5 * np.clip((plain[1] - plain[0]) / np.maximum(plain[1] - plain[0], LEAST_GAIN), -1, 1)
    np.testing.assert_allclose(balanced[1], expected)


def test_balanced_scores_do_not_depend_on_which_examples_are_asked_for(engine):
    candidates = np.random.default_rng(0).integers(5, 60, (4, LAYERS, KV_HEADS))
    balanced = BalancedEngine(engine, np.full((LAYERS, KV_HEADS), 30))
    np.testing.assert_allclose(balanced.score(candidates, [2]), balanced.score(candidates)[:, 2:], rtol=1e-5)


def test_an_example_is_balanced_alike_whatever_was_scored_before(small, drawn):
    engine = ReplayEngine(*small, drawn["train"][:3], get_selector("knorm"))
    candidates = np.random.default_rng(0).integers(5, 60, (4, LAYERS, KV_HEADS))
    whole, resumed = (BalancedEngine(engine, np.full((LAYERS, KV_HEADS), 30)) for _ in range(2))
    for columns in ([0], [2]):
        whole.score(candidates, columns)
    assert whole.score(candidates, [0, 2]).tolist() == resumed.score(candidates, [0, 2]).tolist()


def test_losses_count_by_what_the_full_cache_takes_off_them(engine):
    budgets, uniform = np.full((3, LAYERS, KV_HEADS), 20.0), np.full((LAYERS, KV_HEADS), 10)
    losses, balanced = BalancedEngine(engine, uniform).slope(budgets, 2.0, [0, 1, 2])
    low, high = -np.log(engine.score(np.stack([uniform, np.full_like(uniform, 200)])))
    weights = 1 / np.maximum(low - high, LEAST_LOSS)
    plain, slopes = engine.slope(budgets, 2.0, [0, 1, 2])
    np.testing.assert_allclose(losses, plain)
    np.testing.assert_allclose(balanced, slopes * (weights / weights.mean())[:, None, None], rtol=1e-3, atol=1e-6)


@dataclass(frozen=True)
class Balanced(Task):
    """Needles whose scores are balanced."""

    name = "balanced"
    balanced = True

    def examples(self, split, n, tokenizer, seed=0):
        return get_task("niah:context=120").examples(split, n, tokenizer, seed)


def test_the_full_cache_is_whole_under_a_ceiling(small):
    settings = {"task": Balanced(), "budget": 24, "selector": "knorm", "start": "uniform", "granularity": "layer"}
    settings |= {"train": 2, "val": 2, "max_evals": 8, "metric": "fidelity"}
    whole, cut = (evolkv.search(*small, **settings, ceiling=ceiling) for ceiling in (None, 40))
    (free,), (bound,) = ([row for row in found.validation if row["name"] == "uniform"] for found in (whole, cut))
    assert bound == free
    assert np.max([entry["budgets"] for entry in cut.history]) <= 40
    plan = make_plan(*small, OneBudget(**settings, ceiling=40))
    assert plan.memory.recordings == make_plan(*small, OneBudget(**settings)).memory.recordings


def test_general_is_searched_and_says_that_it_was_balanced(small):
    found = evolkv.search(
        *small, task="general:context=1200", budget="20%", train=4, val=4, max_evals=8, gradient_steps=2
    )
    assert found.profile.search["balanced"] is True
    assert found.profile.share == "20%"
    uniform = next(row for row in found.validation if row["name"] == "uniform")
    assert uniform["score"] == pytest.approx(0.5, abs=1e-3)


def test_selectors_are_compared_by_what_they_retain_of_the_full_cache(small):
    found = evolkv.search(
        *small,
        task="general:context=1200",
        selector=["knorm", "streaming_llm"],
        budget="20%",
        start="uniform",
        train=2,
        val=2,
        max_evals=4,
        population=4,
    )
    retained = found.validation[0]["retained"]
    assert 0 < retained <= 1
    assert max(row["score"] for row in found.rivals) == retained
