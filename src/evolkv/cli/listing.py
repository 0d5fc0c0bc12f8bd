"""`evolkv list`."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from evolkv.cli import console
from evolkv.cli.command import Command, Group
from evolkv.cli.tables import list_table, print_whole

app = typer.Typer(cls=Group, help="List what can be named on the command line.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(cls=Command)
def models(as_json: AsJson = False) -> None:
    """Models that need no download, once their packages are installed."""
    from evolkv.models import list_models

    rows = [asdict(row) for row in list_models()]
    for row in rows if not as_json else ():
        row["installed"] = "yes" if row["installed"] else "no"
        row["package"] = row["package"].replace(" ", "\n")
    _print(rows, as_json)


@app.command(cls=Command)
def tasks(as_json: AsJson = False) -> None:
    """Tasks, and the settings that may follow their names."""
    from evolkv.tasks import TASKS

    _print([_row(name, task, _dataclass_defaults(task)) for name, task in TASKS.items()], as_json)


@app.command(cls=Command)
def metrics(as_json: AsJson = False) -> None:
    """Metrics."""
    from evolkv.evaluation.scoring import SCORERS
    from evolkv.tasks.metrics import METRICS

    described: dict[str, Any] = {**METRICS, **SCORERS}
    _print([_row(name, described[name]) for name in sorted(described)], as_json)


@app.command(cls=Command)
def selectors(as_json: AsJson = False) -> None:
    """Selectors, and the parameters that may follow their names."""
    from evolkv.selectors import SELECTORS

    _print([_row(name, selector, selector.parameters()) for name, selector in SELECTORS.items()], as_json)


@app.command(cls=Command)
def allocators(as_json: AsJson = False) -> None:
    """Allocators, and the parameters that may follow their names: uniform and pyramid have none."""
    from evolkv.allocators import ALLOCATORS
    from evolkv.allocators.adaptive import ADAPTIVE

    fixed = [_row(name, allocator, {}) for name, allocator in ALLOCATORS.items()]
    _print([*fixed, *(_row(name, each, _dataclass_defaults(each)) for name, each in ADAPTIVE.items())], as_json)


@app.command(cls=Command)
def strategies(as_json: AsJson = False) -> None:
    """Strategies of a search."""
    from evolkv.evolution import STRATEGIES

    _print([_row(name, strategy) for name, strategy in STRATEGIES.items()], as_json)


def _row(name: str, described: Any, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    first = (inspect.getdoc(described) or "").partition("\n")[0].replace("`", "")
    row: dict[str, Any] = {"name": name, "description": first}
    return row if parameters is None else {**row, "parameters": dict(parameters)}


def _dataclass_defaults(cls: Any) -> dict[str, Any]:
    """Fields and their defaults; "required" for a field that has none."""
    missing = dataclasses.MISSING
    return {field.name: "required" if field.default is missing else field.default for field in dataclasses.fields(cls)}


def _print(rows: Iterable[dict[str, Any]], as_json: bool) -> None:
    rows = list(rows)
    if as_json:
        console.OUT.file.write(json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
        return
    for row in rows:
        if "parameters" in row:
            row["parameters"] = "\n".join(
                key if value == "required" else f"{key}={str(value).lower() if value in (None, False) else value}"
                for key, value in row["parameters"].items()
            )
    print_whole(list_table(rows))
