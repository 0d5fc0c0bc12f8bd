r"""Task specs: `name` or `name:key=value,key=value`, as on the command line; several with ` && ` between them.

A value may contain anything but ` && `. A comma in it is written `\,`. Backslashes are literal (Windows paths need no
care) except in a run directly before a comma: there each pair stands for one backslash and an odd one out
escapes the comma. `none` stands for no value where a setting may have none; a file of that name is `./none`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from evolkv.errors import TaskError
from evolkv.registry import Registry, unknown_name
from evolkv.tasks.base import Task
from evolkv.tasks.code import CodeCompletion
from evolkv.tasks.gsm8k import Gsm8k
from evolkv.tasks.jsonl import JsonLines
from evolkv.tasks.longbench import LongBench
from evolkv.tasks.mixture import Mixture
from evolkv.tasks.niah import NeedleInHaystack
from evolkv.tasks.ruler import Ruler

TASKS: Registry[type[Task]] = Registry(
    "task",
    {task.name: task for task in (NeedleInHaystack, JsonLines, LongBench, Ruler, Gsm8k, CodeCompletion)},
    "evolkv.tasks",
    Task,
)

_AND = " && "
_COMMA = re.compile(r"(\\*),")
#: No setting is larger: a larger number is a mistake.
_MOST = 2**31
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def get_task(spec: str | Task | Sequence[str | Task]) -> Task:
    """The task that a spec describes; a task is returned as it is.

    Args:
        spec: `name` or `name:key=value,key=value`, e.g. `niah:context=1600,needles=1`. Several, as a list or with
            ` && ` between them, are a `Mixture`.

    Raises:
        UsageError: unknown task or key; the message suggests the nearest one.
        TaskError: a malformed spec, a missing key, or a value of the wrong type or out of range.
    """
    if isinstance(spec, Task):
        return spec
    several: list[str | Task] = []
    for each in [spec] if isinstance(spec, str) else spec:
        # A mixture within another would share the examples out otherwise than its spec reads.
        several += each.split(_AND) if isinstance(each, str) else each.tasks if isinstance(each, Mixture) else [each]
    if len(several) > 1:
        return Mixture(tuple(get_task(each) for each in several))
    if not several:
        raise TaskError("no task is given; expected a spec such as 'niah:context=1600'")
    if isinstance(several[0], Task):
        return several[0]
    name, texts = parse_spec(several[0])
    task = TASKS[name]
    fields = {f.name: f for f in dataclasses.fields(task)}  # type: ignore[arg-type]
    hints = get_type_hints(task)
    values = {}
    for key, text in texts.items():
        if key not in fields:
            raise unknown_name(f"{name} setting", key, fields)
        values[key] = _convert(text, hints[key], f"task {name!r}: {key}={text}")
    for key, field in fields.items():
        if field.default is dataclasses.MISSING and key not in values:
            raise TaskError(f"task {name!r} needs {key}; write {name}:{key}=VALUE")
    return task(**values)


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split a spec into the task's name and its values as text.

    Raises:
        TaskError: a part that is not key=value, or a key given twice.
    """
    name, _, rest = spec.partition(":")
    values: dict[str, str] = {}
    for part in _split_commas(rest) if rest.strip() else []:
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key:
            raise TaskError(rf"task spec {spec!r}: {part!r} is not key=value; write a comma in a value as '\,'")
        if key in values:
            raise TaskError(f"task spec {spec!r}: {key} is given twice; give it once")
        values[key] = value
    return name.strip(), values


def format_spec(task: Task) -> str:
    """The spec that `get_task` turns back into `task`; settings at their defaults are left out."""
    if isinstance(task, Mixture):
        return _AND.join(format_spec(each) for each in task.tasks)
    parts = []
    for field in dataclasses.fields(task):  # type: ignore[arg-type]
        value = getattr(task, field.name)
        if value != field.default:
            parts.append(f"{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    escaped = [_COMMA.sub(r"\1\1\\,", part) for part in parts]
    # A run of backslashes that ends a value stands before the comma that separates it from the next.
    escaped[:-1] = [re.sub(r"(\\+)\Z", r"\1\1", part) for part in escaped[:-1]]
    return ":".join([task.name, ",".join(escaped)]) if escaped else task.name


def _split_commas(text: str) -> list[str]:
    parts, part, end = [], "", 0
    for match in _COMMA.finditer(text):
        backslashes = len(match[1])
        part += text[end : match.start()] + "\\" * (backslashes // 2)
        if backslashes % 2:
            part += ","
        else:
            parts.append(part)
            part = ""
        end = match.end()
    return [*parts, part + text[end:]]


def _convert(text: str, annotation: Any, where: str) -> Any:
    optional = get_origin(annotation) in (Union, types.UnionType)
    if optional:
        (annotation,) = (kind for kind in get_args(annotation) if kind is not types.NoneType)
    word = text.strip()
    if optional and word.lower() == "none":
        return None
    if annotation is str:
        return text
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        if word in choices:
            return word
        raise TaskError(f"{where}: expected one of {', '.join(choices)}")
    if annotation is bool:
        if word.lower() in _BOOLEANS:
            return _BOOLEANS[word.lower()]
        raise TaskError(f"{where}: expected true or false")
    try:
        number = annotation(word)
    except ValueError:
        number = math.nan
    # NaN compares with nothing.
    if not -_MOST <= number <= _MOST:
        raise TaskError(f"{where}: expected {'a whole number' if annotation is int else 'a number'} up to {_MOST:,}")
    return number
