"""Rows of the files that RULER's own scripts prepare (`validation.jsonl`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evolkv.tasks.base import read_text
from evolkv.tasks.rows import digest, get_name, get_text, get_texts, parse_rows


@dataclass(frozen=True)
class PreparedRow:
    """A row: what to ask, what the answer begins with and what counts as right; `where` it is, for messages."""

    id: str
    where: str
    input: str
    prefix: str
    outputs: tuple[str, ...]

    @property
    def group(self) -> str:
        """The input."""
        return self.input

    @property
    def content(self) -> str:
        """A hash of all but id and place."""
        return digest(json.dumps([self.input, self.prefix, self.outputs]))


def read_prepared(path: str, opening: str) -> Iterator[PreparedRow]:
    """Yield the rows of a file.

    Args:
        path: the file.
        opening: how the task's answer prefix begins. Rows of RULER's first versions end with the prefix and do
            not have it in a field of its own.

    Raises:
        TaskError: the file cannot be read, or a row is malformed.
    """
    for number, fields in parse_rows(read_text(path), path):
        where = f"{path} line {number}"
        text = get_text(fields, "input", where)
        if fields.get("answer_prefix") is not None:
            prefix = get_text(fields, "answer_prefix", where, blank=True)
        else:
            text, prefix = _cut(text, opening)
        name = get_name(fields, "index", where, default=str(number))
        yield PreparedRow(f"{Path(path).stem}-{name}", where, text, prefix, get_texts(fields, "outputs", where))


def _cut(text: str, opening: str) -> tuple[str, str]:
    place = text.rfind(opening)
    # A prefix is one line. One further up is a demonstration's.
    if place < 0 or "\n" in text[place:]:
        return text, ""
    return text[:place], text[place:]
