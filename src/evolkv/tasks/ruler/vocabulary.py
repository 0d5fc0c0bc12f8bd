"""English words, from the same lists as RULER's: those of the package wonderwords."""

from __future__ import annotations

import random
from functools import cache


def adjective_noun(rng: random.Random) -> str:
    """Return a pair such as `rusty-lantern`; there are six million."""
    return f"{rng.choice(_listed('adjective'))}-{rng.choice(_listed('noun'))}"


def words() -> tuple[str, ...]:
    """Return every noun, adjective and verb once, sorted: about 8,000."""
    return _listed("noun", "adjective", "verb")


@cache
def _listed(*categories: str) -> tuple[str, ...]:
    # Imported on first use: the package reads all its lists when it is imported.
    from wonderwords import Defaults, RandomWord

    lists = {"noun": Defaults.NOUNS, "adjective": Defaults.ADJECTIVES, "verb": Defaults.VERBS}
    source = RandomWord(enhanced_prefixes=False, **{name: lists[name] for name in categories})
    return tuple(source.filter())
