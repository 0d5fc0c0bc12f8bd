"""The two protocols: the question is known when a prompt is compressed, or comes later. Examples are drawn for one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

from evolkv.errors import EvolKVError, RunError, TaskError
from evolkv.registry import unknown_name
from evolkv.tasks.base import Example, Split, Task

AWARE, AGNOSTIC = "aware", "agnostic"
PROTOCOLS = (AWARE, AGNOSTIC)
"""``aware``: the question is part of the prompt that is compressed, as in the EvolKV paper. ``agnostic``: the context
is compressed before any question is seen, then the question is read, as kvpress evaluates."""


def draw_examples(task: Task, split: Split, n: int, tokenizer: Any, seed: int, protocol: str) -> list[Example]:
    """Draw at most n examples of a task, at least one, as a protocol asks them; see `Task.examples`.

    Raises:
        UsageError: as `under_protocol`.
        TaskError: the task cannot be used, has no such examples, or gives something else.
        RunError: the task's own code fails.
    """
    try:
        examples = list(islice(task.examples(split, n, tokenizer, seed), n))
    except EvolKVError:
        raise
    except Exception as error:  # a task may be another package's
        raise RunError(f"task {task.name!r} cannot draw its examples: {type(error).__name__}: {error}") from error
    if not examples:
        raise TaskError(f"task {task.name!r} has no {split} examples; give it more data, or take another task")
    for each in examples:
        if not isinstance(each, Example):
            raise TaskError(f"task {task.name!r} gives a {type(each).__name__} among its examples; expected Example")
    return under_protocol(protocol, examples)


def under_protocol(protocol: str, examples: Iterable[Example]) -> list[Example]:
    """Return examples as a protocol asks them; ``aware`` leaves them as they are.

    Under ``agnostic`` the prompt ends where the question begins, and the rest, what a chat template puts behind the
    question included, is read later.

    Raises:
        UsageError: an unknown protocol.
        TaskError: an example in which the question does not stand apart from the context.
    """
    if protocol not in PROTOCOLS:
        raise unknown_name("protocol", protocol, PROTOCOLS)
    return list(examples) if protocol == AWARE else [_asked_later(example) for example in examples]


def _asked_later(example: Example) -> Example:
    at = example.question_at
    if at is None or not 0 < at < len(example.prompt):
        raise TaskError(
            f"example {example.id}: its question does not stand apart from a context before it, so the context cannot "
            "be compressed without it; use --protocol aware"
        )
    return replace(example, prompt=example.prompt[:at], later=example.prompt[at:], question_at=None)
