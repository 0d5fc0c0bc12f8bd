"""Evolved budgets against the methods that one would use instead, on the field's benchmarks.

    python bench/results.py --out DIR [--table NAME ...] [--record NAME] [--model smollm2-135m] [--data DIR]

For each table, under each protocol: budgets are evolved at every `--budgets` as one curve (metric logprob, on training
examples of its tasks, or of `general` for the table `unseen`), and LU-KV's are calibrated on the same examples. Then
these, published methods, and the rankings that budgets were evolved under, at equal budgets, are scored on the same
held-out examples. The difference is paired with LU-KV, with equal budgets under the profile's own selector, and with
the method that scores best on those very examples at that budget and task, which favours what is not evolved. With
`--seeds N` budgets are evolved N times, on training examples of their own; an example's score is the mean over them.

Profiles, studies and the records of every example are kept in DIR. Given again, the same command goes on where it was
stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

import evolkv
from evolkv.budgets import Budget, Share, read_budgets, size_of
from evolkv.errors import UsageError
from evolkv.evaluation.records import Record, label, read_records
from evolkv.evolution import search_curve
from evolkv.evolution.config import Granularity
from evolkv.evolution.rivals import competing
from evolkv.models import describe_model
from evolkv.selectors import get_selector
from evolkv.significance import paired_comparison
from evolkv.tasks import get_task
from lib.command import Bench, run, seeds_from

#: Stands for the examples of all tasks that one profile is evolved for.
ALL = "all examples"
#: Published methods.
PUBLISHED = (
    "snapkv",
    "pyramidkv",
    "adakv+snapkv",
    "cake+snapkv",
    "dynamickv+snapkv",
    "chunkkv",
    "h2o",
    "tova",
    "streaming_llm",
    "knorm",
    "keydiff",
    "expected_attention",
)
#: Budgets that LU-KV allocates, calibrated on the examples that budgets are evolved on, under the same selector.
LUKV = "lukv"
#: The profile's own selector, with equal budgets.
EQUAL = "equal"
#: RULER without its two tasks that read files.
RULER = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
)


@dataclass(frozen=True)
class Table:
    """One table of results, with one profile for all of its tasks.

    Args:
        tasks: specs; ``{data}`` stands for the folder with the user's files.
        searched: what budgets are evolved on, where that is not the tasks themselves.
        metric: None stands for each task's own.
        samples: held-out examples per task.
        train: training examples of a search, per task.
        val: examples that it chooses on, per task.
        protocols: those that apply.
    """

    tasks: tuple[str, ...]
    metric: str | None
    samples: int
    train: int = 8
    val: int = 12
    protocols: tuple[str, ...] = ("aware", "agnostic")
    searched: tuple[str, ...] = ()


#: Those of RULER that `general` has nothing like.
RULER_UNSEEN = ("niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery", "fwe")
#: The English subsets of MiniLongBench whose answers a small model can be scored on.
MINILONGBENCH = (
    "gov_report",
    "hotpotqa",
    "lcc",
    "multi_news",
    "musique",
    "narrativeqa",
    "passage_count",
    "qasper",
    "qmsum",
    "samsum",
    "trec",
)

TABLES = {
    "needles": Table(tuple(f"niah:context={context}" for context in (800, 1600, 3200)), None, 32, train=4, val=8),
    "ruler": Table(tuple(f"ruler:task={name},context=2048" for name in RULER), "logprob", 16, train=2, val=2),
    # Needles and what has little in common with them, one profile for all.
    "workloads": Table(
        (
            "niah:context=1600",
            "ruler:task=niah_multikey_1,context=2048",
            "ruler:task=vt,context=2048",
            "code:context=1600",
            "gsm8k:path={data}/gsm8k_test.jsonl",
            "jsonl:path={data}/minilongbench/multi_news.jsonl,context=2000",
        ),
        "logprob",
        24,
        train=8,
        val=8,
        protocols=("aware",),
    ),
    # The profile that one would publish for a model, on work that its search never saw.
    "unseen": Table(
        (
            *(f"ruler:task={name},context=2048" for name in RULER_UNSEEN),
            *(f"jsonl:path={{data}}/minilongbench/{name}.jsonl,context=2000,split=all" for name in MINILONGBENCH),
        ),
        "logprob",
        8,
        train=24,
        val=24,
        protocols=("aware",),
        searched=("general",),
    ),
}


class Runner:
    """Evolves and evaluates; what is done already is read back."""

    def __init__(self, model: Any, tokenizer: Any, bench: Bench, arguments: SimpleNamespace):
        self.model, self.tokenizer, self.seed, self.arguments = model, tokenizer, bench.seed, arguments
        self.seeds = seeds_from(bench, arguments.seeds)
        self.budgets = sorted(read_budgets(arguments.budgets), key=size_of)
        self.granularity: Granularity = "head" if describe_model(model).num_kv_heads > 1 else "layer"

    def run(self, name: str, table: Table) -> list[dict[str, Any]]:
        """Return what docs/results.md needs of a table, for each protocol."""
        parts = []
        for protocol in (each for each in table.protocols if each in self.arguments.protocol):
            stem, tasks = f"{name}-{protocol}", self._paths(table.tasks)
            stems = [stem if seed == self.seed else f"{stem}-seed{seed}" for seed in self.seeds]
            evolved = [
                self._evolve(each, table, tasks, protocol, seed) for each, seed in zip(stems, self.seeds, strict=True)
            ]
            by_budget = self._evolved_under(stem)
            under = [*by_budget.values()]
            lukv = self._evolve(
                f"{stem}-{LUKV}", table, tasks, protocol, self.seed, selector=under, strategy="start", start=LUKV
            )
            rows, pairs = self._scored(stem, table, tasks, protocol, evolved, lukv, by_budget)
            about = {"table": name, "protocol": protocol, "metric": rows[0]["metric"], "evolved_under": under}
            parts.append({**about, **condensed(rows, pairs, self.budgets)})
        return parts

    def _paths(self, specs: Sequence[str]) -> list[str]:
        return [spec.format(data=self.arguments.data) for spec in specs]

    def _scored(
        self,
        stem: str,
        table: Table,
        tasks: list[str],
        protocol: str,
        evolved: list[str],
        lukv: str,
        under: dict[Budget, str],
    ) -> tuple[list[Any], list[Any]]:
        first, *later = evolved
        methods = list(dict.fromkeys(["full", *self.arguments.methods, *self._selectors(protocol), first, lukv]))
        asked = {stem: methods, **({f"{stem}-seeds": later} if later else {})}
        rows: list[Any] = []
        examples: dict[tuple[str, str], dict[str, Record]] = {}
        for name, its in asked.items():
            records = self.arguments.out / f"{name}-{table.metric or 'text'}.records.jsonl"
            rows += evolkv.evaluate(
                self.model,
                self.tokenizer,
                task=tasks,
                methods=its,
                budgets=self.budgets,
                samples=table.samples,
                seed=self.seed,
                metric=table.metric,
                protocol=protocol,
                records=records,
            )
            for example, by_method in read_records(records).examples.items():
                examples.setdefault(example, {}).update(by_method)
        comparisons = []
        metrics = {row["task"]: row["metric"] for row in rows}

        @cache
        def paired(budget: int, task: str, other: str) -> dict[str, Any]:
            """Compare the mean over the searches with another method, on the examples of a task, or all of them."""
            answered = [each for (its, _), each in examples.items() if its == task or task == ALL]
            mine = [[each[label(method, budget)].score for method in evolved] for each in answered]
            theirs = [each[label(other, budget)].score for each in answered]
            compared = paired_comparison(np.mean(mine, axis=1), theirs).to_dict()
            searches = np.mean(mine, axis=0) - np.mean(theirs)
            return {**compared, "searches": searches.tolist()} if len(evolved) > 1 else compared

        if len(metrics) > 1 and len(set(metrics.values())) == 1:
            metrics[ALL] = rows[0]["metric"]
        names = {**dict.fromkeys(evolved, "evolved"), lukv: LUKV}
        for task, its_metric in metrics.items():
            for budget in self.budgets:
                at = [row for row in rows if row["budget"] == budget and row["method"] not in evolved]
                best = _best(at if task == ALL else [row for row in at if row["task"] == task])
                with_best, with_lukv, equal = (paired(budget, task, other) for other in (best, lukv, under[budget]))
                about = {"task": task, "protocol": protocol, "metric": its_metric, "budget": budget}
                comparisons.append({**about, "best": names.get(best, best), **with_best, LUKV: with_lukv, EQUAL: equal})
        for row in rows:
            row["method"] = names.get(row["method"], row["method"])
        return rows, comparisons

    def _selectors(self, protocol: str) -> list[str]:
        """Return what budgets are evolved under: unless said otherwise, what `evolkv search` takes."""
        chosen, least = self.arguments.selector, self.budgets[0]
        if chosen is None and isinstance(least, Share):
            raise UsageError(
                f"the budgets are shares, of which {least} is the smallest; name selectors with --selector"
            )
        return [get_selector(each).spec for each in chosen or competing(protocol, int(least))]

    def _evolved_under(self, stem: str) -> dict[Budget, str]:
        """Return the selectors of the profiles, by budget."""
        names = {budget: self.arguments.out / f"{stem}-{budget}.profile.json" for budget in self.budgets}
        return {at: get_selector(evolkv.BudgetProfile.load(name).selector).spec for at, name in names.items()}

    def _evolve(self, stem: str, table: Table, tasks: list[str], protocol: str, seed: int, **settings: Any) -> str:
        """Profiles for all budgets, made unless they are there; the method that stands for them."""
        pattern = str(self.arguments.out / f"{stem}-{{}}.profile.json")
        paths = [Path(pattern.replace("{}", str(budget))) for budget in self.budgets]
        if all(path.exists() for path in paths):
            return pattern
        searched = list(table.searched) or tasks
        curve = search_curve(
            self.model,
            self.tokenizer,
            task=get_task(searched),
            budgets=self.budgets,
            granularity=self.granularity,
            protocol=protocol,
            train=table.train * len(searched),
            val=table.val * len(searched),
            max_evals=self.arguments.max_evals,
            first=self.arguments.first,
            seed=seed,
            storage=str(self.arguments.out / f"{stem}.study.db"),
            **{"selector": self._selectors(protocol), **settings},
        )
        for path, found in zip(paths, curve.results, strict=True):
            found.profile.save(path)
        return pattern


def _best(rows: Sequence[dict[str, Any]]) -> str:
    """The method with the highest mean over all examples of the rows."""
    sums: dict[str, float] = {}
    for row in rows:
        sums[row["method"]] = sums.get(row["method"], 0.0) + row["n"] * row["score"]
    return max(sums, key=lambda method: sums[method])


def condensed(rows: list[dict[str, Any]], pairs: list[dict[str, Any]], budgets: list[Budget]) -> dict[str, Any]:
    """Return scores by method and budget (means over tasks), and evolved budgets beside the best other by task."""

    def means(method: str) -> list[float]:
        mine = [row for row in rows if row["method"] == method]
        return [float(np.mean([row["score"] for row in mine if row["budget"] in (budget, None)])) for budget in budgets]

    full = {row["task"]: (row["score"], row["n"]) for row in rows if row["method"] == "full"}
    comparisons, keys = [], ("best", "mean_b", "mean_a", "difference", "ci95", "searches")
    for task in dict.fromkeys(pair["task"] for pair in pairs):
        scores, counts = zip(*([full[task]] if task in full else full.values()), strict=True)
        cells = [
            {key: pair[key] for key in (*keys, LUKV, EQUAL) if key in pair} for pair in pairs if pair["task"] == task
        ]
        whole = float(np.average(scores, weights=counts))
        comparisons.append({"task": _short(task), "n": sum(counts), "full": whole, "cells": cells})
    methods = dict.fromkeys(row["method"] for row in rows)
    haystacks = sorted({row["haystack"] for row in rows if "haystack" in row})
    return {
        "budgets": budgets,
        **({"haystack": "; ".join(haystacks)} if haystacks else {}),
        "scores": {method: means(method) for method in methods},
        "comparisons": comparisons,
    }


def _short(task: str) -> str:
    """A task's spec without what is the same throughout, and without folders."""
    name, _, rest = task.partition(":")
    values = [part.partition("=") for part in rest.split(",") if part]
    return " ".join([name, *(Path(value).name if key == "path" else value for key, _, value in values)])


def _changed(table: Table, arguments: SimpleNamespace) -> Table:
    """Return the table with what the command line says instead."""
    given = {name: getattr(arguments, name) for name in ("samples", "train", "val")}
    table = replace(table, **{name: value for name, value in given.items() if value is not None})
    if arguments.tasks:
        table = replace(table, tasks=tuple(task for task in table.tasks if any(x in task for x in arguments.tasks)))
    return table


def main(
    bench: Bench,
    out: Path,
    table: list[str] = list(TABLES),  # noqa: B006
    data: Path = Path("data"),
    budgets: list[str] = ["64", "128", "256", "512"],  # noqa: B006
    protocol: list[Literal["aware", "agnostic"]] = ["aware", "agnostic"],  # noqa: B006
    methods: list[str] = list(PUBLISHED),  # noqa: B006
    selector: list[str] | None = None,
    max_evals: int = 900,
    first: Literal["smallest", "largest"] = "smallest",
    samples: int | None = None,
    train: int | None = None,
    val: int | None = None,
    tasks: list[str] | None = None,
    seeds: int = 1,
) -> dict[str, Any]:
    """Evolve budgets, and score them beside published methods.

    Args:
        out: folder for everything.
        table: tables to make.
        data: folder with gsm8k_test.jsonl and minilongbench/.
        budgets: mean cache entries per KV head, or shares of each prompt, such as 10%.
        protocol: whether the question is compressed with the context (aware) or comes later (agnostic).
        methods: published methods to compare with.
        selector: what budgets are evolved under, the best on validation; default: what `evolkv search` takes.
        max_evals: candidates at the first budget.
        first: where curves begin.
        samples: held-out examples per task; default: the table's.
        train: training examples per task; default: the table's.
        val: validation examples per task; default: the table's.
        tasks: only tasks whose spec contains one of these.
        seeds: searches, from --seed on.
    """
    arguments = SimpleNamespace(**{name: value for name, value in locals().items() if name != "bench"})
    if unknown := [name for name in table if name not in TABLES]:
        raise UsageError(f"--table {' '.join(unknown)}: choose among {', '.join(TABLES)}")
    tables = {name: _changed(TABLES[name], arguments) for name in table}
    tables = {name: each for name, each in tables.items() if each.tasks}
    if not tables:
        raise UsageError(f"no task of {' '.join(table)} contains any of {' '.join(tasks or [])}")
    out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    runner = Runner(*bench.load(), bench, arguments)
    parts = [part for name, each in tables.items() for part in runner.run(name, each)]
    return {"n": max(row["n"] for part in parts for row in part["comparisons"]), "seeds": seeds, "tables": parts}


if __name__ == "__main__":
    run(__doc__, main, dtype="bfloat16")
