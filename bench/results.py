"""Evolved budgets against the methods that one would use instead, on the field's benchmarks.

    python bench/results.py --out DIR [--table NAME ...] [--model smollm2-135m] [--data DIR] [--budgets 64 128 256 512]

For each table, under each protocol: budgets are evolved at every `--budgets` as one curve (metric logprob, on training
examples), then these, published methods, and the rankings that budgets were evolved under, at equal budgets, are scored
on the same held-out examples. `evolved − best` is paired with the method that scores best on those very examples at
that budget and task, which favours the methods that are not evolved.

Everything is kept in DIR: profiles, studies, records of every example, NAME.json and NAME.md. Given again, the same
command goes on where it was stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import evolkv
from common import count, finish, machine, parser, run
from evolkv.evaluation.compare import compare_records
from evolkv.evaluation.records import label
from evolkv.evolution import search_curve
from evolkv.models import describe_model
from evolkv.selectors import parse_selector
from evolkv.tasks import get_task

#: Stands for the examples of all tasks that one profile is evolved for.
ALL = "all examples"
#: What one would use instead.
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
#: What budgets are evolved under unless said otherwise. A window of 32 would be half of a budget of 64.
SELECTORS = {"aware": "snapkv:window=8", "agnostic": "keydiff"}
SINGLE = ("niah_single_1", "niah_single_2", "niah_single_3")
MULTIKEY = ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3")
OTHERS = ("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")
ENGLISH = ("narrativeqa", "qasper", "hotpotqa", "musique", "gov_report", "qmsum", "multi_news", "trec", "samsum", "lcc")


@dataclass(frozen=True)
class Table:
    """One table of results.

    Args:
        tasks: specs; ``{data}`` stands for the folder with the user's files.
        metrics: None stands for each task's own.
        samples: held-out examples per task.
        together: whether one profile is evolved on all tasks together, rather than one on each.
        evolve_on: specs to evolve on instead of `tasks`; implies `together`.
        train: training examples of a search, per task.
        val: examples that it chooses on, per task.
        protocols: those that apply.
    """

    tasks: tuple[str, ...]
    metrics: tuple[str | None, ...]
    samples: int
    together: bool = False
    evolve_on: tuple[str, ...] = ()
    train: int = 8
    val: int = 12
    protocols: tuple[str, ...] = ("aware", "agnostic")


def _ruler(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"ruler:task={name},context=4096" for name in names)


TABLES = {
    "needles": Table(
        tuple(f"niah:context={context}" for context in (800, 1600, 3200)), (None,), 32, together=True, train=4, val=8
    ),
    "languages": Table(
        tuple(f"niah:context=1600,language={code}" for code in ("en", "de", "fr", "es", "zh")),
        ("logprob",),
        32,
        evolve_on=("niah:context=1600",),
        train=12,
        val=24,
        protocols=("aware",),
    ),
    "ruler-single": Table(_ruler(SINGLE), ("logprob",), 24),
    "ruler-multikey": Table(_ruler(MULTIKEY), ("logprob",), 24),
    "ruler-others": Table(_ruler(OTHERS), ("logprob",), 24),
    "minilongbench": Table(
        tuple(f"jsonl:path={{data}}/minilongbench/{name}.jsonl,context=2000" for name in ENGLISH),
        ("logprob",),
        16,
        together=True,
        train=3,
        val=3,
        protocols=("aware",),
    ),
    "code": Table(("code:context=1600",), ("logprob", None), 64, train=12, val=24, protocols=("aware",)),
    "gsm8k": Table(("gsm8k:path={data}/gsm8k_test.jsonl",), ("logprob",), 64, train=12, val=24),
}


class Runner:
    """Evolves and evaluates; what is done already is read back."""

    def __init__(self, model: Any, tokenizer: Any, arguments: Any):
        self.model, self.tokenizer, self.arguments = model, tokenizer, arguments
        self.budgets: list[int] = sorted(arguments.budgets)
        self.granularity = "head" if describe_model(model).num_kv_heads > 1 else "layer"

    def run(self, name: str, table: Table) -> dict[str, Any]:
        """All rows and comparisons of a table."""
        result: dict[str, Any] = {"table": name, "rows": [], "comparisons": []}
        for protocol in (each for each in table.protocols if each in self.arguments.protocol):
            groups = [table.tasks] if table.together or table.evolve_on else [(task,) for task in table.tasks]
            for number, tasks in enumerate(groups):
                stem = f"{name}-{protocol}" + f"-{number}" * (len(groups) > 1)
                rows, comparisons = self._group(stem, table, self._paths(tasks), protocol)
                result["rows"] += rows
                result["comparisons"] += comparisons
        return result

    def _paths(self, specs: Sequence[str]) -> list[str]:
        return [spec.format(data=self.arguments.data) for spec in specs]

    def _group(self, stem: str, table: Table, tasks: list[str], protocol: str) -> tuple[list[Any], list[Any]]:
        profiles = self._evolve(stem, table, self._paths(table.evolve_on) or tasks, protocol)
        found: tuple[list[Any], list[Any]] = ([], [])
        for metric in table.metrics:
            for part, more in zip(found, self._scored(stem, table, tasks, protocol, profiles, metric), strict=True):
                part.extend(more)
        return found

    def _scored(
        self, stem: str, table: Table, tasks: list[str], protocol: str, profiles: str, metric: str | None
    ) -> tuple[list[Any], list[Any]]:
        records = self.arguments.out / f"{stem}-{metric or 'text'}.records.jsonl"
        rows = evolkv.evaluate(
            self.model,
            self.tokenizer,
            task=tasks,
            methods=list(dict.fromkeys(["full", *self.arguments.methods, *self._selectors(protocol), profiles])),
            budgets=self.budgets,
            samples=table.samples,
            seed=self.arguments.seed,
            metric=metric,
            protocol=protocol,
            records=records,
        )
        comparisons = []
        metrics = {row["task"]: row["metric"] for row in rows}
        if len(metrics) > 1 and len(set(metrics.values())) == 1:
            metrics[ALL] = rows[0]["metric"]
        for task, its_metric in metrics.items():
            for budget in self.budgets:
                at = [row for row in rows if row["budget"] == budget and row["method"] != profiles]
                best = _best(at if task == ALL else [row for row in at if row["task"] == task])
                compared = compare_records([records], label(profiles, budget), label(best, budget))
                pairs = {each.task: each.result for each in compared.tasks} | {ALL: compared.overall}
                about = {"task": task, "protocol": protocol, "metric": its_metric, "budget": budget}
                comparisons.append({**about, "best": best, **pairs[task].to_dict()})
        for row in rows:
            row["method"] = "evolved" if row["method"] == profiles else row["method"]
        return rows, comparisons

    def _selectors(self, protocol: str) -> list[str]:
        return self.arguments.selector or [SELECTORS[protocol]]

    def _evolve(self, stem: str, table: Table, tasks: list[str], protocol: str) -> str:
        """Profiles for all budgets, made unless they are there; the method that stands for them."""
        pattern = str(self.arguments.out / f"{stem}-{{}}.profile.json")
        paths = [Path(pattern.replace("{}", str(budget))) for budget in self.budgets]
        if all(path.exists() for path in paths):
            return pattern
        curve = search_curve(
            self.model,
            self.tokenizer,
            task=get_task(tasks),
            budgets=self.budgets,
            selector=[parse_selector(each) for each in self._selectors(protocol)],
            granularity=self.granularity,
            protocol=protocol,
            train=table.train * len(tasks),
            val=table.val * len(tasks),
            max_evals=self.arguments.max_evals,
            first=self.arguments.first,
            seed=self.arguments.seed,
            storage=str(self.arguments.out / f"{stem}.study.db"),
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


def markdown(result: dict[str, Any], budgets: Sequence[int]) -> str:
    """For each protocol and metric: methods by budget, the mean over tasks; evolved against the best, task by task."""
    kinds = dict.fromkeys((row["protocol"], row["metric"]) for row in result["rows"])
    parts = []
    for protocol, metric in kinds:
        rows = [row for row in result["rows"] if (row["protocol"], row["metric"]) == (protocol, metric)]
        pairs = [pair for pair in result["comparisons"] if (pair["protocol"], pair["metric"]) == (protocol, metric)]
        counts = sorted({row["n"] for row in rows})
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        numbers = " to ".join(str(n) for n in dict.fromkeys([counts[0], counts[-1]]))
        parts += [f"Protocol {protocol}, metric {metric}: mean over {len(tasks)} tasks, n = {numbers} each\n"]
        parts += [*_by_method(rows, budgets), "", *_by_task(rows, pairs), ""]
    return "\n".join(parts)


def _by_method(rows: Sequence[dict[str, Any]], budgets: Sequence[int]) -> list[str]:
    def means(method: str) -> list[float]:
        mine = [row for row in rows if row["method"] == method]
        return [float(np.mean([row["score"] for row in mine if row["budget"] in (budget, None)])) for budget in budgets]

    scores = {method: means(method) for method in dict.fromkeys(row["method"] for row in rows)}
    best = [max(column) for column in zip(*(scores[each] for each in scores if each != "full"), strict=True)]
    lines = [_line(["method", *map(str, budgets)]), _line(["---"] * (1 + len(budgets)))]
    for method, values in scores.items():
        marks = ["**" if value == top and method != "full" else "" for value, top in zip(values, best, strict=True)]
        lines.append(_line([method, *(f"{m}{value:.3f}{m}" for m, value in zip(marks, values, strict=True))]))
    return lines


def _by_task(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> list[str]:
    budgets = list(dict.fromkeys(pair["budget"] for pair in pairs))
    lines = [_line(["task", "full", *map(str, budgets)]), _line(["---"] * (2 + len(budgets)))]
    full = {row["task"]: row for row in rows if row["method"] == "full"}
    for task in dict.fromkeys(pair["task"] for pair in pairs):
        meant = [full[task]] if task in full else list(full.values())
        whole = sum(row["n"] * row["score"] for row in meant) / sum(row["n"] for row in meant)
        mine = [pair for pair in pairs if pair["task"] == task]
        lines.append(_line([_short(task), f"{whole:.3f}", *map(_compared, mine)]))
    return lines


def _compared(pair: dict[str, Any]) -> str:
    low, high = pair["ci95"]
    difference = f"{pair['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
    shown = f"**{difference}**" if low > 0 else difference
    return f"{pair['best']} {pair['mean_b']:.3f} → {pair['mean_a']:.3f}: {shown}"


def _short(task: str) -> str:
    """A task's spec without what is the same throughout, and without folders."""
    name, _, rest = task.partition(":")
    values = [part.partition("=") for part in rest.split(",") if part]
    return " ".join([name, *(Path(value).name if key == "path" else value for key, _, value in values)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _changed(table: Table, arguments: Any) -> Table:
    """The table with what the command line says instead."""
    given = {name: getattr(arguments, name) for name in ("samples", "train", "val")}
    table = replace(table, **{name: value for name, value in given.items() if value is not None})
    if arguments.tasks:
        table = replace(table, tasks=tuple(task for task in table.tasks if any(x in task for x in arguments.tasks)))
    return table


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--out", type=Path, required=True, help="folder for everything")
    options.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    options.add_argument("--data", type=Path, default=Path("data"), help="folder with gsm8k_test.jsonl, minilongbench/")
    options.add_argument("--budgets", type=count, nargs="+", default=[64, 128, 256, 512])
    options.add_argument("--protocol", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    options.add_argument("--methods", nargs="+", default=list(PUBLISHED), help="published methods to compare with")
    options.add_argument(
        "--selector", nargs="+", help="what budgets are evolved under, the best on validation; default: by protocol"
    )
    options.add_argument("--max-evals", type=count, default=900, help="candidates at the first budget")
    options.add_argument("--first", choices=("smallest", "largest"), default="smallest", help="where curves begin")
    for name, what in (("samples", "held-out"), ("train", "training"), ("val", "validation")):
        options.add_argument(f"--{name}", type=count, help=f"{what} examples per task; default: the table's")
    options.add_argument("--tasks", nargs="+", help="only tasks whose spec contains one of these")
    options.set_defaults(dtype="bfloat16")
    arguments = options.parse_args()
    tables = {name: _changed(TABLES[name], arguments) for name in arguments.table}
    tables = {name: table for name, table in tables.items() if table.tasks}
    if not tables:
        options.error(f"no task of {' '.join(arguments.table)} contains any of {' '.join(arguments.tasks)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model, tokenizer = evolkv.load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    runner = Runner(model, tokenizer, arguments)
    for name, table in tables.items():
        result = runner.run(name, table)
        about = {"machine": machine(model.device), "model": arguments.model, "dtype": arguments.dtype}
        settings = {key: str(value) for key, value in vars(arguments).items()}
        (arguments.out / f"{name}.md").write_text(markdown(result, runner.budgets))
        finish({"benchmark": "results", **about, "settings": settings, **result}, arguments.out / f"{name}.json")


if __name__ == "__main__":
    run(main)
