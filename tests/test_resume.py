"""A search that is stopped, or killed, and given again comes to the same result."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import evolkv
from evolkv.errors import RunError, StudyError
from evolkv.evolution import SearchProgress, search_curve
from evolkv.evolution.gradient import Descent
from evolkv.evolution.study import Study, read_studies
from tiny import KV_HEADS, LAYERS

SETTINGS = {"task": "niah:context=120", "budget": 40, "train": 3, "val": 1, "population": 4, "max_evals": 40, "seed": 0}
SETTINGS |= {"gradient_steps": 6, "granularity": "layer", "selector": "snapkv"}
KILLS = 20
#: A search at a time on each.
CORES = (0, 1)


def run(settings, storage, out):
    """One attempt, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    model, tokenizer = evolkv.load_model("smollm2-135m", dtype="float32", device="cpu")
    result = evolkv.search(model, tokenizer, storage=storage, study="killed", **settings)
    with open(f"{out}.part", "w") as file:
        json.dump({"history": result.history, "profile": result.profile.to_dict(), "chosen": result.chosen}, file)
    os.replace(f"{out}.part", out)


def attempt(context, storage, out, seconds=None):
    """Runs until done, or until killed after so many seconds; returns whether it was killed."""
    process = context.Process(target=run, args=(SETTINGS, str(storage), str(out)))
    process.start()
    process.join(seconds)
    killed = process.is_alive()
    if killed:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    else:
        assert process.exitcode == 0
    return killed


@pytest.mark.slow
@pytest.mark.model
def test_twenty_kills_change_neither_history_nor_profile(smollm2, tmp_path):
    # Children start from a server that has the libraries imported but has not computed anything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.llama.modeling_llama", "optuna", "evolkv.evolution.run"])
    undisturbed = tmp_path / "undisturbed.json"
    # The first child also waits for the server.
    assert not attempt(context, tmp_path / "first.db", tmp_path / "first.json")
    started = time.perf_counter()
    assert not attempt(context, tmp_path / "undisturbed.db", undisturbed)
    whole = time.perf_counter() - started
    with ThreadPoolExecutor(len(CORES)) as pool:
        killed = list(pool.map(lambda core: killed_often(context, tmp_path, core, whole), CORES))
    assert [json.loads(path.read_text()) for path in killed] == [json.loads(undisturbed.read_text())] * len(CORES)


def killed_often(context, folder, core, whole):
    """One search, killed again and again; where its result lies in the end."""
    moments = random.Random(core)
    storage, out, kills = folder / f"killed{core}.db", folder / f"killed{core}.json", 0
    while kills < KILLS // len(CORES):
        # Most of a run is loading and prefill; what it then records makes the next run reach further.
        out.unlink(missing_ok=True)
        if not attempt(context, storage, out, moments.uniform(0.05, 0.95) * whole):
            storage.unlink()
            continue
        kills += 1
        for generation in _recorded(storage):
            assert len(generation) == 4
    assert not attempt(context, storage, out)
    return out


def _recorded(storage):
    """What a study holds after a kill; before its settings were written there is none, and nothing to lose."""
    try:
        return read_studies(str(storage), "killed")[0].stages.get("budget 40", [])
    except StudyError:
        return []


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    storage = str(tmp_path_factory.mktemp("study") / "study.db")
    settings = {**SETTINGS, "max_evals": 12}
    return storage, settings, evolkv.search(*small, storage=storage, **settings)


def test_a_study_holds_every_candidate(finished):
    storage, _, result = finished
    study = read_studies(storage)[0]
    # Studies from before results named it go on.
    assert "haystack" not in study.settings
    recorded = [entry for generation in study.stages["budget 40"] for entry in generation]
    assert len(recorded) == 12
    for entry, row in zip(recorded, result.history, strict=True):
        assert (entry.budgets, entry.fitness, entry.score, entry.scores) == (
            row["budgets"],
            row["fitness"],
            row["score"],
            row["scores"],
        )
        assert entry.seconds > 0


def test_a_finished_search_is_not_searched_again(small, finished):
    storage, settings, result = finished
    stages = []
    again = evolkv.search(*small, storage=storage, on_progress=lambda step: stages.append(step.stage), **settings)
    assert set(stages) == {"gradient", "search"}
    assert again.history == result.history
    assert again.validation == result.validation
    assert again.profile == result.profile


def test_the_recorded_steps_of_a_descent_count_once(small, tmp_path, monkeypatch):
    settings = {**SETTINGS, "max_evals": 4, "selector": ["knorm", "keydiff"], "storage": str(tmp_path / "study.db")}
    with monkeypatch.context() as patch:
        # Each step takes an hour.
        clock = SimpleNamespace(perf_counter=itertools.count(0, 3600).__next__)
        patch.setattr("evolkv.evolution.gradient.time", clock)
        evolkv.search(*small, **settings)
    hours = evolkv.search(*small, **settings).seconds / 3600
    assert len(settings["selector"]) * SETTINGS["gradient_steps"] < hours < 13


def test_a_finished_search_goes_on_with_more_candidates(small, finished):
    storage, settings, result = finished
    assert read_studies(storage)[0].facts["max_evals"] == 12
    more = evolkv.search(*small, storage=storage, **{**settings, "max_evals": 20})
    assert read_studies(storage)[0].facts["max_evals"] == 20
    assert more.evaluations == 20
    assert more.history[:12] == result.history


def test_an_interrupted_search_continues_to_the_same_result(small, finished, tmp_path):
    _, settings, result = finished

    def stop(event: SearchProgress):
        if event.stage == "search":
            raise KeyboardInterrupt

    storage = str(tmp_path / "study.log")
    first = evolkv.search(*small, storage=storage, on_progress=stop, **settings)
    assert first.interrupted
    second = evolkv.search(*small, storage=storage, **settings)
    assert (second.history, second.validation) == (result.history, result.validation)


def stopping(stage, done):
    """Progress that is interrupted at a step."""

    def stop(event: SearchProgress):
        if (event.stage, event.done) == (stage, done):
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("selector", ["snapkv", ["knorm", "keydiff"]])
def test_an_interrupt_while_a_study_is_read_leaves_nothing_of_it_out(small, tmp_path, selector):
    settings = {**SETTINGS, "max_evals": 12, "selector": selector, "storage": str(tmp_path / "study.db")}
    first = evolkv.search(*small, on_progress=stopping("search", 8), **settings)
    assert (first.interrupted, first.evaluations, len(first.history)) == (True, 8, 8)
    assert first.settings["evaluations"] == 8
    # What was chosen among descents stands.
    assert bool(first.validation) == isinstance(selector, list)
    for moment in (("gradient", 2), ("search", 4), ("prefill", 1)):
        again = evolkv.search(*small, on_progress=stopping(*moment), **settings)
        assert (again.interrupted, again.history, again.profile) == (True, first.history, first.profile)
    whole = evolkv.search(*small, **settings)
    stopped = evolkv.search(*small, on_progress=stopping("gradient", 1), **settings)
    assert not stopped.interrupted
    assert (stopped.history, stopped.profile, stopped.kept) == (whole.history, whole.profile, whole.kept)
    # A longer one has not chosen yet.
    longer = evolkv.search(*small, on_progress=stopping("search", 16), **{**settings, "max_evals": 20})
    assert (longer.interrupted, longer.evaluations) == (True, 16)
    assert (longer.validation, longer.train) == (whole.validation, whole.train)
    assert longer.profile.budgets.tolist() == whole.profile.budgets.tolist()
    assert longer.profile.scores == whole.profile.scores


def test_an_interrupt_while_the_study_of_a_curve_is_read_leaves_nothing_of_it_out(small, tmp_path):
    settings = {**SETTINGS, "max_evals": 8, "selector": ["knorm", "keydiff"], "storage": str(tmp_path / "study.db")}
    settings["budgets"] = [settings.pop("budget"), 48]
    first = search_curve(*small, on_progress=stopping("search", 4), **settings)
    again = search_curve(*small, on_progress=stopping("gradient", 1), **settings)
    assert again.points == first.points
    assert [result.evaluations for result in again.results] == [4, 0]
    assert all(point["score"] is not None for point in again.points)


def test_a_second_interrupt_while_a_study_is_read_is_passed_on(small, finished, monkeypatch):
    storage, settings, _ = finished

    def stop(self, slope, tell=Descent.tell):
        tell(self, slope)
        if self.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Descent, "tell", stop)
    with pytest.raises(KeyboardInterrupt):
        evolkv.search(*small, storage=storage, **settings)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_a_search_that_runs_out_of_memory_says_what_takes_less_and_loses_nothing(small, finished, tmp_path, error):
    _, settings, result = finished
    storage = str(tmp_path / "study.log")

    def fail(event: SearchProgress):
        if event.stage == "search" and event.generation:
            raise error

    with pytest.raises(RunError, match=r"out of memory in the search; a smaller --ceiling.* the same command goes"):
        evolkv.search(*small, storage=storage, on_progress=fail, **settings)
    assert len(read_studies(storage)[0].stages["budget 40"]) == 2
    again = evolkv.search(*small, storage=storage, **settings)
    assert (again.history, again.validation) == (result.history, result.validation)
    error = RuntimeError("another reason")
    with pytest.raises(RuntimeError, match="another reason"):
        evolkv.search(*small, on_progress=fail, **settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"seed": 1}, "seed"), ({"budget": 50}, "budgets"), ({"train": 5}, "train"), ({"minibatch": 1}, "minibatch")],
)
def test_another_search_in_the_same_study_is_refused_by_name(small, finished, changes, words):
    storage, settings, _ = finished
    with pytest.raises(StudyError, match=words) as caught:
        evolkv.search(*small, storage=storage, **{**settings, **changes})
    assert "\n" not in str(caught.value)


def test_a_study_in_use_is_refused(small, finished):
    storage, settings, _ = finished
    # The child shares the modules that are loaded here, and computes nothing.
    context = multiprocessing.get_context("fork")
    holding, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(storage, read_studies(storage)[0].settings, holding, release))
    process.start()
    try:
        assert holding.wait(60)
        with pytest.raises(StudyError, match=str(process.pid)):
            evolkv.search(*small, storage=storage, **settings)
    finally:
        release.set()
        process.join()


def _hold(storage, settings, holding, release):
    with Study.open(storage, "search", settings):
        holding.set()
        release.wait(60)


def test_a_curve_chooses_among_its_neighbours_and_resumes(small, tmp_path):
    settings = {**SETTINGS, "budgets": [36, 40, 48], "max_evals": 8, "storage": str(tmp_path / "curve.db")}
    del settings["budget"]
    curve = search_curve(*small, **settings)
    assert [point["budget"] for point in curve.points] == [36, 40, 48]
    assert [result.profile.total for result in curve.results] == [budget * LAYERS * KV_HEADS for budget in (36, 40, 48)]
    assert [result.evaluations for result in curve.results] == [8, 4, 4]
    names = [{row["name"] for row in result.validation} for result in curve.results]
    assert names[1] == {
        "uniform",
        "pyramid",
        "lukv",
        "gradient",
        "best",
        "mean",
        "expanded from 36",
        "expanded from 48",
    }
    for result, point in zip(curve.results, curve.points, strict=True):
        assert point["score"] == max(row["score"] for row in result.validation)
    assert curve.points[0]["on_front"]
    assert sum(result.seconds for result in curve.results) < curve.seconds
    again = search_curve(*small, **settings)
    assert again.points == curve.points
    stages = read_studies(settings["storage"])[0].stages
    for result in again.results:
        # What was recorded took the time that it took.
        recorded = sum(entry.seconds for part in stages[f"budget {result.profile.budget}"] for entry in part)
        assert recorded <= result.seconds < recorded + again.seconds
    assert again.seconds > sum(result.seconds for result in again.results) - 0.1
    assert json.dumps(curve.to_dict(["a", "b", "c"]))


@pytest.mark.slow
def test_a_curve_takes_for_each_budget_the_selector_that_does_best(small, tmp_path):
    settings = {**SETTINGS, "budgets": [36, 48], "max_evals": 8, "storage": str(tmp_path / "curve.db")}
    del settings["budget"], settings["selector"]
    curve = search_curve(*small, selector=["knorm", "keydiff"], **settings)
    scores = [{row["selector"]["name"]: row["score"] for row in result.rivals} for result in curve.results]
    for result, point, row in zip(curve.results, curve.points, scores, strict=True):
        assert point["selector"] == result.profile.selector["name"] == max(row, key=row.get)
        assert point["score"] == row[point["selector"]]
    assert curve.points[0]["on_front"]
    assert curve.points[1]["on_front"] == (curve.points[1]["score"] > curve.points[0]["score"])
    assert search_curve(*small, selector=["knorm", "keydiff"], **settings).points == curve.points
