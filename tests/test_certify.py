"""Budgets certified by learn-then-test: p-values by exact counting, the guarantee by simulation, and from records."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest

from evolkv.cli import main
from evolkv.errors import UsageError
from evolkv.evaluation import certify
from evolkv.evaluation.certify import certify_records, examples_needed, p_value
from evolkv.evaluation.compare import compare_records
from evolkv.evaluation.records import MethodSettings, ModelSettings, Record, RecordLog, Settings, TaskSettings

BOUND, CONFIDENCE = 0.05, 0.95
REPEATS = 1000


def at_most(k, n, p):
    """Chance of at most k successes in n trials, in exact arithmetic."""
    p = Fraction(p)
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


@pytest.mark.parametrize(("k", "n"), [(0, 59), (1, 93), (7, 200), (30, 30)])
def test_p_of_whole_losses_is_the_binomial_one(k, n):
    assert p_value(k / n, n, BOUND, exact=True) == pytest.approx(float(at_most(k, n, BOUND)), rel=1e-9)


def test_p_of_graded_losses_is_the_smaller_of_hoeffding_and_bentkus():
    mean, n = 0.02, 150
    divergence = mean * math.log(mean / BOUND) + (1 - mean) * math.log((1 - mean) / (1 - BOUND))
    bentkus = math.e * float(at_most(3, n, BOUND))
    assert p_value(mean, n, BOUND, exact=False) == pytest.approx(min(math.exp(-n * divergence), bentkus))
    assert p_value([0.05, 0.3, 1.0], n, BOUND, exact=False).tolist() == [1.0, 1.0, 1.0]


def test_examples_without_a_loss_are_safe_from_fifty_nine_on():
    assert certify([1.0] * 59, {64: [1.0] * 59}).budget == 64
    few = certify([1.0] * 58, {64: [1.0] * 58})
    assert (few.budget, few.needed) == (None, 59)


def test_testing_stops_at_the_first_budget_that_fails():
    n = 100
    scores = {32: [1.0] * n, 64: [0.0] * 20 + [1.0] * 80, 128: [1.0] * n}
    found = certify([1.0] * n, scores)
    assert [(each.budget, each.certified) for each in found.tested] == [(128, True), (64, False)]
    assert (found.budget, found.needed) == (128, None)


def test_gains_do_not_make_up_for_losses():
    full, scores = [1.0] * 10 + [0.0] * 90, [0.0] * 10 + [1.0] * 10 + [0.0] * 80
    (test,) = certify(full, {64: scores}).tested
    assert (test.loss, test.difference, test.certified) == (pytest.approx(0.1), 0.0, False)


def test_examples_needed_are_the_first_number_that_passes():
    for exact in (True, False):
        needed = examples_needed(0.0, BOUND, CONFIDENCE, exact)
        assert p_value(0.0, needed, BOUND, exact) <= 1 - CONFIDENCE < p_value(0.0, needed - 1, BOUND, exact)
    assert examples_needed(BOUND, BOUND, CONFIDENCE, True) is None
    assert examples_needed(0.03, BOUND, CONFIDENCE, True) < examples_needed(0.03, BOUND, CONFIDENCE, False)


def returned(losses, n, exact):
    """The budget that each run returns, 0 for none, given mean losses by budget, largest first, ``[runs]`` each."""
    passed = np.cumprod([p_value(mean, n, BOUND, exact) <= 1 - CONFIDENCE for mean in losses.values()], axis=0)
    return np.array([0, *losses])[passed.sum(axis=0)]


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("n", [70, 250])
def test_an_unsafe_budget_is_returned_in_one_run_of_twenty_at_most(graded, n):
    random = np.random.default_rng(n)
    # The second largest budget is barely unsafe, which is the hardest case; the losses hang together.
    expected = {128: 0.004, 64: 0.0501, 32: 0.0502, 16: 0.2}
    base, size = random.uniform(size=(REPEATS, n)), random.uniform(size=(REPEATS, n))
    losses = {
        budget: (base < 2 * mean) * size if graded else (base < mean).astype(float) for budget, mean in expected.items()
    }
    found = returned({budget: each.mean(axis=1) for budget, each in losses.items()}, n, not graded)
    wrong = np.isin(found, [64, 32, 16])
    assert wrong.sum() <= REPEATS * (1 - CONFIDENCE)
    # What is counted above is what certify returns.
    for run in range(5):
        scores = {budget: 1 - each[run] for budget, each in losses.items()}
        assert (certify(np.ones(n), scores, BOUND, CONFIDENCE).budget or 0) == found[run]


def test_resamples_of_recorded_scores_keep_the_bound():
    random = np.random.default_rng(0)
    full = random.choice([0.0, 0.25, 0.5, 1.0], size=400)
    noise = random.normal(size=400)
    population = {
        budget: np.maximum(0, full - np.clip(full - (noise > at) * random.uniform(size=400), 0, 1))
        for budget, at in {128: 2.6, 64: 1.5, 32: 1.0, 16: 0.4}.items()
    }
    expected = {budget: losses.mean() for budget, losses in population.items()}
    assert min(expected.values()) < BOUND < max(expected.values())
    drawn = random.integers(0, 400, size=(REPEATS, 300))
    found = returned({budget: losses[drawn].mean(axis=1) for budget, losses in population.items()}, 300, exact=False)
    unsafe = [budget for budget, mean in expected.items() if mean > BOUND]
    assert np.isin(found, unsafe).sum() <= REPEATS * (1 - CONFIDENCE)
    # It is of use, too.
    assert (found > 0).sum() > REPEATS / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], {8: [1.0]}, 0.0), "--loss is 0.0; expected a number above 0 and below 1"),
        (([1.0], {8: [1.0]}, 0.1, 1.0), "--confidence is 1.0"),
        (([1.0], {8: [1.0, 0.0]}), "one per example for each"),
        (([1.0], {8: [1.5]}), r"scores must be in \[0, 1\]"),
        (([1.0], {8: [math.nan]}), r"scores must be in \[0, 1\]"),
    ],
)
def test_what_cannot_be_certified_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        certify(*arguments)


def recorded(path, columns, seen=None, done=None):
    """Records of methods by label, each with a column of scores; the first `done` of them."""
    n = max(map(len, columns.values()))
    names = [f"ex {i}" for i in range(n)]
    methods = {}
    for label in columns:
        method, _, budget = label.partition("@")
        methods[label] = MethodSettings(
            method=method, budget=int(budget) if budget else None, budgets_sha256="x" if budget else None,
            selector={"name": "snapkv"} if budget else None, expanded_from=None,
            seen=seen or {} if method == "p.json" else {},
        )  # fmt: skip
    settings = Settings(
        model=ModelSettings(name="m", fingerprint="f", dtype="float32", attention="sdpa", device="cpu"),
        metric=None, protocol="aware", seed=0, samples=n, sample_ids=None, methods=methods,
        tasks={"niah": TaskSettings(fingerprint="t", examples=names)}, versions={},
    )  # fmt: skip
    log = RecordLog.open(path, settings)
    for label, column in columns.items():
        each = methods[label]
        log.add([
            Record(
                task="niah", example=name, prompt_sha256=name, prompt_tokens=200, method=each.method,
                budget=each.budget, metric="contains", protocol="aware", prediction="", first_line=False, stop=[],
                references=[""], score=score, kv_bytes=1, mean_budget=1.0,
            )
            for name, score in list(zip(names, column, strict=True))[:done]
        ])  # fmt: skip
    log.close()
    return path


def test_each_method_on_record_gets_its_smallest_safe_budget(tmp_path, capsys):
    n = 100
    path = recorded(
        tmp_path / "r.jsonl",
        {"full": [1.0] * n, "snapkv@64": [1.0] * n, "snapkv@32": [0.0, 0.0] + [1.0] * (n - 2), "tova@64": [0.0] * n},
    )
    assert main(["certify", str(path), "--json", str(tmp_path / "c.json")]) == 0
    printed = capsys.readouterr().out
    data = json.loads((tmp_path / "c.json").read_text())
    assert data["format"] == "evolkv.certificates/1"
    rows = {row["method"]: row for row in data["rows"]}
    assert (rows["snapkv"]["budget"], rows["tova"]["budget"]) == (64, None)
    assert rows["snapkv"]["needed"] == examples_needed(0.02, BOUND, CONFIDENCE, True) > n
    assert f"32 loses 0.020, p 0.1183; about {rows['snapkv']['needed']} examples are needed" in " ".join(
        printed.split()
    )
    assert "for all 2 lines at once use --confidence 0.975" in printed


def test_examples_that_a_profile_was_chosen_on_are_left_out(tmp_path, caplog):
    n = 70
    path = recorded(
        tmp_path / "r.jsonl",
        {"full": [1.0] * n, "p.json@64": [1.0] * n, "snapkv@64": [1.0] * n},
        seen={"niah": [f"ex {i}" for i in range(12)]},
    )
    rows = {method: found for _, _, method, found in certify_records(path).rows}
    assert (rows["p.json"].n, rows["p.json"].budget) == (58, None)
    assert (rows["snapkv"].n, rows["snapkv"].budget) == (70, 64)
    assert "p.json was evolved or chosen on 12 of the 70 examples of niah" in caplog.text


def test_a_profile_chosen_on_all_examples_is_refused(tmp_path):
    path = recorded(tmp_path / "r.jsonl", {"full": [1.0], "p.json@64": [1.0]}, seen={"niah": ["ex 0"]})
    with pytest.raises(UsageError, match=r"p\.json was evolved or chosen on every example of niah"):
        certify_records(path)


def test_records_of_an_evaluation_that_is_not_over_are_pointed_out(tmp_path, caplog):
    path = recorded(tmp_path / "r.jsonl", {"full": [1.0] * 80, "snapkv@64": [1.0] * 80}, done=60)
    ((*_, found),) = certify_records(path).rows
    assert (found.n, found.budget) == (60, 64)
    assert "has 60 of 80 examples of niah" in caplog.text
    caplog.clear()
    compare_records([path], "full", "snapkv")
    assert "has 60 of 80 examples of niah; repeat the evaluation's command to finish it" in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"snapkv@64": [1.0]}, "has no method full"), ({"full": [1.0]}, "has only the full cache")],
)
def test_records_without_both_sides_are_refused(tmp_path, columns, message):
    with pytest.raises(UsageError, match=message):
        certify_records(recorded(tmp_path / "r.jsonl", columns))
