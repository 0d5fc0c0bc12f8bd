"""The two protocols: the question is known when a prompt is compressed, or comes later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from evolkv.errors import TaskError
from evolkv.registry import unknown_name
from evolkv.tasks.base import Example

AWARE, AGNOSTIC = "aware", "agnostic"
PROTOCOLS = (AWARE, AGNOSTIC)
"""``aware``: the question is part of the prompt that is compressed, as in the EvolKV paper. ``agnostic``: the context
is compressed before any question is seen, then the question is read, as kvpress evaluates."""


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
