from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import evolkv
from evolkv.allocators import ALLOCATORS
from evolkv.cache.layer import CompressedLayer
from evolkv.cli import main
from evolkv.errors import RunError, TaskError, UsageError
from evolkv.evaluation.scoring import text_score
from evolkv.methods import get_method
from evolkv.registry import Registry
from evolkv.selectors import SELECTORS, KNorm, PromptAttention, Selector, get_selector
from evolkv.tasks import TASKS, Example, Task, get_task
from evolkv.tasks.metrics import METRICS
from tiny import KV_HEADS, LAYERS, tiny_model

GUIDE = Path(__file__).parents[1] / "docs" / "extending.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def install(folder: Path, points: str, **modules: str) -> None:
    """What `pip install` would leave of a package with these entry points."""
    about = folder / "their_package-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(points)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """A registry of selectors beside a package that offers good ones and bad."""
    points = {
        "theirs": "theirs_module:Theirs",
        "knorm": "theirs_module:Theirs",
        "broken": "broken_module:Theirs",
        "other_name": "theirs_module:Theirs",
        "no_selector": "theirs_module:nothing",
    }
    lines = "".join(f"{name} = {place}\n" for name, place in points.items())
    theirs = "from evolkv.selectors import KNorm\nclass Theirs(KNorm):\n    name = 'theirs'\ndef nothing(): ...\n"
    install(tmp_path, f"[evolkv.selectors]\n{lines}", theirs_module=theirs, broken_module="import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield Registry("selector", {"knorm": KNorm}, "evolkv.selectors", Selector)
    sys.modules.pop("theirs_module", None)


def test_the_guide_registers_its_selector(monkeypatch):
    monkeypatch.setattr(SELECTORS, "_entries", dict(SELECTORS._entries))
    names = {}
    for text in blocks("python"):
        exec(text, names)
    assert isinstance(get_selector("value_norm:recent=4"), names["ValueNorm"])


@pytest.mark.slow
def test_the_guide_works_as_it_is_written(tmp_path):
    module = blocks("python")[0]
    points = blocks("toml")[0].replace("project.entry-points.", "").replace('"', "")
    install(tmp_path / "site", points, value_norm=module)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*argv: str) -> str:
        command = [sys.executable, "-m", "evolkv", *argv]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment, timeout=300
        ).stdout

    listed = {row["name"]: row for row in json.loads(run("list", "selectors", "--json"))}
    assert listed["value_norm"]["parameters"] == {"recent": 8}
    assert listed["value_norm"]["description"] == "Keeps the newest tokens, and those with the largest values."
    task, methods = "rivers:words=120", ["value_norm", "value_norm:recent=32", "hill+value_norm", "cake+value_norm"]
    run("eval", "smollm2-135m", "--task", task, "--method", *methods, "--budget", "64", "--samples", "2", "--json", "r")
    rows = json.loads((tmp_path / "r").read_text())["rows"]
    assert [row["method"] for row in rows] == methods
    assert {row["metric"] for row in rows} == {"starts_right"}
    assert all(row["mean_budget"] == 64 for row in rows)
    examples = [f"--{name}=2" for name in ("train", "val")] + ["--max-evals=8", "--storage=none", "--metric=logprob"]
    run("search", "smollm2-135m", "--task", task, "--selector", "value_norm", "--budget", "64", *examples, "--out", "p")
    assert json.loads((tmp_path / "p").read_text())["selector"] == {"name": "value_norm", "recent": 8}


def test_what_packages_offer_is_listed_and_imported_when_it_is_asked_for(registry):
    assert list(registry) == ["knorm", "theirs", "broken", "other_name", "no_selector"]
    assert len(registry) == 5
    assert "theirs" in registry
    assert "theirs_module" not in sys.modules
    assert registry["theirs"].__name__ == "Theirs"
    assert registry.get("theirs") is registry["theirs"]
    assert registry.get("nobody", 7) == 7


def test_a_name_of_ours_stays_ours(registry, caplog):
    with caplog.at_level(logging.WARNING, "evolkv"):
        assert registry["theirs"].__module__ == "theirs_module"
    assert "selector 'knorm' of package their-package is passed over" in caplog.text
    assert registry["knorm"] is KNorm


def test_a_package_that_fails_does_not_hide_the_others(registry, monkeypatch, capsys):
    monkeypatch.setattr("evolkv.selectors.SELECTORS", registry)
    assert main(["--log-json", "list", "selectors", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [row["name"] for row in json.loads(out)] == ["knorm", "theirs"]
    said = [json.loads(line) for line in err.splitlines()]
    assert {line["event"] for line in said} == {"warning"}
    assert [words for line in said for words in ("passed over", "cannot be imported") if words in line["message"]] == [
        "passed over",
        "cannot be imported",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", "of package their-package cannot be imported .ModuleNotFoundError: No module named 'no_such_pack"),
        ("other_name", "calls itself 'theirs'"),
        ("no_selector", "expected a subclass of evolkv.selectors.base.Selector"),
        ("their", "Did you mean 'theirs'"),
    ],
)
def test_what_cannot_be_used_is_said_with_its_name(registry, name, words):
    with pytest.raises(UsageError, match=words) as caught:
        registry[name]
    assert "\n" not in str(caught.value)


class Newest(Selector):
    """Keeps the newest tokens."""

    name = "newest"

    def score(self, prompt: PromptAttention) -> torch.Tensor:
        return prompt.places.float()


class Lopsided(Newest):
    name = "lopsided"

    def score(self, prompt: PromptAttention) -> torch.Tensor:
        return prompt.places.float()[..., :-1]


@pytest.fixture
def registered(monkeypatch):
    """Names registered in a test are gone after it."""
    for registry in (SELECTORS, ALLOCATORS, METRICS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.mark.usefixtures("registered")
def test_a_registered_selector_serves_profiles_methods_and_caches(tmp_path):
    SELECTORS.register("newest", Newest)
    model = tiny_model("llama")
    profile = evolkv.BudgetProfile.uniform(model, 5, "newest")
    profile.save(tmp_path / "p.json")
    assert get_selector(evolkv.BudgetProfile.load(tmp_path / "p.json").selector) == Newest()
    cache = evolkv.CompressedCache.prefill(model, profile, torch.arange(3, 23)[None])
    assert all(head.tolist() == [15, 16, 17, 18, 19] for layer in cache.positions for head in layer)
    assert get_method("adakv+newest").selector == Newest()


@pytest.mark.usefixtures("registered")
def test_scores_of_the_wrong_shape_are_refused():
    SELECTORS.register("lopsided", Lopsided)
    model = tiny_model("llama")
    profile = evolkv.BudgetProfile.uniform(model, 5, "lopsided")
    with pytest.raises(UsageError, match=r"'lopsided' gave scores of shape \[1, 2, 19\]; expected .* = \[1, 2, 20\]"):
        evolkv.CompressedCache.prefill(model, profile, torch.arange(3, 23)[None])


@pytest.mark.parametrize(
    ("scores", "error", "words"),
    [
        (torch.tensor([[[1.0, float("nan"), 2.0]]]), RunError, "selector 'newest' gave a score that is not a number"),
        (np.ones((1, 1, 3)), UsageError, "selector 'newest' gave scores as ndarray; expected a tensor"),
        (None, UsageError, "selector 'newest' gave scores as NoneType; expected a tensor"),
    ],
)
def test_scores_that_are_no_numbers_are_refused(scores, error, words):
    states = torch.ones(1, 1, 3, 4)
    with pytest.raises(error, match=words):
        Newest().order(PromptAttention(states, states, states, 0.5), scores)


@pytest.mark.usefixtures("registered")
def test_a_registered_allocator_gets_the_exact_total():
    ALLOCATORS.register("top", lambda num_layers, budget: [1.0] * (num_layers - 1) + [1.5 * budget])
    budgets = get_method("top+streaming_llm").resolve(tiny_model("llama"), 9)[1]
    assert budgets.shape == (LAYERS, KV_HEADS)
    assert budgets.sum() == 9 * LAYERS * KV_HEADS
    assert np.argmax(budgets[:, 0]) == LAYERS - 1
    ALLOCATORS.register("top", lambda num_layers, budget: [budget])
    with pytest.raises(UsageError, match=rf"'top' gave \(1,\) budgets; expected one for each of {LAYERS} layers"):
        get_method("top+streaming_llm").resolve(tiny_model("llama"), 9)[1]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("score", [1.5, -0.1, float("nan"), "good", None, np.array([0.5]), torch.zeros(2)])
def test_a_metric_that_gives_no_score_is_refused(score):
    METRICS.register("odd", lambda prediction, references, **extra: score)
    with pytest.raises(UsageError, match=r"example e: metric 'odd' gave .*; expected a number from 0 to 1"):
        text_score("odd", "", Example("e", "prompt", ("answer",)))


@pytest.mark.parametrize("name", ["snapkv", "a b", "a:b", "a+b", "", "1st"])
def test_names_that_are_taken_or_cannot_be_written_are_refused(name):
    with pytest.raises(UsageError, match="EvolKV's own" if name == "snapkv" else "expected a name of letters"):
        SELECTORS.register(name, Newest)


def test_unknown_names_are_as_before():
    with pytest.raises(UsageError, match=r"unknown task 'nih'\. Did you mean 'niah'"):
        get_task("nih")


@dataclass(frozen=True)
class Odd(Task):
    name = "odd_settings"
    folder: Path | None = None
    size: int | str = 3
    words: list[str] = field(default_factory=list)

    def examples(self, split, n, tokenizer, seed=0):
        return []


@pytest.mark.parametrize("setting", ["folder=x", "size=3", "words=a"])
def test_a_setting_that_no_text_stands_for_is_refused(monkeypatch, setting):
    monkeypatch.setitem(TASKS._entries, "odd_settings", Odd)
    assert get_task("odd_settings") == Odd()
    with pytest.raises(TaskError, match=f"{setting}: no text stands for such a setting; give the task itself"):
        get_task(f"odd_settings:{setting}")


class WholeLayer(CompressedLayer):
    """Keeps all of a prompt, whatever the budgets say, and counts the prompts that it read."""

    prompts = 0

    def store_prompt(self, prompt, padding):
        type(self).prompts += 1
        super().store_prompt(prompt, padding)

    def _counts(self, lengths):
        return np.repeat(lengths, self.num_kv_heads)


@dataclass(frozen=True)
class Whole(KNorm):
    name = "whole"
    layer = f"{__name__}:WholeLayer"


@dataclass(frozen=True)
class WholeInEachCache(Whole):
    name = "whole_in_each_cache"
    prunes_prefill = True


def test_a_selector_chooses_the_class_of_its_caches_layers_also_beside_others(small):
    model, tokenizer = small
    cache = evolkv.CompressedCache(model, Whole(), budget=40)
    assert {type(layer) for layer in cache.kv_layers} == {WholeLayer}
    WholeLayer.prompts = 0
    methods = ["full", "knorm", Whole(), WholeInEachCache()]
    for metric in ("logprob", "contains"):
        rows = evolkv.evaluate(
            model, tokenizer, task="niah:context=240", methods=methods, budgets=[40], samples=2, metric=metric
        )
        scores = {row["method"]: (row["score"], row["kv_bytes"]) for row in rows}
        assert scores["whole"] == scores["full"] == scores["whole_in_each_cache"] != scores["knorm"]
    # Only where the budgets decide what is computed of a prompt does each method read it for itself.
    assert WholeLayer.prompts == 2 * 2 * len(model.model.layers)


@pytest.mark.usefixtures("registered")
def test_what_layers_of_their_own_cannot_do_is_refused(small):
    model, tokenizer = small
    with pytest.raises(UsageError, match=r"selector 'whole' evicts once, after the prompt"):
        evolkv.CompressedCache(model, Whole(), budget=40, prefill_chunk=16)
    for selector, reason in ((Whole(), "has cache layers of its own"), (WholeInEachCache(), "computes less")):
        with pytest.raises(UsageError, match=f"selector '{selector.name}' {reason}.* add --engine naive"):
            evolkv.search(model, tokenizer, task="niah:context=240", budget=40, selector=selector)
    SELECTORS.register("whole", Whole)
    with pytest.raises(UsageError, match=r"method 'adakv\+whole': selector 'whole' needs budgets that are fixed"):
        get_method("adakv+whole")
