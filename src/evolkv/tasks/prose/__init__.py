"""Plain prose, made up from a grammar of each language: a haystack that needs no file and never runs out.

Simple past-tense sentences about people, things and places. Small models read such text without trouble,
so what a compressed cache loses on it is the cache's doing. It contains no digits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from evolkv.registry import Registry
from evolkv.tasks.prose import chinese, english, french, german, spanish

SENTENCES: Registry[Callable[[random.Random], str]] = Registry(
    "language",
    {
        "en": english.sentence,
        "de": german.sentence,
        "fr": french.sentence,
        "es": spanish.sentence,
        "zh": chinese.sentence,
    },
)
"""Language → a function that makes up one sentence, its full stop included."""


def sentences(seed: int | str, language: str = "en") -> Iterator[str]:
    """Yield an endless stream of sentences, each with its full stop; the same for the same seed.

    Raises:
        UsageError: no such language.
    """
    sentence, rng = SENTENCES[language], random.Random(f"prose/{seed}")
    while True:
        yield sentence(rng)


def prose(seed: int | str, characters: int, language: str = "en") -> str:
    """Return the sentences of `sentences(seed, language)`, joined, until there are at least `characters` characters.

    Raises:
        UsageError: no such language.
    """
    space = gap(language)
    parts, length = [], 0
    for sentence in sentences(seed, language):
        parts.append(sentence)
        length += len(sentence) + len(space)
        if length > characters:
            break
    return space.join(parts)


def gap(language: str) -> str:
    """Return what stands between two sentences of a language: a space, in Chinese nothing."""
    return "" if language == "zh" else " "
