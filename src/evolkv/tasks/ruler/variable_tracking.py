"""RULER's `vt`: variables that get their value from one another, in noise (section 3.2 of the paper)."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from itertools import count

from evolkv.tasks.base import Split
from evolkv.tasks.ruler.puzzle import NOISE, Family, Puzzle, fresh, largest

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned "
    "the value {query}, they are: "
)
HOPS = 4
DEMONSTRATION_TOKENS = 500
DEMONSTRATION_SHARE = 4
"""A demonstration has RULER's 500 tokens, or this part of the context where that is less."""

# As in the demonstration, where a space follows the one that the prefix ends with.
FAMILY = Family(
    max_new_tokens=30,
    prefix=PREFIX,
    target=lambda answers: f" {' '.join(answers)}",
    asks=("Question: Find all variables that are assigned the value ",),
)


def chain_puzzles(split: Split, seed: int, context: int, tokens: Callable[[str], int]) -> Iterator[Puzzle]:
    """Yield puzzles without end, in which no variable is asked for twice.

    Each has one chain of 4 hops, after a solved puzzle of the same make with shorter names. Size: lines of noise.

    Args:
        split: variables of different splits are different.
        seed: chooses the puzzles within the split.
        context: length of a prompt in tokens.
        tokens: a text's length in tokens.
    """
    taken: set[str] = set()
    lines: int | None = None
    for index in count():
        name = f"ruler-vt/{seed}/{split}/{index}"
        rng = random.Random(name)
        shown = _variables(rng, split, 3, set())
        shown_value = _value(rng)
        if lines is None:
            lines = _demonstration_lines(shown, shown_value, context, tokens)
        solved = _text(shown, shown_value, lines, f"{name}/shown") + _prefix(shown_value)
        variables, value = _variables(rng, split, 5, taken), _value(rng)
        yield _puzzle(f"{solved} {' '.join(shown)}\n\n", variables, value, name)


def _puzzle(before: str, variables: list[str], value: str, name: str) -> Puzzle:
    return Puzzle(
        text=lambda size: before + _text(variables, value, size, name),
        prefix=_prefix(value),
        answers=tuple(variables),
        least=len(variables),
    )


def _text(variables: list[str], value: str, size: int, name: str) -> str:
    lines = [NOISE] * size
    places = sorted(random.Random(f"{name}/{size}").sample(range(size), len(variables)))
    for before, place in enumerate(places):
        # The official generator leaves the space at the end of these lines.
        source = f"VAR {variables[before - 1]} " if before else value
        lines.insert(place + before, f"VAR {variables[before]} = {source}")
    return TEMPLATE.format(context="\n".join(lines), query=value)


def _prefix(value: str) -> str:
    return PREFIX.format(num_v=HOPS + 1, query=value)


def _demonstration_lines(variables: list[str], value: str, context: int, tokens: Callable[[str], int]) -> int:
    most = min(DEMONSTRATION_TOKENS, context // DEMONSTRATION_SHARE)

    def room(size: int) -> int:
        return most - tokens(_text(variables, value, size, "shown") + _prefix(value))

    least = len(variables)
    spare = room(least)
    return largest(room, least, spare, None, DEMONSTRATION_TOKENS) if spare >= 0 else least


def _variables(rng: random.Random, split: Split, letters: int, taken: set[str]) -> list[str]:
    def make() -> str:
        return "".join(rng.choices(string.ascii_uppercase, k=letters))

    return [fresh(make, split, taken) for _ in range(HOPS + 1)]


def _value(rng: random.Random) -> str:
    return str(rng.randint(10_000, 99_998))
