"""Rows of the files that RULER's own scripts prepare (`validation.jsonl`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from evolkv.schemas import Schema
from evolkv.tasks.base import read_text
from evolkv.tasks.rows import AnyText, Name, Row, Text, Texts, checked_rows, digest, parse_rows


class Prepared(Schema):
    """The question, the beginning of the answer (None: the input may end with it), and what counts as right."""

    input: Text
    answer_prefix: AnyText | None = None
    outputs: Texts
    index: Name | None = None


def read_prepared(path: str, opening: str) -> Iterator[Row[Prepared]]:
    """Yield the rows of a file.

    Args:
        path: the file.
        opening: how the task's answer prefix begins. Rows of RULER's first versions end with the prefix and do
            not have it in a field of its own.

    Raises:
        TaskError: the file cannot be read, or a row is malformed.
    """
    for (number, where), fields in checked_rows(Prepared, parse_rows(read_text(path), path)):
        if fields.answer_prefix is None:
            text, prefix = _cut(fields.input, opening)
            fields = fields.model_copy(update={"input": text, "answer_prefix": prefix})
        content = digest(json.dumps([fields.input, fields.answer_prefix, fields.outputs]))
        name = f"{Path(path).stem}-{fields.index or number}"
        yield Row(name, where, fields, group=fields.input, content=content)


def _cut(text: str, opening: str) -> tuple[str, str]:
    place = text.rfind(opening)
    # A prefix is one line. An opening further up belongs to a demonstration.
    if place < 0 or "\n" in text[place:]:
        return text, ""
    return text[:place], text[place:]
