"""Searches under a time limit: when they stop, what they keep room for, and how they go on. The clock is a fake."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

import evolkv
from evolkv.errors import RunError, UsageError
from evolkv.evolution import limit as module
from evolkv.evolution import search_curve
from evolkv.evolution.limit import TimeLimit, allocations

SETTINGS = {
    "task": "niah:context=200",
    "budget": 48,
    "train": 2,
    "val": 2,
    "max_evals": 80,
    "seed": 0,
    "start": "uniform",
    "granularity": "layer",
}
#: Candidates of a generation.
GENERATION = 8


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still; `now[0] = 7` is a moment."""
    moment = [0.0]
    monkeypatch.setattr(module, "clock", lambda: moment[0])
    return moment


@pytest.fixture
def ticking(monkeypatch):
    """A clock on which every look takes a second."""
    monkeypatch.setattr(module, "clock", itertools.count().__next__)


def test_without_a_limit_no_moment_is_too_late(now):
    limit = TimeLimit(None)
    limit.read(1, 12, 1e9)
    limit.scored(10, 1e9)
    now[0] = 1e12
    assert not limit.reached()


@pytest.mark.parametrize(("balanced", "scored"), [(False, 6), (True, 8)])
def test_room_is_kept_for_a_step_and_the_choice(now, balanced, scored):
    limit = TimeLimit(100, val=10, train=4, balanced=balanced)
    limit.read(4, 4, 4.0)
    limit.scored(20, 2.0)
    # Eleven prompts of a second, allocations on all 14 examples at a tenth of a second, a tenth on top, and a step.
    kept = 1.1 * (11 * 1.0 + scored * 14 * 0.1) + 2
    for moment, reached in ((0, False), (100 - kept - 0.01, False), (100 - kept + 0.01, True)):
        now[0] = moment
        assert limit.reached() is reached


def test_a_curve_chooses_among_as_many_allocations_as_room_is_kept_for(small):
    settings = {name: value for name, value in SETTINGS.items() if name != "budget"}
    settings |= {"start": "gradient", "gradient_steps": 1, "selector": "snapkv"}
    curve = search_curve(*small, **{**settings, "budgets": [40, 48, 56], "max_evals": GENERATION})
    assert sum(len(result.validation) for result in curve.results) == allocations(3)


def test_searches_share_what_is_left(now):
    limit = TimeLimit(90, budgets=3)
    ends = []
    for _ in range(3):
        while not limit.reached():
            now[0] += 1
        ends.append(now[0])
        limit.next_search()
    assert ends == pytest.approx([31, 61, 91], abs=1.5)


def test_what_one_search_leaves_the_others_have(now):
    limit = TimeLimit(90, selectors=2)
    assert not limit.reached()
    now[0] = 10
    limit.next_search()
    assert not limit.reached()
    now[0] = 89
    assert not limit.reached()


def test_a_limit_too_short_to_read_and_choose_says_what_it_takes(now):
    limit = TimeLimit(30, val=24)
    now[0] = 15  # Reading began after 3 s.
    takes = "leaves 27.0 s for the search.* to read 12 training and 24 validation prompts takes about 74.0 s"
    with pytest.raises(RunError, match=takes):
        limit.read(6, 12, 12.0)
    TimeLimit(75, val=24).read(6, 12, 12.0)


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf")])
def test_a_limit_is_a_number_of_seconds(small, wrong):
    with pytest.raises(UsageError, match=r"--time-limit is .*; use a number of seconds above 0, such as 600"):
        evolkv.search(*small, time_limit=wrong, **SETTINGS)


def test_a_search_out_of_time_chooses_among_what_it_has(small, ticking):
    whole = evolkv.search(*small, **SETTINGS)
    found = evolkv.search(*small, time_limit=6, **SETTINGS)
    assert (whole.stopped, found.stopped, found.interrupted) == (None, "time limit", False)
    assert GENERATION <= found.evaluations < whole.evaluations
    assert found.evaluations % GENERATION == 0
    # Only where it stops is new.
    assert found.history == whole.history[: found.evaluations]
    assert {row["name"] for row in found.validation} == {"best", "mean", "lukv", "uniform", "pyramid"}
    assert found.kept is not None
    assert json.loads(json.dumps(found.to_dict()))["stopped"] == "time limit"
    assert found.profile.search["stopped"] == "time limit"


def test_a_search_that_ended_before_its_limit_does_not_speak_of_it(small):
    found = evolkv.search(*small, time_limit=10_000, **{**SETTINGS, "max_evals": GENERATION})
    assert found.stopped is None
    assert "stopped" not in found.profile.search


@pytest.mark.slow
def test_it_goes_on_to_the_same_history(small, ticking, tmp_path):
    whole = evolkv.search(*small, **SETTINGS)
    storage = str(tmp_path / "study.db")
    counts = [
        evolkv.search(*small, storage=storage, time_limit=seconds, **SETTINGS).evaluations for seconds in (4, 6, 1000)
    ]
    assert counts == sorted(set(counts))
    assert evolkv.search(*small, storage=storage, **SETTINGS).history == whole.history


def test_a_descent_out_of_time_goes_on_too(small, ticking, tmp_path):
    settings = {**SETTINGS, "start": "gradient", "gradient_steps": 8, "max_evals": 2 * GENERATION, "selector": "snapkv"}
    storage = str(tmp_path / "study.db")
    short = evolkv.search(*small, storage=storage, time_limit=5, **settings)
    assert 0 < len(short.descent) < 8
    assert (short.evaluations, short.stopped) == (0, "time limit")
    assert {row["name"] for row in short.validation} == {"gradient", "lukv", "uniform", "pyramid"}
    whole, again = evolkv.search(*small, **settings), evolkv.search(*small, storage=storage, **settings)
    assert (again.descent, again.history, again.stopped) == (whole.descent, whole.history, None)


@pytest.mark.slow
def test_a_curve_out_of_time_has_all_its_points_and_goes_on(small, ticking, tmp_path):
    settings = {name: value for name, value in SETTINGS.items() if name != "budget"}
    settings |= {"budgets": [40, 48, 56], "storage": str(tmp_path / "study.db")}
    short = search_curve(*small, time_limit=12, **settings)
    assert short.stopped == short.to_dict()["stopped"] == "time limit"
    assert not short.interrupted
    assert all(point["score"] is not None for point in short.points)
    whole = search_curve(*small, **settings)
    assert whole.stopped is None
    for before, after in zip(short.results, whole.results, strict=True):
        assert before.evaluations <= after.evaluations
        assert before.history == after.history[: before.evaluations]
    assert sum(result.evaluations for result in short.results) < sum(result.evaluations for result in whole.results)


def test_selectors_share_a_limit(small, ticking):
    found = evolkv.search(*small, selector=["snapkv", "keydiff"], time_limit=12, **SETTINGS)
    assert found.stopped == "time limit"
    assert not found.interrupted
    counts = [row["evaluations"] for row in found.rivals]
    assert len(counts) == 2
    assert all(GENERATION <= count < 80 for count in counts)
    assert np.ptp(counts) <= 2 * GENERATION


def test_selectors_that_time_does_not_reach_are_left_to_the_next_run(small, ticking, tmp_path):
    settings = {**SETTINGS, "selector": ["snapkv", "keydiff"], "storage": str(tmp_path / "study.db")}
    found = evolkv.search(*small, time_limit=4, **settings)
    assert [row["selector"]["name"] for row in found.rivals] == ["snapkv"]
    assert (found.stopped, found.interrupted) == ("time limit", False)
    assert found.profile.search["stopped"] == "time limit"
    again = evolkv.search(*small, **settings)
    assert [row["selector"]["name"] for row in again.rivals] == ["snapkv", "keydiff"]
    assert again.stopped is None
