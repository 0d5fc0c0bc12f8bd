"""The essay haystack: prose or the user's own text, cut after any word, with sentences put in at given depths."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice

from evolkv.errors import TaskError
from evolkv.tasks.base import Split, partition
from evolkv.tasks.haystacks import read_haystack
from evolkv.tasks.prose import prose

EXAMPLES_PER_PASSAGE = 16
"""Consecutive examples that share their haystack."""

# Writing without spaces is cut up as well, or its only "word" would never fit.
_PIECE = re.compile(r"(\s*)(\S{1,32})")
_SENTENCE_END = re.compile(r"""[.!?。！？]["'”’)\]」』）]*\Z""")


@dataclass(frozen=True)
class Passage:
    """A stretch of text.

    Args:
        pieces: its words, each with the space before it.
        ends: after how many pieces a sentence ends, ascending.
    """

    pieces: Sequence[str]
    ends: Sequence[int]

    @classmethod
    def of(cls, pieces: Sequence[str]) -> Passage:
        return cls(pieces, [i for i, piece in enumerate(pieces, start=1) if _SENTENCE_END.search(piece)])

    def text(self, size: int, sentences: Sequence[str], depths: Sequence[int]) -> str:
        """Return the first `size` pieces, with `sentences` put in at `depths`.

        Args:
            size: number of pieces.
            sentences: what to put in, in the order in which it stands in the text.
            depths: ascending, as many as sentences: from 0 (before the first sentence) to 100 (after the last).
        """
        whole = bisect_right(self.ends, size)
        ends = [0, *self.ends[:whole]]
        if ends[-1] < size:
            ends.append(size)
        parts, done = [], 0
        for sentence, depth in zip(sentences, depths, strict=True):
            place = ends[(len(ends) - 1) * depth // 100]
            parts += ["".join(self.pieces[done:place]).strip(), sentence]
            done = place
        parts.append("".join(self.pieces[done:size]).strip())
        return " ".join(filter(None, parts))


def passages(path: str | None, needle: str, context: int, split: Split, seed: int) -> Callable[[int], Passage]:
    """Return a function from the number of an example to its passage, of `context` words.

    Args:
        path: a UTF-8 text file. The first quarter of its words serves train, the second validation, the second
            half report. A passage starts at any sentence of that part, and goes round it where it is too short.
            None: generated prose.
        needle: the sentence that the task hides; the file may not have it.
        context: length of a prompt in tokens.
        split: which passages.
        seed: chooses the passages within the split.

    Raises:
        TaskError: the file cannot be read, or has fewer than four words.
    """
    share = None if path is None else _share(path, needle, split)

    @lru_cache(maxsize=1)
    def passage(number: int) -> Passage:
        name = f"ruler/{seed}/{split}/{number}"
        if share is None:
            # About as many words as tokens are asked for, and a word takes at least one; the rest goes round.
            pieces = _pieces(prose(name, 6 * context))
        else:
            start = random.Random(name).choice([0, *Passage.of(share).ends[:-1]])
            pieces = share[start:] + share[:start]
        return Passage.of(list(islice(cycle(pieces), context)))

    return lambda index: passage(index // EXAMPLES_PER_PASSAGE)


def _share(path: str, needle: str, split: Split) -> list[str]:
    pieces = _pieces(read_haystack(path, needle))
    share = pieces[partition(len(pieces))[split]]
    if not share:
        raise TaskError(f"ruler: essays {path} has {len(pieces)} word(s); give a longer text")
    return share


def _pieces(text: str) -> list[str]:
    return [(" " if space else "") + word for space, word in _PIECE.findall(f" {text}")]
