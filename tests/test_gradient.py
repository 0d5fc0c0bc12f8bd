"""The gradient start: soft cuts, their slope, and the descent along it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import evolkv
from evolkv.cache import soft
from evolkv.cache.replay import RankedPrompt, ReplayCache
from evolkv.cache.soft import SoftReplayCache
from evolkv.errors import RunError, UsageError
from evolkv.evaluation import ReplayEngine
from evolkv.evaluation.prefill import Prefiller
from evolkv.evolution import SearchProgress
from evolkv.evolution.gradient import Descent
from evolkv.evolution.study import read_studies
from evolkv.selectors import get_selector
from evolkv.tasks import get_task
from evolkv.tasks.protocol import under_protocol
from tiny import KV_HEADS, LAYERS, tiny_model, tokens

#: Candidates of a generation for the budgets of `small`.
GENERATION = 8
SETTINGS = {
    "task": "niah:context=200",
    "budget": 48,
    "train": 4,
    "val": 2,
    "max_evals": 28,
    "seed": 0,
    "start": "gradient",
    "gradient_steps": 5,
    "granularity": "layer",
    "selector": "snapkv",
}


def ranked(model, length, selector="snapkv:window=4"):
    which = get_selector(selector)
    return RankedPrompt.from_recorded(Prefiller(model, [which])(tokens(1, length)), which, 1000)


def logits_after(model, cache, prompt, ids):
    positions = torch.arange(prompt.tokens, prompt.tokens + ids.shape[1])[None]
    with torch.no_grad():
        return model(ids, cache=cache, position_ids=positions, use_cache=True).logits


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "qwen3_next"])
def test_very_sharp_cuts_give_what_hard_ones_give(family):
    model, ids = tiny_model(family), tokens(1, 5, seed=1)
    prompt = ranked(model, 60)
    budgets = np.random.default_rng(0).integers(5, 50, (len(prompt.keys), prompt.keys[0].shape[0]))
    budgets = budgets[None]
    hard = logits_after(model, ReplayCache(model, [prompt], budgets), prompt, ids)
    # A budget of b cuts between the ranks b - 1 and b, which stand at b - ½ and b + ½.
    sharp = SoftReplayCache(model, [prompt], torch.tensor(budgets, dtype=torch.float32), 1e4)
    torch.testing.assert_close(logits_after(model, sharp, prompt, ids), hard, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("family", "protocol", "metric"),
    [
        ("llama", "aware", "logprob"),
        ("llama", "agnostic", "fidelity"),
        ("mistral", "agnostic", "logprob"),
        ("gemma2", "aware", "logprob"),
        ("gpt_oss", "aware", "fidelity"),
        ("qwen3_next", "agnostic", "logprob"),
        ("bamba", "aware", "logprob"),
    ],
)
def test_the_slope_is_that_of_finite_differences(family, protocol, metric, tokenizer, monkeypatch):
    # Several blocks of queries, the last of them shorter.
    monkeypatch.setattr(soft, "BLOCK_BYTES", 40_000)
    model = tiny_model(family, vocab_size=len(tokenizer), max_position_embeddings=512)
    examples = under_protocol(protocol, get_task("niah:context=120").examples("train", 2, tokenizer))
    engine = ReplayEngine(model, tokenizer, examples, get_selector("snapkv:window=4"), metric)
    # Each of the two examples has budgets of its own.
    shape = 2, len(engine._held[0].prompt.keys), engine._held[0].prompt.keys[0].shape[0]
    budgets = np.random.default_rng(0).uniform(5, 60, shape)
    losses, slopes = engine.slope(budgets, 4.0, [0, 1])
    assert losses.shape == (2,)
    assert slopes.shape == shape
    steepest = np.unravel_index(np.argsort(-np.abs(slopes), axis=None)[:3], shape)
    for at in zip(*steepest, strict=True):
        step = np.zeros(shape)
        step[at] = 0.05 * budgets[at]
        above, _ = engine.slope(budgets + step, 4.0, [0, 1])
        below, _ = engine.slope(budgets - step, 4.0, [0, 1])
        assert slopes[at] == pytest.approx((above.sum() - below.sum()) / (2 * step[at]), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_slope_in_half_precision_points_where_that_in_float32_does(small, dtype):
    model, tokenizer = small
    examples = get_task("niah:context=200").examples("train", 2, tokenizer)
    budgets = np.full((2, LAYERS, KV_HEADS), 40.0)
    slopes = []
    for each in (model, tiny_copy(model, dtype)):
        engine = ReplayEngine(each, tokenizer, examples, get_selector("snapkv:window=4"))
        slopes.append(engine.slope(budgets, 3.0, [0, 1])[1].ravel())
    assert np.corrcoef(*slopes)[0, 1] > 0.9


def tiny_copy(model, dtype):
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype)


def test_the_slopes_of_examples_together_are_those_of_each(small):
    examples = get_task("niah:context=200").examples("train", 3, small[1])
    engine = ReplayEngine(*small, examples, get_selector("snapkv:window=4"))
    budgets = np.random.default_rng(0).uniform(20, 60, (3, LAYERS, KV_HEADS))
    losses, slopes = engine.slope(budgets, 3.0, [0, 1, 2])
    alone = [engine.slope(budgets[[column]], 3.0, [column]) for column in range(3)]
    np.testing.assert_allclose(losses, np.concatenate([each for each, _ in alone]), rtol=1e-4)
    np.testing.assert_allclose(slopes, np.concatenate([each for _, each in alone]), rtol=1e-2, atol=1e-7)


def test_a_slope_that_does_not_fit_into_memory_is_refused_with_the_bytes(small):
    examples = get_task("niah:context=200").examples("train", 1, small[1])
    engine = ReplayEngine(*small, examples, get_selector("snapkv:window=4"))
    engine.room = 1000
    with pytest.raises(RunError, match=r"the way back through example .* needs about .* MiB"):
        engine.slope(np.full((1, LAYERS, KV_HEADS), 40.0), 3.0, [0])


def test_a_descent_finds_the_heads_that_pay_and_keeps_the_exact_total():
    wanted = np.array([[5, 400, 5], [100, 5, 5]])
    descent = Descent((2, 3), 90, 80, floor=5, ceiling=410, points=2)
    while not descent.done:
        assert descent.budgets.sum() == 90 * 6
        assert (descent.budgets >= 5).all()
        # Every entry short of what a head wants costs.
        descent.tell(descent.folded(np.where(descent.points < wanted, -1.0, 0.0)))
    assert (descent.budgets[wanted > 5] > 0.9 * wanted[wanted > 5]).all()


def test_a_head_that_is_full_hands_the_rest_on_and_can_come_down_again():
    descent = Descent((3,), 50, 40, floor=5, ceiling=[60, 100, 100])
    for _ in range(15):
        descent.tell([-1.0, 0.0, -0.1])
    assert descent.budgets[0] == 60
    assert descent.budgets.sum() == 150
    for _ in range(20):
        descent.tell([1.0, 0.0, -0.1])
    assert descent.budgets[0] < 60
    assert descent.budgets.sum() == 150


@pytest.fixture(scope="module")
def found(small, tmp_path_factory):
    storage = str(tmp_path_factory.mktemp("studies") / "study.db")
    return evolkv.search(*small, **SETTINGS, storage=storage), storage


def test_evolution_goes_on_from_where_the_descent_ended(found):
    result, _ = found
    assert [step["generation"] for step in result.descent] == [0, 1, 2, 3, 4]
    assert result.history[0]["budgets"] == result.descent[-1]["budgets"]
    assert {np.sum(step["budgets"]) for step in result.descent} == {48 * LAYERS * KV_HEADS}
    names = {row["name"]: row for row in result.validation}
    assert names["gradient"]["budgets"] == result.descent[-1]["budgets"]
    assert result.settings["start"] == "gradient"
    assert result.to_dict()["descent"] == result.descent


def test_each_step_looks_at_some_examples_and_all_have_their_turn(found):
    result, _ = found
    seen = [[i for i, score in enumerate(step["scores"]) if score is not None] for step in result.descent]
    assert all(len(each) == 2 for each in seen)
    assert set().union(*seen) == {0, 1, 2, 3}


def test_a_descent_is_on_record_and_a_killed_one_comes_to_the_same(small, found, tmp_path):
    result, storage = found
    (record,) = read_studies(storage)
    assert [len(record.stages["gradient 48"]), len(record.stages["budget 48"])] == [5, 28 // GENERATION]

    def stop(event: SearchProgress):
        if event.stage == "gradient" and event.done == 3:
            raise KeyboardInterrupt

    own = str(tmp_path / "study.db")
    cut = evolkv.search(*small, **SETTINGS, storage=own, on_progress=stop)
    assert cut.interrupted
    assert cut.evaluations == 0
    assert cut.profile.budgets.tolist() == cut.descent[-1]["budgets"] == result.descent[2]["budgets"]
    again = evolkv.search(*small, **SETTINGS, storage=own)
    assert again.history == result.history
    assert again.descent == result.descent
    assert again.profile.budgets.tolist() == result.profile.budgets.tolist()


def test_the_strategy_gradient_is_the_descent_alone(small):
    settings = {key: value for key, value in SETTINGS.items() if key not in ("start", "max_evals")}
    result = evolkv.search(*small, **{**settings, "granularity": "head"}, strategy="gradient")
    assert result.evaluations == 1
    assert result.history[0]["budgets"] == result.descent[-1]["budgets"]


def test_joint_follows_the_slope_wherever_there_is_one(small):
    short = {**SETTINGS, "start": None, "gradient_steps": 2, "max_evals": 8}
    assert len(evolkv.search(*small, **short).descent) == 2
    for changes in ({"metric": "contains"}, {"engine": "naive", "train": 1}, {"strategy": "random"}):
        assert evolkv.search(*small, **{**short, **changes}).descent == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric": "contains"}, "metric 'contains' has no slope"),
        ({"engine": "naive"}, "engine 'naive' has no slope"),
        ({"gradient_steps": 0}, "--gradient-steps is 0"),
        ({"strategy": "evolkv"}, "starts from uniform budgets"),
        ({"strategy": "gradient", "start": "pyramid"}, "is the gradient start alone"),
    ],
)
def test_a_gradient_start_without_a_slope_is_refused(small, changes, words):
    with pytest.raises(UsageError, match=words):
        evolkv.search(*small, **{**SETTINGS, **changes})
