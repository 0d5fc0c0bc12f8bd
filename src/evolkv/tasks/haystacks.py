"""The text that needles are hidden in: generated prose, or a file of the user's own."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from evolkv.errors import TaskError
from evolkv.tasks.base import read_text


def read_haystack(path: str, needle: str) -> str:
    """Return the text of a haystack.

    Args:
        path: the file, UTF-8.
        needle: the sentence that a task hides, with fields in braces.

    Raises:
        TaskError: the file cannot be read, or has such a sentence already: then a question has more than one answer.
    """
    text = read_text(path)
    phrase = max(re.split(r"\{\w+\}", needle), key=len).strip()
    place = text.find(phrase)
    if place >= 0:
        line = text.count("\n", 0, place) + 1
        raise TaskError(
            f"haystack {path} line {line} has {phrase!r}, as the needles do, so a question would have more than one "
            "answer; take that sentence out"
        )
    return text


def describe_haystack(path: str | None) -> str:
    """Return what a haystack is, for the record: generated prose, or the name and hash of a file."""
    if path is None:
        return "generated prose"
    return f"{Path(path).name}, sha256 {hashlib.sha256(read_text(path).encode()).hexdigest()[:16]}"
