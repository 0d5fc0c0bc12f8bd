"""Tables as GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable

from evolkv.report.axes import Table
from evolkv.report.tables import NUMERIC

#: What would be markup, or end a cell.
_MARKUP = re.compile(r"([\\|`*_<>\[\]])")
_INTRAWORD = re.compile(r"(?<=\w)\\_(?=\w)")


def markdown(table: Table) -> str:
    """A table in Markdown, its caption above it; text from outside stays text."""
    rules = ["---:" if column in NUMERIC else "---" for column in table.columns]
    lines = [_line(map(_plain, table.columns)), _line(rules), *(_line(map(_plain, row)) for row in table.rows)]
    return f"{_plain(table.caption)}\n\n" + "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    escaped = _MARKUP.sub(r"\\\1", " ".join(text.split()))
    # Between letters an underscore is no markup, and names are easier to read without.
    return _INTRAWORD.sub("_", escaped)
