"""Make commands of typed functions: options from their signatures, help from their docstrings, records of results."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

import evolkv
from evolkv.errors import EvolKVError, UsageError
from lib.common import machine, versions
from lib.records import about_this_run, check_name, write


@dataclass
class Bench:
    """The options that every benchmark has.

    Args:
        model: alias, path or id of the model.
        dtype: number format.
        device: device of the model; default: chosen by the machine.
        seed: of examples and searches.
        json: write the result to this file as well.
        record: put the result on record as bench/records/RECORD.json, for `make tables`.
    """

    model: str = "smollm2-135m"
    dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    json: Path | None = None
    record: str | None = None

    def load(self) -> tuple[PreTrainedModel, Any]:
        """Load the model and its tokenizer."""
        return evolkv.load_model(self.model, dtype=self.dtype, device=self.device)


Command = Callable[..., dict[str, Any]]


def count(text: str) -> int:
    """Read a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def counts(text: str) -> list[int]:
    """Read whole numbers from 1 with commas between them."""
    return [count(part.strip()) for part in text.split(",")]


def run(description: str, *commands: Command, **defaults: Any) -> None:
    """Run one command, or the one of several that the command line names, and print its result as JSON.

    Args:
        description: the module's docstring.
        commands: functions from a `Bench` and options to a result. A key "passed" that is False gives exit code 1.
        defaults: other defaults of the options in `Bench`.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    if len(commands) == 1:
        _add_options(parser, commands[0], defaults)
    else:
        subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
        for command in commands:
            about = inspect.getdoc(command) or ""
            name, summary = command.__name__.replace("_", "-"), about.partition("\n")[0]
            text = about.partition("\nArgs:")[0]
            _add_options(
                subparsers.add_parser(name, help=summary, description=text, formatter_class=raw), command, defaults
            )
    values = vars(parser.parse_args())
    command = values.pop("command")
    bench = Bench(**{name: values.pop(name) for name in Bench.__dataclass_fields__})
    try:
        if bench.record is not None:
            check_name(bench.record)
        with torch.no_grad():
            result = command(bench, **values)
    except EvolKVError as error:
        sys.exit(_failed(2 if isinstance(error, UsageError) else 1, str(error)))
    except KeyboardInterrupt:
        sys.exit(_failed(130, "interrupted"))
    _finish(bench, command.__name__, result)
    sys.exit(0 if result.get("passed", True) else 1)


def _finish(bench: Bench, name: str, result: dict[str, Any]) -> None:
    """Print a result, and write it where the options say."""
    script = Path(sys.argv[0]).stem
    about = {
        "benchmark": script if name == "main" else f"{script} {name.replace('_', '-')}",
        **about_this_run(),
        "machine": machine(bench.device),
        "versions": versions(),
        **{option: getattr(bench, option) for option in ("model", "dtype", "seed")},
    }
    record = {**about, **result}
    print(json.dumps(record, indent=1, ensure_ascii=False))
    if bench.json is not None:
        bench.json.parent.mkdir(parents=True, exist_ok=True)
        bench.json.write_text(json.dumps(record) + "\n")
    if bench.record is not None:
        write(bench.record, record)


def _failed(code: int, message: str) -> int:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return code


def _add_options(parser: argparse.ArgumentParser, command: Command, defaults: dict[str, Any]) -> None:
    """Add the options of `Bench`, and those in a command's signature."""
    parser.set_defaults(command=command)
    for function, given in ((Bench, defaults), (command, {})):
        hints, helps = typing.get_type_hints(function), _described(function)
        for name, parameter in inspect.signature(function).parameters.items():
            if name == "bench":
                continue
            needed = parameter.default is inspect.Parameter.empty
            default = given.get(name, None if needed else parameter.default)
            text = helps.get(name, "")
            if default not in (None, [], False) and not needed:
                shown = " ".join(map(str, default)) if isinstance(default, list) else default
                text += f" (default: {shown})"
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                default=default,
                required=needed,
                help=text.replace("%", "%%"),
                **({"type": _seed} if name == "seed" else _reading(hints[name])),
            )


def _reading(hint: Any) -> dict[str, Any]:
    """Say how argparse reads an option of a type."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if hint is bool:
        return {"action": "store_true"}
    if typing.get_origin(hint) is list:
        inner = _reading(typing.get_args(hint)[0])
        if inner.get("type") is count:
            return {"nargs": "+", "type": counts, "action": _Flat, "metavar": "N"}
        return {**inner, "nargs": "+"}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    return {"type": count if hint is int else hint}


def _seed(text: str) -> int:
    """Read a whole number from 0."""
    return 0 if text == "0" else count(text)


class _Flat(argparse.Action):
    """Joins what `counts` read from several arguments."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [number for part in values for number in part])


def _described(function: Any) -> dict[str, str]:
    """Return what the docstring's section Args says of each option."""
    section = (inspect.getdoc(function) or "").partition("Args:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def seeds_from(bench: Bench, number: int) -> Sequence[int]:
    """Return so many seeds, from the bench's own."""
    return range(bench.seed, bench.seed + number)
