"""`evolkv list`."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from evolkv.cli import console
from evolkv.cli.command import Command, Group
from evolkv.cli.tables import list_table, print_whole
from evolkv.errors import UsageError
from evolkv.registry import Registry

app = typer.Typer(cls=Group, help="List what can be named on the command line.")

Rows = list[dict[str, Any]]


def _command(rows: Callable[[], Rows]) -> None:
    """Make a command of a function that returns rows."""

    def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
        _print(rows(), as_json)

    app.command(rows.__name__, cls=Command, help=rows.__doc__)(command)


@_command
def models() -> Rows:
    """Models that need no download, once their packages are installed."""
    from evolkv.models import list_models

    return [asdict(row) for row in list_models()]


@_command
def tasks() -> Rows:
    """Tasks, and the settings that may follow their names."""
    from evolkv.tasks import TASKS

    return [_row(name, task, _dataclass_defaults(task)) for name, task in _usable(TASKS)]


@_command
def metrics() -> Rows:
    """Metrics."""
    from evolkv.tasks.metrics import METRICS, MODEL_METRICS

    rows = [_row(name, metric) for name, metric in _usable(METRICS)]
    rows += [{"name": name, "description": said} for name, said in MODEL_METRICS.items()]
    return sorted(rows, key=lambda row: row["name"])


@_command
def selectors() -> Rows:
    """Selectors, and the parameters that may follow their names."""
    from evolkv.selectors import SELECTORS

    return [_row(name, selector, selector.parameters()) for name, selector in _usable(SELECTORS)]


@_command
def allocators() -> Rows:
    """Allocators, and the parameters that may follow their names. lukv is made by a search, with --start lukv."""
    from evolkv.allocators import ALLOCATORS, lukv
    from evolkv.allocators.adaptive import ADAPTIVE

    fixed = [_row(name, allocator, {}) for name, allocator in (*_usable(ALLOCATORS), ("lukv", lukv))]
    return [*fixed, *(_row(name, each, _dataclass_defaults(each)) for name, each in _usable(ADAPTIVE))]


@_command
def strategies() -> Rows:
    """Strategies of a search."""
    from evolkv.evolution import STRATEGIES

    return [_row(name, strategy) for name, strategy in STRATEGIES.items()]


def _usable(registry: Registry[Any]) -> Iterator[tuple[str, Any]]:
    """Yield names and entries; warn of those of other packages that cannot be used, which must not hide the rest."""
    for name in registry:
        try:
            yield name, registry[name]
        except UsageError as error:
            console.warn(str(error))


def _row(name: str, described: Any, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    first = (inspect.getdoc(described) or "").partition("\n")[0].replace("`", "")
    row: dict[str, Any] = {"name": name, "description": first}
    return row if parameters is None else {**row, "parameters": dict(parameters)}


def _dataclass_defaults(cls: Any) -> dict[str, Any]:
    """Fields and their defaults; "required" for a field that has none."""
    missing = dataclasses.MISSING
    return {field.name: "required" if field.default is missing else field.default for field in dataclasses.fields(cls)}


def _print(rows: Rows, as_json: bool) -> None:
    if as_json:
        console.OUT.file.write(json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
        return
    for row in rows:
        if "installed" in row:
            row["installed"] = "yes" if row["installed"] else "no"
            row["package"] = row["package"].replace(" ", "\n")
        if "parameters" in row:
            row["parameters"] = "\n".join(
                key if value == "required" else f"{key}={str(value).lower() if value in (None, False) else value}"
                for key, value in row["parameters"].items()
            )
    print_whole(list_table(rows))
