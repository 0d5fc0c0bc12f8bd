"""What a search will take, said before it begins; and that it is what the engines say."""

from __future__ import annotations

import json

import pytest

import evolkv
import evolkv.models
from evolkv.cli import main
from evolkv.cli.plan import lines
from evolkv.errors import BudgetError
from evolkv.evaluation import ReplayEngine
from evolkv.evolution import OneBudget, SeveralBudgets
from evolkv.evolution import plan as module
from evolkv.evolution.one_budget import run_search
from evolkv.evolution.plan import make_plan
from evolkv.selectors import get_selector
from evolkv.tasks import get_task

SETTINGS = {"task": "niah:context=200", "train": 4, "val": 2, "max_evals": 24, "gradient_steps": 4}
SETTINGS |= {"granularity": "layer", "selector": "snapkv"}


def test_every_stage_of_a_search_has_its_time(small):
    found = make_plan(*small, OneBudget(budget=48, **SETTINGS))
    assert list(found.seconds) == ["prefill", "calibration", "gradient", "evolution", "validation"]
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.candidates == evolkv.search(*small, budget=48, **SETTINGS).evaluations
    assert found.fits
    assert found.advice == []
    data = json.loads(json.dumps(found.to_dict()))
    assert data["format"] == "evolkv.plan/1"
    assert data["seconds"]["total"] == pytest.approx(sum(found.seconds.values()))
    assert data["bytes"]["peak"] >= data["bytes"]["process"] + data["bytes"]["recordings"]


def test_recordings_are_those_that_the_engine_holds(small):
    model, tokenizer = small
    for ceiling in (None, 100):
        plan = make_plan(model, tokenizer, OneBudget(budget=48, ceiling=ceiling, **SETTINGS))
        examples = get_task(SETTINGS["task"]).examples("train", 4, tokenizer, 0)
        engine = ReplayEngine(model, tokenizer, examples, get_selector("snapkv"), "logprob", ceiling)
        assert plan.memory.recordings == pytest.approx(engine.held_bytes, rel=0.02)


def test_a_budget_that_the_search_refuses_is_refused(small):
    for run in (make_plan, run_search):
        with pytest.raises(BudgetError, match="a smaller window, such as --selector snapkv:window=10"):
            run(*small, OneBudget(budget=20, **SETTINGS))


def test_a_text_metric_has_no_gradient(small):
    found = make_plan(*small, OneBudget(budget=48, metric="contains", **SETTINGS))
    assert found.seconds["gradient"] == found.memory.gradient == 0
    assert found.seconds["evolution"] > 0


def test_a_descent_alone_evolves_nothing(small):
    settings = {**SETTINGS, "strategy": "gradient"}
    found = make_plan(*small, OneBudget(budget=48, **settings))
    result = evolkv.search(*small, budget=48, **settings)
    assert found.candidates == result.evaluations == result.settings["max_evals"] == 1
    assert "for 1 candidate (" in lines(found)[0]


def test_the_naive_engine_reads_for_every_candidate(small):
    settings = {**SETTINGS, "max_evals": 8}
    found = make_plan(*small, OneBudget(budget=48, engine="naive", **settings))
    assert found.seconds["prefill"] == found.memory.recordings == 0
    assert found.seconds["evolution"] > 0


def test_budgets_and_selectors_are_searched_one_after_the_other(small):
    one = make_plan(*small, OneBudget(budget=48, **SETTINGS))
    curve = SeveralBudgets(budgets=[40, 48, 56], **{**SETTINGS, "selector": ["snapkv", "keydiff"]})
    found = make_plan(*small, curve)
    # The first budget has all candidates that were asked for, the others together as many again; one selector evolves.
    assert found.candidates == one.candidates + 2 * (one.candidates // 2 // 8 * 8)
    assert found.seconds["gradient"] > 3 * one.seconds["gradient"]
    assert found.memory.recordings == pytest.approx(2 * one.memory.recordings, rel=0.2)


def test_what_does_not_fit_is_said_with_what_would(small, monkeypatch):
    settings = {**SETTINGS, "train": 9}
    wide = make_plan(*small, OneBudget(budget=48, **settings)).memory
    working = wide.needed - wide.recordings
    monkeypatch.setattr(module, "free_memory", lambda model: int((working + 0.7 * wide.recordings) / 0.9))
    found = make_plan(*small, OneBudget(budget=48, **settings))
    assert not found.fits
    assert any(line.startswith("--train 6 (now 9)") for line in found.advice)
    assert any(line.startswith("--ceiling ") for line in found.advice)
    assert make_plan(*small, OneBudget(budget=48, **{**SETTINGS, "train": 6})).fits


def test_the_command_takes_the_options_of_a_search_and_records_nothing(small, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evolkv.models, "load_model", lambda name, **options: small)
    command = ["plan", "smollm2-135m", "--task", "niah:context=200", "--budget", "40,48", "--train", "4", "--val", "2"]
    assert main([*command, "--max-evals", "24", "--gradient-steps", "4", "--json", "plan.json"]) == 0
    printed = capsys.readouterr().out
    assert "Time, once the model is loaded: about" in printed
    assert "GiB at the peak" in printed
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
