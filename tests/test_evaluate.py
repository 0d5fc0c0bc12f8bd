"""Methods side by side: one prefill each, and what a row says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import evolkv
from evolkv import BudgetProfile, CompressedCache
from evolkv.errors import BudgetError, ProfileError, UsageError
from evolkv.evaluation import NaiveEngine, get_method
from evolkv.evaluation.evaluation import EvaluationProgress
from evolkv.intervals import ci95
from evolkv.models import describe_model
from evolkv.selectors import SELECTORS, get_selector
from evolkv.tasks import encode_prompt, get_task
from tiny import HEAD_DIM, KV_HEADS, LAYERS, tiny_model

TASK = "niah:context=240"


@pytest.fixture(scope="module")
def rows(small, tmp_path_factory):
    model, tokenizer = small
    path = tmp_path_factory.mktemp("profiles") / "ragged.json"
    budgets = np.random.default_rng(0).integers(40, 90, size=(LAYERS, KV_HEADS))
    profile = BudgetProfile.from_budgets(model, budgets)
    profile.save(path)
    prefills, progress = [], []
    handle = model.register_forward_hook(
        lambda module, args, kwargs, output: prefills.append(kwargs.get("logits_to_keep")), with_kwargs=True
    )
    result = evolkv.evaluate(
        model,
        tokenizer,
        task=TASK,
        methods=["full", "snapkv", "pyramidkv", "streaming_llm", str(path)],
        budgets=[profile.budget, 100],
        samples=3,
        on_progress=progress.append,
    )
    handle.remove()
    return result, prefills.count(1), progress, profile, str(path)


def test_each_example_is_prefilled_once_for_all_methods_and_budgets(rows):
    result, prefills, progress, *_ = rows
    assert len(result) == 1 + 2 * 4
    assert prefills == 3
    assert progress == [EvaluationProgress(done, 3) for done in (1, 2, 3)]


def test_rows_say_what_was_measured(rows):
    result, _, _, profile, path = rows
    entry = HEAD_DIM * 2 * 4
    keys = {"model", "task", "method", "budget", "n", "metric", "score", "ci95", "kv_bytes", "mean_budget"}
    for row in result:
        assert keys <= set(row)
        assert row["n"] == 3
        assert row["metric"] == "contains"
        assert row["ci95"][0] <= row["score"] <= row["ci95"][1]
        assert row["kv_bytes"] == pytest.approx(row["mean_budget"] * LAYERS * KV_HEADS * entry)
        if row["method"] != "full":
            assert row["mean_budget"] == pytest.approx(row["budget"], abs=0.5 if row["method"] == path else 1e-9)
    full = result[0]
    assert full["method"] == "full"
    assert full["budget"] is None
    assert 232 <= full["mean_budget"] <= 240
    own, expanded = (row for row in result if row["method"] == path)
    assert own["kv_bytes"] == profile.total * entry
    assert "expanded_from" not in own
    assert expanded["expanded_from"] == profile.budget


def test_scores_equal_those_of_each_method_run_by_itself(small):
    model, tokenizer = small
    methods = ["full", "snapkv", "pyramidkv"]
    rows = evolkv.evaluate(*small, task=TASK, methods=methods, budgets=[40, 100], samples=3, metric="logprob")
    examples = get_task(TASK).examples("report", 3, tokenizer, 0)
    engine = NaiveEngine(model, tokenizer, examples, get_selector("snapkv"), metric="logprob")
    alone = engine.score(np.full((1, LAYERS, KV_HEADS), 100)).mean()
    scores = {(row["method"], row["budget"]): row["score"] for row in rows}
    assert scores["snapkv", 100] == pytest.approx(alone)
    assert scores["snapkv", 40] != pytest.approx(alone)


def test_a_model_in_training_is_scored_without_dropout_and_left_in_training(tokenizer):
    model = tiny_model(attention_dropout=0.5, vocab_size=len(tokenizer), initializer_range=0.2)
    settings = {"task": "niah:context=120", "methods": "snapkv", "budgets": 40, "samples": 2, "metric": "logprob"}
    plain = evolkv.evaluate(model, tokenizer, **settings)
    model.train().lm_head.eval()
    assert evolkv.evaluate(model, tokenizer, **settings) == plain
    assert [name for name, module in model.named_modules() if not module.training] == ["lm_head"]


def test_numbers_of_numpy_are_settings_like_others(small, tmp_path):
    numbers = {"samples": np.int64(1), "seed": np.int64(3), "block_size": np.int64(8)}
    given = {"task": TASK, "methods": "snapkv:window=4", "budgets": np.array(64)[None]}
    for each in (numbers, {name: int(number) for name, number in numbers.items()}):
        # The records of the one are those of the other.
        evolkv.evaluate(*small, **given, **each, records=tmp_path / "records.jsonl")


def test_a_profile_for_each_budget_is_one_method(small, tmp_path):
    model, tokenizer = small
    for budget in (60, 90):
        budgets = np.random.default_rng(budget).integers(40, 2 * budget - 40, size=(LAYERS, KV_HEADS))
        BudgetProfile.from_budgets(model, budgets, budget=budget).save(tmp_path / f"p-{budget}.json")
    pattern = f"{tmp_path}/p-{{}}.json"
    alone = [f"{tmp_path}/p-{budget}.json" for budget in (60, 90)]
    found = evolkv.evaluate(
        model, tokenizer, task=TASK, methods=[pattern, *alone], budgets=[60, 90], samples=1, metric="logprob"
    )
    by_name = {(row["method"], row["budget"]): row["score"] for row in found}
    assert {budget: by_name[pattern, budget] for budget in (60, 90)} == {
        budget: by_name[f"{tmp_path}/p-{budget}.json", budget] for budget in (60, 90)
    }
    with pytest.raises(ProfileError, match=r"p-70\.json"):
        evolkv.evaluate(model, tokenizer, task=TASK, methods=[pattern], budgets=[70], samples=1)
    (tmp_path / "p-70.json").write_bytes((tmp_path / "p-60.json").read_bytes())
    with pytest.raises(UsageError, match=r"p-70\.json has the budget 60, not 70"):
        get_method(pattern).at(70)
    with pytest.raises(UsageError, match="needs a budget"):
        evolkv.evaluate(model, tokenizer, task=TASK, methods=[pattern], samples=1)


#: All selectors but the one that needs a second model, and all allocators.
METHODS = [
    *(name for name in SELECTORS if name not in ("smallkv", "pyramidinfer")),
    "cosine+pyramidinfer",
    *(f"{name}+snapkv:window=8" for name in ("pyramid", "cosine", "adakv", "cake", "dynamickv", "pyramid+adakv")),
]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_evaluated_is_what_a_cache_holds(small, method):
    model, tokenizer = small
    task = get_task("niah:context=200")
    budgets = [48, 150, "40%"]  # At 150 the lowest layers of a pyramid would get more than the prompt has.
    rows = evolkv.evaluate(model, tokenizer, task=task, methods=method, budgets=budgets, samples=2, metric="logprob")
    prompts = [encode_prompt(tokenizer, each) for each in task.examples("report", 2, tokenizer)]
    for row, budget in zip(rows, budgets, strict=True):
        held = [CompressedCache.prefill(model, method, ids, budget=budget).kv_bytes for ids in prompts]
        assert row["kv_bytes"] == np.mean(held)


def test_log_probs_of_a_method_equal_those_of_a_cache_of_its_own(small):
    model, tokenizer = small
    (row,) = evolkv.evaluate(
        model, tokenizer, task=TASK, methods=["tova"], budgets=[60], samples=1, seed=3, metric="logprob"
    )
    example = get_task(TASK).examples("report", 1, tokenizer, 3)[0]
    target = tokenizer(example.target, return_tensors="pt").input_ids
    cache = CompressedCache(model, BudgetProfile.uniform(model, 60, selector="tova"))
    with torch.inference_mode():
        first = model(encode_prompt(tokenizer, example), cache=cache).logits[:, -1:]
        rest = model(target[:, :-1], cache=cache).logits
    log_probs = torch.cat([first, rest], 1).log_softmax(-1).gather(-1, target[..., None])
    assert row["score"] == pytest.approx(float(log_probs.mean().exp()), rel=1e-4)
    assert row["metric"] == "logprob"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"methods": ["snapvk"]}, UsageError, "Did you mean 'snapkv'"),
        ({"methods": ["pyramd+snapkv"]}, UsageError, "Did you mean 'pyramid'"),
        ({"methods": ["snapkv"], "budgets": []}, UsageError, "needs a budget"),
        ({"methods": ["snapkv"], "budgets": [8]}, BudgetError, "always keeps 32 tokens"),
        ({"methods": ["snapkv"], "budgets": [240]}, BudgetError, "nothing would be evicted"),
        ({"methods": ["snapkv"], "budgets": [9000]}, BudgetError, "above the model's context of 8192"),
        ({"methods": []}, UsageError, "at least one method"),
        ({"methods": ["full"], "samples": 0}, UsageError, "expected 1 to 100,000"),
        ({"methods": ["full"], "samples": 1.5}, UsageError, "--samples is 1.5"),
        ({"methods": ["snapkv"], "budgets": [64.9]}, UsageError, "the budget is 64.9; expected a whole number"),
        ({"methods": ["snapkv"], "budgets": "64;128"}, BudgetError, "the budget is '64;128'; expected a whole number"),
        ({"methods": ["snapkv"], "budgets": [True]}, BudgetError, "the budget is True; expected a whole number"),
        ({"methods": ["snapkv"], "budgets": None}, BudgetError, "the budget is None; expected a whole number"),
        ({"methods": 5}, UsageError, "5 is no method; give a profile, its path, or a name such as 'snapkv'"),
        ({"methods": ["SnapKV:gqa=max,kernel=5"]}, UsageError, "unknown method 'SnapKV'. Did you mean 'snapkv'"),
        ({"methods": "snapkv:window=8,full"}, UsageError, "'full' begins another one. A comma does not separate names"),
        ({"methods": "snapkv:ratio=0.5,tova"}, UsageError, "'tova' begins another one. A comma does"),
        ({"methods": "full,snapkv"}, UsageError, "A comma does not separate names here; give them one by one"),
        ({"methods": ["p" * 300]}, UsageError, "unknown method"),
        ({"methods": ["full"], "metric": "contain"}, UsageError, "Did you mean 'contains'"),
        ({"methods": ["snapkv"], "budgets": [-5]}, BudgetError, "the budget is -5; expected a whole number"),
        (
            {"methods": ["adakv"]},
            UsageError,
            "'adakv' is an allocator, which needs a selector; write for example adakv+sn",
        ),
        ({"methods": ["missing.json"]}, UsageError, "missing.json"),
        ({"methods": ["snapkv"], "budgets": torch.tensor(64)}, BudgetError, "the budget is tensor(64); expected"),
        ({"methods": ["full"], "seed": "3"}, UsageError, "--seed is '3'; expected a whole number"),
        ({"methods": ["full"], "sample_ids": [0]}, UsageError, "--sample-ids is [0]; expected ids of examples"),
        ({"methods": ["full"], "sample_ids": 0}, UsageError, "--sample-ids is 0; expected ids of examples"),
    ],
)
def test_unusable_requests_are_refused_in_one_line(small, arguments, error, words):
    model, tokenizer = small
    with pytest.raises(error) as caught:
        evolkv.evaluate(model, tokenizer, **{"task": TASK, "budgets": [64], "samples": 1, **arguments})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "metric"),
    [pytest.param("smollm2", "contains", marks=[pytest.mark.model, pytest.mark.slow]), ("small", "logprob")],
)
def test_prompts_read_in_chunks_score_as_each_method_does_by_itself(model, metric, tmp_path, request):
    model, tokenizer = request.getfixturevalue(model)
    shape = describe_model(model)
    budgets = np.random.default_rng(0).integers(40, 90, size=(shape.num_layers, shape.num_kv_heads))
    profile = BudgetProfile.from_budgets(model, budgets, selector="keydiff")
    profile.save(tmp_path / "ragged.json")
    settings = {"task": TASK, "samples": 2, "metric": metric}
    methods = ["full", "snapkv", str(tmp_path / "ragged.json")]
    rows = evolkv.evaluate(model, tokenizer, **settings, methods=methods, budgets=[profile.budget], prefill_chunk=70)
    assert [row["prefill_chunk"] for row in rows] == [70] * 3
    (full,) = evolkv.evaluate(model, tokenizer, **settings, methods=["full"])
    assert rows[0]["score"] == pytest.approx(full["score"], rel=1e-4)
    assert rows[0]["kv_bytes"] == full["kv_bytes"]
    assert rows[2]["kv_bytes"] == profile.total * shape.head_dim * 2 * 4
    examples = get_task(TASK).examples("report", 2, tokenizer, 0)
    of_method = {"snapkv": np.full(budgets.shape, profile.budget), "keydiff": budgets}
    for row, (selector, held) in zip(rows[1:], of_method.items(), strict=True):
        engine = NaiveEngine(model, tokenizer, examples, get_selector(selector), metric, prefill_chunk=70)
        assert row["score"] == pytest.approx(engine.score(held[None]).mean(), rel=1e-4)


def test_what_is_evicted_while_a_prompt_is_read_is_not_there_for_later_chunks(small):
    settings = {"task": TASK, "methods": ["keydiff"], "budgets": [40], "samples": 1, "metric": "logprob"}
    rows = [evolkv.evaluate(*small, **settings, prefill_chunk=chunk)[0] for chunk in (None, 240, 60)]
    assert rows[1]["score"] == pytest.approx(rows[0]["score"], rel=1e-4)
    assert rows[2]["score"] != pytest.approx(rows[0]["score"], rel=1e-2)
    assert rows[2]["kv_bytes"] == rows[0]["kv_bytes"]


@pytest.mark.parametrize(
    ("method", "chunk", "words"),
    [
        ("adakv+snapkv", 64, "lays out budgets once, for the whole prompt"),
        ("chunkkv", 64, "reuse=1"),
        ("snapkv", 3, "at least 4 tokens"),
    ],
)
def test_methods_that_cannot_read_prompts_in_chunks_are_refused_beforehand(small, method, chunk, words):
    with pytest.raises(UsageError, match=words):
        evolkv.evaluate(*small, task=TASK, methods=["full", method], budgets=[64], samples=1, prefill_chunk=chunk)


def test_one_method_and_one_budget_need_no_lists(small, tmp_path):
    model, tokenizer = small
    profile = BudgetProfile.uniform(model, 48, selector="snapkv:window=8")
    profile.save(tmp_path / "p.json")
    settings = {"task": TASK, "samples": 1, "metric": "logprob"}
    (row,) = evolkv.evaluate(model, tokenizer, **settings, methods="snapkv:window=8", budgets=48)
    same = [
        get_selector("snapkv:window=8"),
        {"name": "snapkv", "window": 8},
        profile,
        tmp_path / "p.json",
        str(tmp_path / "p.json"),
        get_method("uniform+snapkv:window=8"),
    ]
    rows = evolkv.evaluate(model, tokenizer, **settings, methods=same[2:], budgets=np.int64(48))
    rows += [evolkv.evaluate(model, tokenizer, **settings, methods=spec, budgets="48")[0] for spec in same]
    # Several methods are rows of one batch, which rounds otherwise.
    assert [found["score"] for found in rows] == [pytest.approx(row["score"], abs=1e-6)] * len(rows)
    assert {found["budget"] for found in rows} == {48}
    curve = evolkv.evaluate(model, tokenizer, **settings, methods="snapkv:window=8", budgets="48, 64")
    assert [found["budget"] for found in curve] == [48, 64]


def test_method_names_of_the_field_are_known():
    assert get_method("pyramidkv:window=8").selector == get_method("pyramid+snapkv:window=8").selector
    assert get_method("pyramidkv").allocator == "pyramid"
    assert get_method("uniform+tova").selector == get_selector("tova")
    assert get_method("full").selector is None


def test_interval_is_wilsons_for_right_or_wrong_scores():
    # Wilson 1927 for 45 of 50, to four digits.
    assert ci95(np.array([1.0] * 45 + [0.0] * 5)) == pytest.approx((0.7864, 0.9565), abs=1e-4)
    low, high = ci95(np.ones(50))
    assert low == pytest.approx(0.9287, abs=1e-4)
    assert high == 1.0


def test_interval_of_graded_scores_holds_the_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        low, high = ci95(random.beta(2, 3, size=40))
        hits += low <= 0.4 <= high
    assert hits >= 52


def test_a_pyramid_holds_its_whole_budget_of_a_prompt_shorter_than_its_lowest_layer(small):
    for budget in (150, 200):
        rows = evolkv.evaluate(
            *small, task=TASK, methods=["pyramidkv", "pyramid+keydiff"], budgets=[budget], samples=1, metric="logprob"
        )
        assert [row["mean_budget"] for row in rows] == pytest.approx([budget, budget])
