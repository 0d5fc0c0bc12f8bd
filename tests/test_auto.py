"""`search --budget auto`: the smallest budget that is certified on examples that no search saw."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import evolkv.models
from evolkv.cli import main
from evolkv.errors import BudgetError, RunError, UsageError
from evolkv.evaluation.records import prompt_digest
from evolkv.evolution import SearchConfig
from evolkv.evolution.auto import run_auto, several
from evolkv.profile import BudgetProfile
from evolkv.tasks import get_task
from tiny import tiny_model

SETTINGS = {
    "task": "niah:context=200",
    "selector": "snapkv:window=4",
    "train": 2,
    "val": 2,
    "max_evals": 8,
    "seed": 0,
    "start": "uniform",
}


@pytest.fixture(scope="module")
def safe(small):
    """A random model answers nothing, and so loses nothing at any budget."""
    return run_auto(*small, SearchConfig(**SETTINGS), samples=60)


def test_the_grid_is_of_the_longest_prompt_and_leaves_out_what_is_below_the_floor(small):
    model, tokenizer = small
    wide = several(model, tokenizer, SearchConfig(**SETTINGS)).targets
    # Of a prompt of 200 tokens 2.5 % are the floor of 5.
    assert wide == [10, 20, 40, 80]
    narrow = several(
        model, tokenizer, SearchConfig(**{**SETTINGS, "selector": ["snapkv:window=4", "snapkv:window=32"]})
    ).targets
    assert narrow == [40, 80]
    with pytest.raises(BudgetError, match="leaves --budget auto less than two budgets to try"):
        several(model, tokenizer, SearchConfig(**{**SETTINGS, "floor": 60}))


def test_the_grid_leaves_out_what_the_layers_cannot_hold(tokenizer):
    settings = SearchConfig(**SETTINGS)
    # Three of four layers have a window of 24, the fourth sees all 200 tokens: 68 on average.
    model = tiny_model("gemma3", vocab_size=len(tokenizer), max_position_embeddings=8192)
    assert several(model, tokenizer, settings).targets == [10, 20, 40]
    assert several(model, tokenizer, replace(settings, ceiling=30)).targets == [10, 20]


def test_the_smallest_safe_profile_has_its_certificate(safe):
    tested = [each.budget for each in safe.certificate.tested]
    assert tested == [point["budget"] for point in safe.curve.points][::-1]
    assert safe.certificate.budget == safe.profile.budget == min(tested)
    certified = safe.profile.scores["certified"]
    assert (certified["loss"], certified["confidence"], certified["n"], certified["observed"]) == (0.05, 0.95, 60, 0.0)
    assert certified["p"] == pytest.approx(0.95**60)


def test_it_is_certified_on_examples_that_no_search_saw(safe):
    # None of the sixty had to be left out.
    assert safe.certificate.n == 60


def test_the_examples_that_choose_the_budget_count_as_seen(small, safe):
    asked = set(map(prompt_digest, get_task(SETTINGS["task"]).examples("report", 60, small[1])))
    assert len(asked) == 60
    assert asked < set(safe.profile.search["seen"])
    assert not any(asked & set(each.profile.search["seen"]) for each in safe.curve.results)


def test_without_enough_examples_the_largest_budget_is_written_and_the_line_says_so(
    small, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evolkv.models, "load_model", lambda name, **options: small)
    command = ["search", "smollm2-135m", "--task", "niah:context=200", "--budget", "auto", "--loss", "0.02"]
    command += ["--selector", "snapkv:window=4", "--train", "2", "--val", "2", "--max-evals", "8", "--certify", "5"]
    assert main([*command, "--start", "uniform", "--granularity", "layer", "--json", "r.json"]) == 0
    said = capsys.readouterr().out
    printed = " ".join(said.split())
    data = json.loads((tmp_path / "r.json").read_text())
    largest = max(point["budget"] for point in data["points"])
    assert f"No budget is certified to lose less than 0.02; profile.json holds the largest tried, {largest}." in printed
    assert f"{largest} loses 0.000, p 0.9039; about 149 examples are needed." in printed
    assert data["certificate"]["budget"] is None
    profile = BudgetProfile.load("profile.json")
    assert profile.budget == largest
    assert "certified" not in profile.scores
    # It ends as other searches do.
    assert "Gap between the 2 training examples and the validation examples: " in said
    assert said.count("every generation to profile.study.db\n\nTry next:\n") == 1
    assert f"--budget {largest} --method full snapkv:window=4 profile.json\n" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "64", "--loss", "0.1"], "--loss, --confidence and --certify are for --budget auto"),
        (["--budget", "auto", "--loss", "2"], "--loss is 2.0; expected a number above 0 and below 1"),
    ],
)
def test_options_that_make_no_sense_are_refused_first(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["search", "smollm2-135m", "--task", "niah", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["search", "plan"])
def test_the_curve_begins_where_the_command_says(small, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evolkv.models, "load_model", lambda name, **options: small)
    begun = []
    for place in ("evolkv.evolution.auto.run_curve", "evolkv.evolution.plan.make_plan"):
        monkeypatch.setattr(place, lambda model, tokenizer, config: begun.append(config.first) or raising(RunError)())
    options = ["--task", "niah:context=200", "--budget", "auto", "--first", "largest", "--selector", "snapkv:window=4"]
    assert main([command, "smollm2-135m", *options, "--storage", "none"]) == 1
    assert begun == ["largest"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"confidence": 1}, "--confidence is 1"),
        ({"samples": 200_000}, "--certify is 200000; expected 1 to 100,000 examples"),
        ({"samples": 0}, "--certify is 0"),
        ({"loss": 1e-5}, "to certify a loss below 1e-05 with confidence 0.95 takes more than 100,000 examples"),
        ({"loss": 1e-8}, "use a larger --loss"),
    ],
)
def test_what_cannot_be_certified_is_refused_first(small, wrong, message):
    with pytest.raises(UsageError, match=message):
        run_auto(*small, SearchConfig(**SETTINGS, on_progress=pytest.fail), **wrong)


def raising(error):
    def call(*given, **named):
        raise error

    return call


def test_the_searches_outlive_a_certification_that_is_stopped_or_fails(small, safe, monkeypatch):
    largest = safe.curve.results[-1].profile
    with monkeypatch.context() as before_the_first_example:
        before_the_first_example.setattr("evolkv.evolution.auto.evaluate", raising(KeyboardInterrupt))
        early = run_auto(*small, SearchConfig(**SETTINGS), samples=2)
    late = run_auto(*small, SearchConfig(**SETTINGS), samples=2, on_example=raising(KeyboardInterrupt))
    for stopped in (early, late):
        assert (stopped.certificate, stopped.failed, stopped.profile) == (None, None, largest)
        assert stopped.to_dict("p.json")["interrupted"]
    failed = run_auto(*small, SearchConfig(**SETTINGS), samples=2, on_example=raising(RunError("no room")))
    assert (failed.certificate, failed.interrupted, failed.profile) == (None, False, largest)
    assert str(failed.failed) == "no room"


def test_the_profile_is_written_where_certification_fails(small, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evolkv.models, "load_model", lambda name, **options: small)
    monkeypatch.setattr("evolkv.evolution.auto.evaluate", raising(RunError("no room")))
    command = ["search", "smollm2-135m", "--task", "niah:context=200", "--budget", "auto", "--start", "uniform"]
    command += ["--selector", "snapkv:window=4", "--train", "2", "--val", "2", "--max-evals", "8"]
    assert main([*command, "--granularity", "layer"]) == 1
    assert "profile.json holds the largest budget" in " ".join(capsys.readouterr().err.split())
    assert BudgetProfile.load("profile.json").budget == 80
