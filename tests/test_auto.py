"""`search --budget auto`: the smallest budget that is certified on examples that no search saw."""

from __future__ import annotations

import json

import pytest

import evolkv.models
from evolkv.cli import main
from evolkv.errors import BudgetError, UsageError
from evolkv.evolution import SearchConfig
from evolkv.evolution.auto import run_auto, several
from evolkv.profile import BudgetProfile

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
    _, tokenizer = small
    wide = several(tokenizer, SearchConfig(**SETTINGS)).targets
    # Of a prompt of 200 tokens 2.5 % are the floor of 5.
    assert wide == [10, 20, 40, 80]
    narrow = several(
        tokenizer, SearchConfig(**{**SETTINGS, "selector": ["snapkv:window=4", "snapkv:window=32"]})
    ).targets
    assert narrow == [40, 80]
    with pytest.raises(BudgetError, match="leaves --budget auto less than two budgets to try"):
        several(tokenizer, SearchConfig(**{**SETTINGS, "floor": 60}))


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


def test_without_enough_examples_the_largest_budget_is_written_and_the_line_says_so(
    small, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evolkv.models, "load_model", lambda name, **options: small)
    command = ["search", "smollm2-135m", "--task", "niah:context=200", "--budget", "auto", "--loss", "0.02"]
    command += ["--selector", "snapkv:window=4", "--train", "2", "--val", "2", "--max-evals", "8", "--certify", "5"]
    assert main([*command, "--start", "uniform", "--granularity", "layer", "--json", "r.json"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    data = json.loads((tmp_path / "r.json").read_text())
    largest = max(point["budget"] for point in data["points"])
    assert f"No budget is certified to lose less than 0.02; profile.json holds the largest tried, {largest}." in printed
    assert f"{largest} loses 0.000, p 0.9039; about 149 examples are needed." in printed
    assert data["certificate"]["budget"] is None
    profile = BudgetProfile.load("profile.json")
    assert profile.budget == largest
    assert "certified" not in profile.scores


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


def test_bounds_are_checked_first(small):
    with pytest.raises(UsageError, match="--confidence is 1"):
        run_auto(*small, SearchConfig(**SETTINGS), confidence=1)
