"""Rows of JSON Lines data: read, checked field by field, and drawn for a split.

Every error about a row begins with `where`: the file and the line.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

from evolkv.errors import TaskError, UsageError
from evolkv.numbers import is_whole
from evolkv.tasks.base import Split, partition
from evolkv.tasks.metrics import get_metric

logger = logging.getLogger(__name__)

_NOT_ASKED = ("logprob", "rouge_l", "rouge_l_zh")

Splitting = Literal["auto", "all"]
"""The way in which rows serve the splits: "auto" shares them out, "all" gives every row to every split."""


class Row(Protocol):
    """A row, checked. Rows of one `group` are never shared out to two splits; `content` tells rows apart."""

    @property
    def group(self) -> str:
        """The thing that must not be in two splits: the prompt, or the document that it is about."""

    @property
    def content(self) -> str:
        """A hash of all that makes the row what it is, its name excepted."""


AnyRow = TypeVar("AnyRow", bound=Row)


def parse_rows(text: str, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and fields of every row; blank lines are passed over.

    Args:
        text: JSON Lines: an object on each line.
        source: the file, for messages.

    Raises:
        TaskError: a line that is not a JSON object, or no rows at all.
    """
    empty = True
    # Not splitlines: it would also cut at line separators that JSON allows within a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        empty = False
        where = f"{source} line {number}"
        try:
            fields = json.loads(line, object_pairs_hook=_unique)
        except _RepeatedKeyError as error:
            raise TaskError(f"{where}: key {error} is given twice; give it once") from None
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{where}: not valid JSON ({error}); expected one JSON object a line") from None
        if not isinstance(fields, dict):
            raise TaskError(f"{where}: expected a JSON object on the line, not {kind_of(fields)}")
        yield number, fields
    if empty:
        raise TaskError(f"{source} has no rows; expected one JSON object on each line")


class _RepeatedKeyError(ValueError):
    """An object has the key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise _RepeatedKeyError(repr(key))
        fields[key] = value
    return fields


def answers_score(metric: str, answers: Sequence[str], where: str, **extra: Any) -> bool:
    """Return whether any of a row's own answers scores above 0 under its metric.

    Summaries are taken to: ROUGE needs minutes for a file of them.

    Raises:
        TaskError: the metric needs what `extra` lacks, or an answer that reads otherwise.
    """
    if metric in _NOT_ASKED:
        return True
    judge = get_metric(metric)
    try:
        return any(judge(answer, answers, **extra) > 0 for answer in answers)
    except UsageError as error:
        raise TaskError(f"{where}: {error}") from None


def distinct(rows: Iterable[AnyRow], source: str) -> list[AnyRow]:
    """Return the rows without those whose content came before; how many were dropped is logged."""
    kept: dict[str, AnyRow] = {}
    total = 0
    for row in rows:
        total += 1
        kept.setdefault(row.content, row)
    if total > len(kept):
        logger.info("%s: dropped %d duplicate rows", source, total - len(kept))
    return list(kept.values())


def of_split(rows: Sequence[AnyRow], split: Split, splitting: Splitting) -> list[AnyRow]:
    """Return the rows that serve a split, in their order; see `draw` for which."""
    groups = sorted({row.group for row in rows}, key=digest)
    own = set(groups[partition(len(groups))[split]] if splitting == "auto" else groups)
    return [row for row in rows if row.group in own]


def check_split(own: Sequence[AnyRow], rows: Sequence[AnyRow], split: Split, source: str, groups: str) -> None:
    """Raise TaskError if no rows of all are a split's own; `source` and `groups` are as for `draw`."""
    if not own:
        raise TaskError(
            f"{source}: split {split!r} is empty: the file has {len({row.group for row in rows})} different {groups}; "
            "give at least 4, or use split=all"
        )


def draw(
    rows: Iterable[AnyRow], split: Split, n: int, *, splitting: Splitting, seed: str, source: str, groups: str
) -> list[AnyRow]:
    """Return n rows of a split in the seed's order; all of them, with a warning, if there are fewer.

    With "auto" a quarter of the groups serves train, a quarter validation and half report. Which ones depends on
    the rows alone, neither on their order nor on seed or n. With "all" validation draws in the reverse order.

    Args:
        rows: the rows; of those with the same content the first counts.
        split: the split to draw for.
        n: how many.
        splitting: see `Splitting`.
        seed: orders the rows.
        source: the file, for messages.
        groups: what the groups are ("prompts", …), for messages.

    Raises:
        TaskError: the split has no rows.
    """
    rows = distinct(rows, source)
    drawn = sorted(of_split(rows, split, splitting), key=lambda row: row.content)
    check_split(drawn, rows, split, source, groups)
    random.Random(seed).shuffle(drawn)
    if splitting == "all" and split == "validation":
        # From the other end, so that a search trains and chooses on different rows as long as there are enough.
        drawn.reverse()
    if len(drawn) < n:
        logger.warning("%s: split %r has %d rows; using all of them, not %d", source, split, len(drawn), n)
    return drawn[:n]


def digest(text: str) -> str:
    """Return a hash of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def kind_of(value: object) -> str:
    """Return what a JSON value is, in words: "a text", "a list", …"""
    if value is None:
        return "null"
    names: dict[type, str] = {str: "a text", bool: "a truth value", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def get_text(fields: Mapping[str, Any], key: str, where: str, blank: bool = False) -> str:
    """Return the text in a field; TaskError if it is missing, no text, or only whitespace without `blank`."""
    if key not in fields:
        raise TaskError(f"{where}: field {key!r} is missing; expected a text")
    return check_text(fields[key], repr(key), where, blank)


def get_texts(fields: Mapping[str, Any], key: str, where: str, blank: bool = False) -> tuple[str, ...]:
    """Return the texts in a field, at least one; TaskError as for `get_text`."""
    if key not in fields:
        raise TaskError(f"{where}: field {key!r} is missing; expected a list of texts")
    values = fields[key]
    if not isinstance(values, list) or not values:
        kind = "empty" if values == [] else kind_of(values)
        raise TaskError(f"{where}: {key!r} is {kind}; expected a list of texts")
    return tuple(check_text(value, f"an entry of {key!r}", where, blank) for value in values)


def get_count(fields: Mapping[str, Any], key: str, where: str) -> int:
    """Return the whole number in a field, at least 1; TaskError if it is missing or anything else."""
    if key not in fields:
        raise TaskError(f"{where}: field {key!r} is missing; expected a whole number, at least 1")
    value = fields[key]
    if not is_whole(value) or value < 1:
        raise TaskError(f"{where}: {key!r} is {json.dumps(value)}; expected a whole number, at least 1")
    return value


def get_name(fields: Mapping[str, Any], key: str, where: str, default: str) -> str:
    """Return what a field calls the row, a text or a whole number; `default` if it is missing or null."""
    value = fields.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TaskError(f"{where}: {key!r} is {kind_of(value)}; expected a text or a whole number")
    if not str(value).strip():
        raise TaskError(f"{where}: {key!r} is blank; give it a name, or leave it out")
    return check_text(str(value), repr(key), where, blank=False)


def check_text(value: object, name: str, where: str, blank: bool) -> str:
    """Return the value, if it is a text of valid Unicode, and has more than whitespace unless it may not (`blank`).

    Raises:
        TaskError: it is not; `name` and `where` say what and where it is.
    """
    if not isinstance(value, str):
        raise TaskError(f"{where}: {name} is {kind_of(value)}; expected a text")
    if not blank and not value.strip():
        raise TaskError(f"{where}: {name} is empty; expected a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TaskError(f"{where}: {name} holds half of a surrogate pair; expected valid Unicode") from None
    return value
