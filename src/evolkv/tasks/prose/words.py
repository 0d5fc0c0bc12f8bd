"""Reading the word lists of the grammars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """A noun with its gender, "m", "f" or "n"."""

    text: str
    gender: str


def phrases(block: str) -> tuple[str, ...]:
    """Return the phrases of a block of text, which `|` and line ends separate."""
    return tuple(phrase.strip() for line in block.strip().splitlines() for phrase in line.split("|"))


def nouns(block: str, genders: Mapping[str, str]) -> tuple[Noun, ...]:
    """Return the nouns of a block whose phrases begin with an article; `genders` says what gender an article shows."""
    parts = (phrase.partition(" ") for phrase in phrases(block))
    return tuple(Noun(text, genders[article]) for article, _, text in parts)


def capitalised(text: str) -> str:
    """`text` with its first letter in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]
