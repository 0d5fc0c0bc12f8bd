"""RULER's eight needle tasks: what is said about a key somewhere in a long text (section 3.1 of the paper)."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

from evolkv.tasks.base import Split
from evolkv.tasks.ruler.haystack import Passage
from evolkv.tasks.ruler.puzzle import NOISE, Family, Puzzle, fresh, lazily, listed
from evolkv.tasks.ruler.vocabulary import adjective_noun

Kind = Literal["words", "numbers", "uuids"]

TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
SINGULAR_TEMPLATE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
)
SINGULAR_PREFIX = " The special magic {kind} for {query} mentioned in the provided text is"
NEEDLE = "One of the special magic {kind} for {key} is: {value}."

DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""The places of needles in an essay, in percent of its sentences."""

# The answer prefix begins an English sentence, so values are listed as the question lists keys.
FAMILY = Family(
    max_new_tokens=128,
    prefix=PREFIX,
    target=lambda answers: f" {listed(answers)}",
    asks=("What are all the special magic ", "What is the special magic "),
)


@dataclass(frozen=True)
class Needles:
    """Settings of one task, with RULER's values (`scripts/synthetic.yaml`).

    Args:
        haystack: what surrounds the needles: one repeated line, an essay, or other needles.
        keys: how many keys there are needles for.
        values: how many needles each key has.
        queries: how many keys are asked for.
        key: what keys are.
        value: what is said about a key.
    """

    haystack: Literal["noise", "essay", "needle"]
    keys: int = 1
    values: int = 1
    queries: int = 1
    key: Kind = "words"
    value: Kind = "numbers"


TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}


def needle_puzzles(
    needles: Needles, split: Split, seed: int, passage: Callable[[int], Passage] | None = None
) -> Iterator[Puzzle]:
    """Yield puzzles without end, in which no key and no value is asked for twice.

    A puzzle's size is its number of words (essay), lines (noise) or other needles.

    Args:
        needles: which of the tasks.
        split: keys and values of different splits are different.
        seed: chooses the puzzles within the split.
        passage: number of the puzzle → its text, for an essay.
    """
    taken: set[str] = set()
    for index in count():
        name = f"ruler-niah/{seed}/{split}/{index}"
        rng = random.Random(name)
        keys = [_draw(rng, needles.key, split, taken) for _ in range(needles.keys)]
        facts = [(key, _draw(rng, needles.value, split, taken)) for key in keys for _ in range(needles.values)]
        # From here on in the order of the text, in which a model that reads it would name them.
        rng.shuffle(facts)
        sentences = [NEEDLE.format(kind=needles.value, key=key, value=value) for key, value in facts]
        asked = rng.sample(keys, needles.queries)
        answers = tuple(value for key in asked for other, value in facts if other == key)
        if needles.haystack == "essay":
            assert passage is not None
            context = _in_essay(passage(index), sentences, sorted(rng.sample(DEPTHS, len(sentences))))
        elif needles.haystack == "noise":
            context = _among_lines(lambda size: [NOISE] * size, sentences, name)
        else:
            context = _among_lines(_other_needles(needles, split, name, facts), sentences, name)
        yield _puzzle(needles, context, asked, answers)


def _puzzle(needles: Needles, context: Callable[[int], str], asked: Sequence[str], answers: tuple[str, ...]) -> Puzzle:
    single = needles.queries * needles.values == 1
    template, prefix = (SINGULAR_TEMPLATE, SINGULAR_PREFIX) if single else (TEMPLATE, PREFIX)
    kind = needles.value.removesuffix("s") if single else needles.value
    query = listed(asked)
    return Puzzle(
        text=lambda size: template.format(kind=kind, context=context(size), query=query),
        prefix=prefix.format(kind=kind, query=query),
        answers=answers,
        least=needles.keys * needles.values,
    )


def _in_essay(passage: Passage, sentences: Sequence[str], depths: Sequence[int]) -> Callable[[int], str]:
    return lambda size: passage.text(size, sentences, depths)


def _among_lines(lines: Callable[[int], list[str]], sentences: Sequence[str], name: str) -> Callable[[int], str]:
    def context(size: int) -> str:
        every = lines(size)
        places = sorted(random.Random(f"{name}/{size}").sample(range(size), len(sentences)), reverse=True)
        for place, sentence in zip(places, reversed(sentences), strict=True):
            every.insert(place, sentence)
        return "\n".join(every)

    return context


def _other_needles(
    needles: Needles, split: Split, name: str, facts: Sequence[tuple[str, str]]
) -> Callable[[int], list[str]]:
    rng = random.Random(f"{name}/others")
    # Only this puzzle's own facts are taken: those of another puzzle may occur here.
    taken = {text for fact in facts for text in fact}

    def make() -> str:
        key, value = (_draw(rng, kind, split, taken) for kind in (needles.key, needles.value))
        return NEEDLE.format(kind=needles.value, key=key, value=value)

    return lazily(make)


def _draw(rng: random.Random, kind: Kind, split: Split, taken: set[str]) -> str:
    make: dict[Kind, Callable[[], str]] = {
        "words": lambda: adjective_noun(rng),
        "numbers": lambda: str(rng.randint(1_000_000, 9_999_999)),
        "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    }
    return fresh(make[kind], split, taken)
