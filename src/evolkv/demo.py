"""The demo: evolve a profile for needles in a haystack, and compare it with what needs no search."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evolkv.errors import UsageError
from evolkv.evaluation import EvaluationProgress, Method, evaluate
from evolkv.evolution import SearchProgress, SearchResult, search
from evolkv.plots import budgets_heatmap
from evolkv.registry import unknown_name
from evolkv.report.page import render
from evolkv.report.sources import read_sources
from evolkv.schemas import RESULTS_FORMAT
from evolkv.selectors import get_selector
from evolkv.tasks import Example, get_task
from evolkv.whole_files import check_folder, check_outputs, write_json, write_text

#: What budgets are evolved under. A window of 32 would be most of a budget of 40 (docs/gradient.md).
SELECTOR = "chunkkv:window=2"
SAMPLES = 24
#: What SnapKV and PyramidKV, which the demo compares with, keep whatever the budget.
LEAST_BUDGET = get_selector("snapkv").min_budget


@dataclass(frozen=True)
class Effort:
    """The cost of a search: examples to train on, examples to choose on, candidates."""

    train: int
    val: int
    max_evals: int


#: After the gradient start a few generations will do; budgets per layer have less to choose, and need more.
#: Sixteen examples are too few: budgets fit them, and the choice on eight others misjudges what is found.
EFFORT = {"layer": Effort(train=24, val=12, max_evals=112), "head": Effort(train=24, val=12, max_evals=68)}
#: Haystacks of the comparison. Prompts that share one are prefilled from the needle on, so few are cheap.
PASSAGES = 2


class DemoFiles:
    """Paths that the demo writes to, all of them in one folder.

    Attributes:
        profile: the profile.
        search: every evaluation of the search.
        results: the comparison on held-out examples.
        records: every example of the comparison, which paired differences are computed from.
        picture: the budgets as a picture.
        report: the search, the budgets and the comparison as one page.
        prompt: one held-out prompt, complete with chat template.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.profile, self.search, self.results = (folder / f"{name}.json" for name in ("profile", "search", "results"))
        self.records = folder / "records.jsonl"
        self.picture, self.report, self.prompt = folder / "budgets.png", folder / "report.html", folder / "prompt.txt"


@dataclass(frozen=True)
class DemoResult:
    """The outcome of the demo.

    Args:
        files: what it wrote.
        task: spec of the task.
        search: the search's result.
        rows: one per method, as `evaluate` returns them; empty after an interruption.
        answer: the answer to the prompt in ``files.prompt``.
    """

    files: DemoFiles
    task: str
    search: SearchResult
    rows: list[dict[str, Any]]
    answer: str

    @property
    def interrupted(self) -> bool:
        """True if KeyboardInterrupt ended the demo before the comparison was complete."""
        return not self.rows


def run_demo(
    model: Any,
    tokenizer: Any,
    *,
    out: str | Path = "demo",
    context: int = 1600,
    budget: int = 40,
    granularity: Literal["layer", "head"] = "head",
    seed: int = 0,
    samples: int = SAMPLES,
    train: int | None = None,
    val: int | None = None,
    max_evals: int | None = None,
    on_search: Callable[[SearchProgress], None] | None = None,
    on_evaluation: Callable[[EvaluationProgress], None] | None = None,
) -> DemoResult:
    """Evolve a profile, compare it on held-out examples, write it all down.

    It is compared with the full cache, SnapKV and PyramidKV, and with its own ranking at equal budgets.

    Args:
        model: a transformers decoder-only model.
        tokenizer: its tokenizer.
        out: folder for the files; made if missing. The profile is written as soon as the search is done.
        context: length of the prompts in tokens.
        budget: cache entries per KV head, averaged over layers and heads.
        granularity: "layer" or "head".
        seed: of examples and search.
        samples: held-out examples of the comparison.
        train: examples that candidates are scored on. Default: see `EFFORT`, as for the next two.
        val: examples that the result is chosen on.
        max_evals: candidates to evaluate.
        on_search: called as the search goes on.
        on_evaluation: called as the comparison goes on.

    Returns:
        The result; without rows if KeyboardInterrupt ended it early. The profile is written all the same.

    Raises:
        UsageError: for settings that cannot be used, or an `out` that cannot be written to.
        KeyboardInterrupt: if interrupted before the search had scored anything. Nothing is written then.
    """
    if granularity not in EFFORT:
        raise unknown_name("granularity", granularity, EFFORT)
    effort = EFFORT[granularity]
    files = check_demo(out, budget, samples)
    task = f"niah:context={context}"
    found = search(
        model,
        tokenizer,
        task=task,
        budget=budget,
        selector=SELECTOR,
        granularity=granularity,
        train=effort.train if train is None else train,
        val=effort.val if val is None else val,
        max_evals=effort.max_evals if max_evals is None else max_evals,
        seed=seed,
        on_progress=on_search,
    )
    found.profile.save(files.profile)
    # What an earlier run left here would be taken for this profile's.
    for stale in (files.results, files.records, files.report):
        stale.unlink(missing_ok=True)
    write_json(files.search, found.to_dict())
    budgets_heatmap(found.profile, files.picture)
    held_out = f"{task},passages={min(PASSAGES, samples)}"
    prompt = _example_to_show(held_out, samples, tokenizer, seed)
    write_text(files.prompt, prompt.prompt)
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(KeyboardInterrupt):
        if not found.interrupted:
            rows = evaluate(
                model,
                tokenizer,
                task=held_out,
                methods=["full", "snapkv", "pyramidkv", SELECTOR, Method.of_profile(found.profile, "evolkv")],
                budgets=[budget],
                samples=samples,
                seed=seed,
                metric="contains",
                records=files.records,
                on_progress=on_evaluation,
            )
    if not rows:
        files.records.unlink(missing_ok=True)
    if rows:
        write_json(files.results, {"format": RESULTS_FORMAT, "rows": rows})
        write_text(files.report, render(read_sources([str(files.folder)], None)))
    return DemoResult(files, task, found, rows, prompt.references[0])


def check_demo(out: str | Path, budget: int, samples: int = SAMPLES) -> DemoFiles:
    """Check, without touching anything, that a demo can be run at a budget and its files be written.

    Raises:
        UsageError: the budget is too small for what the demo compares with, there are no samples, or a file cannot be
            written.
    """
    if samples < 1:
        raise UsageError(f"--samples is {samples}; use at least one example")
    if budget < LEAST_BUDGET:
        raise UsageError(
            f"--budget is {budget}, but SnapKV, which the demo compares with, always keeps {LEAST_BUDGET} tokens; "
            f"use {LEAST_BUDGET} or more"
        )
    files = DemoFiles(Path(out))
    if files.folder.is_file():
        raise UsageError(f"{files.folder} is a file; give --out a folder")
    check_folder(files.folder)
    check_outputs(
        [files.profile, files.search, files.results, files.records, files.picture, files.report, files.prompt]
    )
    return files


def _example_to_show(task: str, samples: int, tokenizer: Any, seed: int) -> Example:
    """The held-out example whose needle is nearest to the middle, where it is hardest to keep by luck."""
    examples = get_task(task).examples("report", samples, tokenizer, seed)
    return min(examples, key=lambda example: abs(float(example.extra.get("depth", 0.5)) - 0.5))
