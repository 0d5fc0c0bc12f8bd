"""The parts of every family of RULER's tasks: puzzles that grow, and values that no two of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from zlib import crc32

from evolkv.tasks.base import SPLITS, Split

T = TypeVar("T")

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""One line of the noise haystack."""


@dataclass(frozen=True)
class Family:
    """The common settings of the tasks that one generator makes.

    Args:
        max_new_tokens: RULER's `tokens_to_generate`.
        prefix: the template of the answer prefix.
        target: references → the text that the `logprob` metric looks for after the answer prefix.
        asks: how the question begins, in one of the templates.
        metric: name of the official metric.
    """

    max_new_tokens: int
    prefix: str
    target: Callable[[Sequence[str]], str]
    asks: tuple[str, ...]
    metric: str = "ruler_all"


@dataclass(frozen=True)
class Puzzle:
    """An example whose haystack can have any size.

    Args:
        text: size → the user's message: longer for larger sizes, and always the same for the same size.
        prefix: the answer prefix, leading space included, which follows the chat template.
        answers: the references.
        least: the smallest size that leaves the puzzle what it is.
    """

    text: Callable[[int], str]
    prefix: str
    answers: tuple[str, ...]
    least: int = 1


def listed(items: Sequence[str]) -> str:
    """`a`, `a, and b`, `a, b, and c`: how RULER's questions list their keys."""
    return ", and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def belongs(value: str, split: Split) -> bool:
    """Return whether a value serves the split: each serves exactly one, a third of them each."""
    return crc32(value.encode()) % len(SPLITS) == SPLITS.index(split)


def fresh(make: Callable[[], str], split: Split, taken: set[str]) -> str:
    """Return the first value of `make` that belongs to the split and is not taken; from then on it is."""
    while True:
        value = make()
        if belongs(value, split) and value not in taken:
            taken.add(value)
            return value


def lazily(make: Callable[[], T]) -> Callable[[int], list[T]]:
    """Return a function from n to the first n values of `make`, which is called once for each."""
    made: list[T] = []

    def first(count: int) -> list[T]:
        made.extend(make() for _ in range(count - len(made)))
        return made[:count]

    return first


def largest(room: Callable[[int], int], least: int, spare: int, guess: int | None, limit: int) -> int:
    """Return the largest size that fits.

    Sizes are tried where a straight line says that room runs out, so a few do when steps take about equal room.

    Args:
        room: size → tokens left over; negative where the size does not fit.
        least: a size that fits.
        spare: `room(least)`.
        guess: a size that may be close, or None.
        limit: a size that does not fit.
    """
    low, left = least, spare
    high, lack = limit, None
    probe = guess if guess is not None else least + 1 + spare // 64
    while high - low > 1:
        probe = min(max(probe, low + 1), high - 1)
        spare_here = room(probe)
        if spare_here >= 0:
            low, left = probe, spare_here
        else:
            high, lack = probe, spare_here
        # Between the two where both are known, else onwards at the rate so far.
        used, steps = (spare - left, low - least) if lack is None else (left - lack, high - low)
        probe = low + (left * steps // used if used > 0 else (high - low) // 2)
    return low
