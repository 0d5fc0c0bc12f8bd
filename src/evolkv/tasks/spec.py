"""Tasks from specs: `name` or `name:key=value,key=value` as on the command line, several with commas or ` && ` between.

`none` stands for no value where a setting may have none; a file of that name is `./none`.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from evolkv import specs
from evolkv.errors import TaskError, UsageError
from evolkv.registry import Registry, unknown_name
from evolkv.tasks.base import Task
from evolkv.tasks.code import CodeCompletion
from evolkv.tasks.general import General
from evolkv.tasks.gsm8k import Gsm8k
from evolkv.tasks.jsonl import JsonLines
from evolkv.tasks.longbench import LongBench
from evolkv.tasks.longbench.subsets import NAMES as SUBSET_NAMES
from evolkv.tasks.mixture import Mixture
from evolkv.tasks.niah import NeedleInHaystack
from evolkv.tasks.raw_prompts import RawPrompts
from evolkv.tasks.ruler import Ruler
from evolkv.tasks.ruler.task import FAMILIES

#: The tasks by name.
TASKS: Registry[type[Task]] = Registry(
    "task",
    {
        task.name: task
        for task in (NeedleInHaystack, General, JsonLines, RawPrompts, LongBench, Ruler, Gsm8k, CodeCompletion)
    },
    "evolkv.tasks",
    Task,
)

#: Tasks of benchmarks, which are often given without the benchmark's name.
_PARTS = {Ruler.name: tuple(FAMILIES), LongBench.name: SUBSET_NAMES}
_AND = " && "
#: No setting is larger: a larger number is a mistake.
_MOST = 2**31


def get_task(spec: str | Task | Sequence[str | Task]) -> Task:
    """Return the task that a spec describes; a task is returned as it is.

    Args:
        spec: `name` or `name:key=value,key=value`, e.g. `niah:context=1600,needles=1`. The key of a task's main setting
            may be left out: `ruler:vt`. Several specs (a list, or with commas or ` && ` between) are a `Mixture`.

    Raises:
        UsageError: unknown task or key; the message suggests the nearest one.
        TaskError: a malformed spec, a missing key, or a value of the wrong type or out of range.
    """
    if isinstance(spec, Task):
        return spec
    several: list[Task] = []
    for each in get_tasks(spec):
        # One mixture of all: within another mixture its tasks would get smaller shares, which the spec does not say.
        several += each.tasks if isinstance(each, Mixture) else [each]
    return several[0] if len(several) == 1 else Mixture(tuple(several))


def get_tasks(spec: str | Task | Sequence[str | Task]) -> list[Task]:
    """Return the tasks that one or more specs describe, each on its own; those with ` && ` between are one `Mixture`.

    Args:
        spec: as `get_task` takes it.

    Raises:
        UsageError, TaskError: as for `get_task`; also if there is none.
    """
    tasks: list[Task] = []
    for each in spec if isinstance(spec, Iterable) and not isinstance(spec, (str, bytes)) else [spec]:
        if isinstance(each, Task):
            tasks.append(each)
            continue
        if not isinstance(each, str):
            raise TaskError(f"the task is {each!r:.60}; expected a spec, as 'niah:context=1600', or a Task itself")
        for text in specs.split_specs(each, TASKS):
            several = [_task(part) for part in text.split(_AND)]
            tasks.append(several[0] if len(several) == 1 else Mixture(tuple(several)))
    if not tasks:
        raise TaskError("no task is given; expected a spec such as 'niah:context=1600'")
    return tasks


def parse_task(spec: str) -> tuple[str, dict[str, str]]:
    """Return the task's name and its values as texts.

    Raises:
        TaskError: a part that is not key=value, or a key given twice.
    """
    name = spec.partition(":")[0].strip()
    main = TASKS[name].main_setting if name in TASKS else None
    try:
        return specs.parse_spec(spec, "task", {name: main} if main else None)
    except UsageError as error:
        raise TaskError(str(error)) from None


def format_spec(task: Task) -> str:
    """Return the spec that `get_task` turns back into a task; settings at their defaults are left out.

    Args:
        task: the task.
    """
    if isinstance(task, Mixture):
        return _AND.join(format_spec(each) for each in task.tasks)
    settings = {f.name: (getattr(task, f.name), f.default) for f in dataclasses.fields(task)}  # type: ignore[arg-type]
    return specs.format_spec(
        task.name,
        {
            key: str(value).lower() if isinstance(value, bool) else str(value)
            for key, (value, default) in settings.items()
            if value != default
        },
    )


def _task(spec: str) -> Task:
    name = spec.partition(":")[0].strip()
    if "," in name:
        raise TaskError(f"task {spec!r}: settings stand after a colon; write {spec.replace(',', ':', 1)!r}")
    for owner, parts in _PARTS.items():
        if name.lower() in parts and name not in TASKS:
            raise UsageError(f"unknown task {name!r}. Did you mean '{owner}:{name.lower()}'?")
    task = TASKS[name]
    _, texts = parse_task(spec)
    fields = {f.name: f for f in dataclasses.fields(task)}  # type: ignore[arg-type]
    hints = get_type_hints(task)
    values = {}
    for key, text in texts.items():
        if key not in fields:
            raise unknown_name(f"{name} setting", key, fields)
        values[key] = _convert(text, hints[key], f"task {name!r}: {key}={text}")
    for key, field in fields.items():
        if field.default is field.default_factory is dataclasses.MISSING and key not in values:
            raise TaskError(f"task {name!r} needs {key}; write {name}:{key}=VALUE")
    return task(**values)


def _convert(text: str, annotation: Any, where: str) -> Any:
    optional = get_origin(annotation) in (Union, types.UnionType)
    if optional:
        kinds = [kind for kind in get_args(annotation) if kind is not types.NoneType]
        annotation = kinds[0] if len(kinds) == 1 else annotation
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
        if word.lower() in specs.BOOLEANS:
            return specs.BOOLEANS[word.lower()]
        raise TaskError(f"{where}: expected true or false")
    if annotation not in (int, float):
        raise TaskError(f"{where}: no text stands for such a setting; give the task itself, in Python")
    try:
        number = annotation(word)
    except ValueError:
        number = math.nan
    # NaN compares with nothing.
    if not -_MOST <= number <= _MOST:
        raise TaskError(f"{where}: expected {'a whole number' if annotation is int else 'a number'} up to {_MOST:,}")
    return number
