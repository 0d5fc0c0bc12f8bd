"""Search on Ray workers: the same history as here, also when a worker dies."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import evolkv
from evolkv.errors import RunError, UsageError
from evolkv.evaluation.on_ray import RayBackend
from evolkv.evolution import SearchProgress

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

SETTINGS = {"task": "niah:context=120", "budget": 40, "train": 6, "val": 2, "population": 4, "max_evals": 24, "seed": 0}
SETTINGS |= {"gradient_steps": 6}


@pytest.fixture(scope="module")
def local(smollm2):
    return evolkv.search(*smollm2, **SETTINGS)


@pytest.fixture
def without_ray():
    yield
    ray.shutdown()


@pytest.mark.model
def test_a_killed_worker_changes_nothing(smollm2, local, without_ray):
    """Also shows that two workers give the history of the local backend."""
    backends, killed = [], []

    def start():
        backends.append(RayBackend(*smollm2, workers=2))
        return backends[0]

    def kill(step: SearchProgress):
        if step.stage == "search" and step.generation == 1:
            pid = ray.get(backends[0].actors[1].__ray_call__.remote(lambda worker: os.getpid()))
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    found = evolkv.search(*smollm2, backend=start, on_progress=kill, **SETTINGS)
    assert len(killed) == 1
    assert found.history == local.history
    # Two validation examples are one shard, which has all cores here and one there: on some machines the last bits of
    # a matrix product depend on that.
    assert found.chosen == local.chosen
    for mine, its in zip(found.validation, local.validation, strict=True):
        assert (mine["name"], mine["budgets"]) == (its["name"], its["budgets"])
        assert mine["scores"] == pytest.approx(its["scores"], abs=1e-5)
    assert not ray.is_initialized()


@pytest.mark.model
def test_a_terminated_search_on_workers_keeps_its_best(smollm2, tmp_path):
    words = "search smollm2-135m --task niah:context=120 --budget 40 --train 2 --val 2 --max-evals 100000 --backend ray"
    search = subprocess.Popen(
        [sys.executable, "-m", "evolkv", *words.split(), "--workers", "1"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in search.stderr:
            if line.startswith("search "):
                break
        search.terminate()
        _, err = search.communicate(timeout=120)
    finally:
        search.kill()
    assert search.returncode == 143, err
    assert evolkv.BudgetProfile.load(tmp_path / "profile.json").search["interrupted"] is True


@pytest.mark.model
def test_a_model_that_was_changed_after_loading_is_the_one_that_is_searched(local, without_ray):
    model, tokenizer = evolkv.load_model("smollm2-135m", dtype="float32", device="cpu")
    model.model.norm.weight.data *= 0.5
    settings = {**SETTINGS, "max_evals": 4}
    here = evolkv.search(model, tokenizer, **settings)
    there = evolkv.search(model, tokenizer, backend=lambda: RayBackend(model, tokenizer, workers=2), **settings)
    # Weights that are sent lie elsewhere in memory than those of a file, which may change the last bits of a product.
    for one, other in zip(there.history, here.history, strict=True):
        assert one["budgets"] == other["budgets"]
        assert one["score"] == pytest.approx(other["score"], rel=1e-5)
    assert here.history[0]["score"] != pytest.approx(local.history[0]["score"], rel=1e-2)


@pytest.mark.model
def test_a_cluster_started_by_hand_with_a_second_node_serves(smollm2, local, tmp_path):
    """The head has one core and so has the other node, so that each gets a worker."""
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }

    def call(program, *words):
        done = subprocess.run(
            [programs / program, *map(str, words)], env=environment, text=True, capture_output=True, timeout=150
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        head = ["--head", f"--port={port}", "--include-dashboard=false", "--node-ip-address=127.0.0.1"]
        call("ray", "start", *head, "--num-cpus=1")
        call("ray", "start", f"--address=127.0.0.1:{port}", "--num-cpus=1")
        options = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", value)]
        where = ["--backend", "ray", "--ray-address", f"127.0.0.1:{port}", "--workers", 2]
        files = ["--out", tmp_path / "profile.json", "--json", tmp_path / "search.json"]
        call("evolkv", "search", "smollm2-135m", "--dtype", "float32", *options, *where, *files)
        assert json.loads((tmp_path / "search.json").read_text())["history"] == local.history
    finally:
        call("ray", "stop", "--force")


@pytest.mark.model
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"workers": 0}, UsageError, "--workers is 0"),
        ({"cpus": 0}, UsageError, "more than 0 cores"),
        ({"workers": 2, "gpus": 1}, UsageError, "do not fit a cluster"),
        ({"address": "127.0.0.1:1"}, RunError, "cannot connect to the cluster at '127.0.0.1:1'"),
    ],
)
def test_what_cannot_be_had_is_one_line(smollm2, without_ray, arguments, error, words):
    with pytest.raises(error) as caught:
        RayBackend(*smollm2, **arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_workers_make_the_full_caches_answers_for_themselves(small, without_ray):
    settings = {**SETTINGS, "max_evals": 8, "metric": "fidelity", "selector": "snapkv:window=8"}
    here = evolkv.search(*small, **settings)
    there = evolkv.search(*small, backend="ray", workers=1, **settings)
    assert there.history == here.history
    assert there.train == pytest.approx(here.train, abs=1e-4)
