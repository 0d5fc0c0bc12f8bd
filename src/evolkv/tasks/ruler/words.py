"""RULER's `cwe` and `fwe`: the words that occur most often (section 3.3 of the paper)."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count

from evolkv.tasks.base import Split
from evolkv.tasks.ruler.puzzle import Family, Puzzle, belongs, fresh, lazily, listed
from evolkv.tasks.ruler.vocabulary import adjective_noun, words

COMMON_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON_WORDS = 10

CODED_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
CODED_WORD_LETTERS = 6
CODED_NOISE = "..."

ALPHA = 2
ZETA = math.pi**2 / 6
LEAST_DRAWN = math.ceil(ZETA / (4**-ALPHA - 5**-ALPHA))
"""From here on the fourth rank, the last that is asked for, surely occurs more often than the fifth."""


def _numbered(items: Sequence[str]) -> str:
    return " ".join(f"{number}. {item}" for number, item in enumerate(items, start=1))


# As in the demonstration.
COMMON = Family(
    max_new_tokens=120,
    prefix=COMMON_PREFIX,
    target=lambda answers: f" {_numbered(answers)}",
    asks=("Question: What are the 10 most common words",),
)
# Nothing in the prompt shows how to list them, so as in the questions of the needle tasks.
CODED = Family(
    max_new_tokens=50,
    prefix=CODED_PREFIX,
    target=lambda answers: f" {listed(answers)}",
    asks=("Question: Do not provide any explanation.",),
)


def common_word_puzzles(split: Split, seed: int, context: int) -> Iterator[Puzzle]:
    """Yield puzzles without end: the ten words that occur most often in a numbered list, after a solved one.

    A third of all words, about 2,700, is asked for in each split. No word is asked for again before all have been.
    Size: uncommon words.

    Args:
        split: common words of different splits are different.
        seed: chooses the puzzles within the split.
        context: length of a prompt in tokens. From 4096 on common words occur 30 times and others 3 times, below
            6 times and once, as in RULER.
    """
    often, seldom, shown_words, shown_often, shown_seldom = (30, 3, 40, 10, 3) if context >= 4096 else (6, 1, 20, 3, 1)
    for index, common in enumerate(_common_words(split, seed)):
        name = f"ruler-cwe/{seed}/{split}/{index}"
        rng = random.Random(name)
        others = rng.sample(words(), len(words()))
        others = [word for word in others if word not in common]
        shown, rest = others[:shown_words], others[shown_words:]
        solved, rest_of_shown = shown[:COMMON_WORDS], shown[COMMON_WORDS:]
        listing = _listing(solved * shown_often + rest_of_shown * shown_seldom, f"{name}/shown")
        before = f"{listing}{COMMON_PREFIX} {_numbered(solved)}\n"
        yield _common_puzzle(before, common, often, _endless(rest, rng), seldom, name)


def _common_puzzle(
    before: str, common: list[str], often: int, uncommon: Callable[[int], list[str]], seldom: int, name: str
) -> Puzzle:
    return Puzzle(
        text=lambda size: before + _listing(common * often + uncommon(size) * seldom, f"{name}/{size}"),
        prefix=COMMON_PREFIX,
        answers=tuple(common),
    )


def _listing(items: list[str], name: str) -> str:
    random.Random(name).shuffle(items)
    return COMMON_TEMPLATE.format(context=_numbered(items))


def _common_words(split: Split, seed: int) -> Iterator[list[str]]:
    own = [word for word in words() if belongs(word, split)]
    for turn in count():
        order = random.Random(f"ruler-cwe/{seed}/{split}/{turn}").sample(own, len(own))
        for start in range(0, len(order) - COMMON_WORDS + 1, COMMON_WORDS):
            yield order[start : start + COMMON_WORDS]


def _endless(some: list[str], rng: random.Random) -> Callable[[int], list[str]]:
    # All words are used up at about 170,000 tokens. Pairs of words do not run out.
    source = chain(some, (adjective_noun(rng) for _ in count()))
    return lazily(lambda: next(source))


def coded_word_puzzles(split: Split, seed: int, context: int) -> Iterator[Puzzle]:
    """Yield puzzles without end: the three commonest of made-up words whose counts follow a zeta distribution.

    The commonest of all is dots, to be ignored. No word is asked for twice. Size: words drawn from the
    distribution, a little more than are in the text, since counts are rounded down.

    Args:
        split: words of different splits are different.
        seed: chooses the puzzles within the split.
        context: length of a prompt in tokens.
    """
    # RULER's size of the vocabulary. The least text, whatever the context, has words of seven ranks.
    vocabulary = max(7, (context - CODED.max_new_tokens) // 50)
    taken: set[str] = set()
    for index in count():
        name = f"ruler-fwe/{seed}/{split}/{index}"
        rng = random.Random(name)
        asked = [_coded_word(rng, split, taken) for _ in range(3)]
        yield _coded_puzzle(asked, vocabulary, split, name)


def _coded_puzzle(asked: list[str], vocabulary: int, split: Split, name: str) -> Puzzle:
    rng, taken = random.Random(f"{name}/others"), set(asked)
    others = lazily(lambda: _coded_word(rng, split, taken))

    def text(size: int) -> str:
        counts = [int(size / (rank**ALPHA * ZETA)) for rank in range(1, vocabulary + 1)]
        counts = [times for times in counts if times]
        ranked = [CODED_NOISE, *asked, *others(len(counts) - 4)]
        drawn = [word for word, times in zip(ranked, counts, strict=True) for _ in range(times)]
        random.Random(f"{name}/{size}").shuffle(drawn)
        return CODED_TEMPLATE.format(context=" ".join(drawn))

    return Puzzle(text=text, prefix=CODED_PREFIX, answers=tuple(asked), least=LEAST_DRAWN)


def _coded_word(rng: random.Random, split: Split, taken: set[str]) -> str:
    return fresh(lambda: "".join(rng.choices(string.ascii_lowercase, k=CODED_WORD_LETTERS)), split, taken)
