"""Score a completed line of code by its similarity to a reference."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def code_sim(prediction: str, references: Sequence[str], **extra: object) -> float:
    """Similarity of the prediction's first line of code to a reference, in steps of 0.01; best over the references.

    The first line of code is the first without "`", "#" and "//", line breaks before the text aside; after them
    an empty line counts too. The similarity is twice the matching characters over all characters, with matching
    blocks as `difflib.SequenceMatcher` finds them, rounded to whole percent.

    Source: `code_sim_score` of LongBench (arXiv 2308.14508, table 1), which calls fuzzywuzzy's `ratio`. With
    LongBench's requirements.txt installed that is difflib; only where python-Levenshtein is installed as well,
    which the file does not ask for, fuzzywuzzy takes that library's ratio, and other values.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return max((_similarity(code, reference) for reference in references), default=0.0)


def _similarity(line: str, reference: str) -> float:
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100
