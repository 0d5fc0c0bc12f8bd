"""Two methods that are on record, compared task by task on the examples that both have answered."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evolkv.budgets import Budget, BudgetSpec, read_budget
from evolkv.errors import UsageError
from evolkv.evaluation.records import ByMethod, MethodSettings, Record, Records, metrics_of, read_records, warn_of_seen
from evolkv.registry import unknown_name
from evolkv.significance import PairedComparison, paired_comparison

FORMAT = "evolkv.comparison/1"
#: Scores of one prompt and method that differ by more than rounding were not measured alike.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class TaskComparison:
    """Two methods on one task; `unpaired` examples are on record for only one of them."""

    task: str
    metric: str
    unpaired: int
    result: PairedComparison


@dataclass(frozen=True)
class MethodComparison:
    """Two methods, by their labels, on every task that is on record for both; `overall` is over all their examples.

    `left_out` are the tasks of which no example is on record for both.
    """

    model: str
    a: str
    b: str
    tasks: list[TaskComparison]
    overall: PairedComparison
    left_out: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        rows = [
            {"task": each.task, "metric": each.metric, **each.result.to_dict(), "unpaired": each.unpaired}
            for each in self.tasks
        ]
        names = {"model": self.model, "a": self.a, "b": self.b}
        return {"format": FORMAT, **names, "rows": rows, "all": self.overall.to_dict(), "left_out": self.left_out}


def compare_records(
    paths: Sequence[str | os.PathLike[str]],
    a: str | None = None,
    b: str | None = None,
    budget: BudgetSpec | None = None,
    seed: int = 0,
) -> MethodComparison:
    """Compare two methods on the same examples.

    A warning says on how many of them a profile was evolved or chosen, as far as the records know.

    Args:
        paths: files of records, of one model and protocol.
        a: name of a method, or ``METHOD@BUDGET``. May be left out, as `b`, where only one choice is left.
        b: the other one.
        budget: of methods that are on record at several, such as 128 or ``"10%"``.
        seed: of resamples and flips; see `paired_comparison`.

    Raises:
        BudgetError: what is no budget.
        UsageError: files that do not belong together, an unknown or ambiguous method, or no examples in common.
    """
    if not paths:
        raise UsageError("nothing to compare; give at least one file of records")
    methods, examples, seen, model = _merged(paths)
    first, second = _pair(methods, a, b, None if budget is None else read_budget(budget))
    by_task: dict[str, list[tuple[Record | None, Record | None]]] = {}
    for (task, _), by_method in examples.items():
        if first in by_method or second in by_method:
            by_task.setdefault(task, []).append((by_method.get(first), by_method.get(second)))
    tasks: list[TaskComparison] = []
    scores: list[tuple[float, float]] = []
    for task, pairs in by_task.items():
        both = [(x, y) for x, y in pairs if x is not None and y is not None]
        for x, y in both:
            if x.prompt_sha256 != y.prompt_sha256 or x.metric != y.metric:
                raise UsageError(
                    f"{first} and {second} were not asked the same on {x.example} of {task}: "
                    f"{'their prompts differ' if x.metric == y.metric else f'metric {x.metric}, then {y.metric}'}; "
                    "evaluate them with the same settings"
                )
        if both:
            _warn_of_seen(seen, (first, second), task, [x.example for x, _ in both])
            column = [(x.score, y.score) for x, y in both]
            tasks.append(
                TaskComparison(task, metrics_of(x for x, _ in both), len(pairs) - len(both), _compared(column, seed))
            )
            scores += column
    if not tasks:
        raise UsageError(f"{first} and {second} have no example in common; evaluate both on the same examples")
    left_out = [task for task in by_task if task not in {each.task for each in tasks}]
    return MethodComparison(model, first, second, tasks, _compared(scores, seed), left_out)


def _warn_of_seen(seen: Mapping[tuple[str, str], set[str]], labels: Sequence[str], task: str, names: list[str]) -> None:
    for label in labels:
        if known := seen.get((label, task), set()).intersection(names):
            warn_of_seen(label, len(known), len(names), task)


def _compared(scores: list[tuple[float, float]], seed: int) -> PairedComparison:
    return paired_comparison([a for a, _ in scores], [b for _, b in scores], seed)


def _merged(
    paths: Sequence[str | os.PathLike[str]],
) -> tuple[dict[str, MethodSettings], dict[tuple[str, str], ByMethod], dict[tuple[str, str], set[str]], str]:
    """Methods by label, records by task and example, seen examples by label and task, and the model, of all files."""
    methods: dict[str, MethodSettings] = {}
    examples: dict[tuple[str, str], ByMethod] = {}
    seen: dict[tuple[str, str], set[str]] = {}
    files = [(path, read_records(path)) for path in paths]
    start = files[0][1].settings
    for path, records in files:
        settings = records.settings
        for name, before, now in (
            ("model", start.model.fingerprint, settings.model.fingerprint),
            ("dtype", start.model.dtype, settings.model.dtype),
            ("protocol", start.protocol, settings.protocol),
            ("prefill_chunk", start.prefill_chunk, settings.prefill_chunk),
            ("block_size", start.block_size, settings.block_size),
        ):
            if before != now:
                raise UsageError(
                    f"{paths[0]} and {path} cannot be compared: {name} {before} there, {now} here; "
                    "give files that share it"
                )
        for label, method in settings.methods.items():
            first = methods.setdefault(label, method)
            other = first.budgets_sha256 != method.budgets_sha256
            if other or first.selector != method.selector:
                what = "other budgets" if other else "another selector"
                raise UsageError(f"{path}: {label} has {what} than in the files before; give files that agree")
            for task, names in method.seen.items():
                seen.setdefault((label, task), set()).update(names)
        records.warn_unfinished(path, "repeat the evaluation's command to finish it")
        _merge(path, records, examples)
    return methods, examples, seen, start.model.name


def _merge(path: str | os.PathLike[str], records: Records, examples: dict[tuple[str, str], ByMethod]) -> None:
    for key, by_method in records.examples.items():
        merged = examples.setdefault(key, {})
        for label, record in by_method.items():
            before = merged.setdefault(label, record)
            if before.prompt_sha256 != record.prompt_sha256 or abs(before.score - record.score) > _ROUNDING:
                raise UsageError(
                    f"{path}: {label} on {record.example} of {record.task} is not as in the files before; "
                    "give only one of them"
                )


def _pair(methods: dict[str, MethodSettings], a: str | None, b: str | None, budget: Budget | None) -> tuple[str, str]:
    """Labels of the two methods that are meant."""
    at = {label: each for label, each in methods.items() if budget is None or each.budget in (budget, None)}
    first = None if a is None else _label(methods, at, a)
    second = None if b is None else _label(methods, at, b)
    left = [label for label in at if label not in (first, second)]
    missing = (first is None) + (second is None)
    if missing and len(left) != missing:
        raise UsageError(
            f"which two methods to compare is open: on record are {', '.join(at) or 'none at this budget'}; "
            "give --a and --b"
        )
    first = first or left.pop(0)
    second = second or left.pop(0)
    if first == second:
        raise UsageError(f"--a and --b are both {first}; give two methods")
    return first, second


def _label(methods: dict[str, MethodSettings], at: dict[str, MethodSettings], word: str) -> str:
    if word in methods:
        if word not in at:
            raise UsageError(f"{word} is not at the budget of --budget; leave that out, or the budget of {word}")
        return word
    labels = [label for label, each in at.items() if each.method == word]
    if not labels:
        others = [label for label, each in methods.items() if each.method == word]
        if others:
            raise UsageError(f"{word} is on record as {', '.join(others)}, not at this budget; give another --budget")
        raise unknown_name("method", word, at)
    if len(labels) > 1:
        raise UsageError(f"{word} is on record as {', '.join(labels)}; give one of these, or --budget")
    return labels[0]
