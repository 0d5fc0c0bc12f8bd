"""Reading the word lists of the grammars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """A noun with its gender, "m", "f" or "n"."""

    text: str
    gender: str


@dataclass(frozen=True)
class Adjective:
    """An adjective's forms: masculine, feminine, masculine before a vowel; and whether it precedes its noun."""

    masculine: str
    feminine: str
    elided: str
    before: bool


def phrases(block: str) -> tuple[str, ...]:
    """Return the phrases of a block of text, which `|` and line ends separate."""
    return tuple(phrase.strip() for line in block.strip().splitlines() for phrase in line.split("|"))


def nouns(block: str, genders: Mapping[str, str]) -> tuple[Noun, ...]:
    """Return the nouns of a block whose phrases begin with an article; `genders` says what gender an article shows."""
    parts = (phrase.partition(" ") for phrase in phrases(block))
    return tuple(Noun(text, genders[article]) for article, _, text in parts)


def adjectives(after: str, before: str, feminine: Callable[[str], str]) -> tuple[Adjective, ...]:
    """Return the adjectives of a block of those that follow their noun, and of one of those that precede it.

    Args:
        after, before: the blocks; forms that do not go by rule stand behind the masculine, with slashes between.
        feminine: makes the feminine of a masculine by the rule.
    """
    found = []
    for block, precedes in ((after, False), (before, True)):
        for entry in phrases(block):
            masculine, *others = entry.split("/")
            elided = others[1] if len(others) > 1 else masculine
            found.append(Adjective(masculine, others[0] if others else feminine(masculine), elided, precedes))
    return tuple(found)


def capitalised(text: str) -> str:
    """`text` with its first letter in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]
