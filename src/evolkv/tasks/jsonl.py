"""Examples from a JSON Lines file."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from evolkv.errors import TaskError, UsageError
from evolkv.tasks.base import Example, Split, Task, check_request, partition, read_text, user_message
from evolkv.tasks.metrics import check_metric

logger = logging.getLogger(__name__)

Splitting = Literal["auto", "all"]


@dataclass(frozen=True)
class JsonLines(Task):
    """Prompts and answers from a JSON Lines file.

    A row is an object with `prompt` (text) and `answers` (a list of texts) or `answer` (one text), and
    optionally `metric`, `max_new_tokens`, `all_classes` (a list of texts) and `id`. Other fields are ignored,
    blank lines too. Rows that differ in nothing but `id` count as one.

    Args:
        path: the file, UTF-8.
        metric: judges all rows, whatever they say. Default None: each row's own `metric`, else "contains".
        max_new_tokens: most tokens to generate, whatever the rows say. Default None: each row's own, else 32.
        split: "auto" (default) gives a quarter of the prompts to train, a quarter to validation and half to
            report. Which ones depends on the rows alone, not on seed or n, so searches and
            evaluations of one file never share a prompt across splits. "all" uses every row for any
            split: for different files in search and evaluation.
        chat: whether to put the prompt in the model's chat template as a user message. Default False.

    Raises:
        TaskError: a setting out of its range.
        UsageError: an unknown metric.
    """

    name: ClassVar[str] = "jsonl"

    path: str
    metric: str | None = None
    max_new_tokens: int | None = None
    split: Splitting = "auto"
    chat: bool = False

    def __post_init__(self) -> None:
        if self.metric is not None:
            check_metric(self.metric)
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise TaskError(f"jsonl: max_new_tokens={self.max_new_tokens} is out of range; expected at least 1")
        if self.split not in get_args(Splitting):
            raise TaskError(f"jsonl: split={self.split!r} is unknown; expected one of auto, all")

    def examples(self, split: Split, n: int, tokenizer: Any, seed: int = 0) -> list[Example]:
        """Draw n rows of the split in the seed's order; all of them, with a warning, if there are fewer.

        Raises:
            TaskError: the file cannot be read, a row is malformed (the message names file and line), the
                split has no rows, or chat=true and the tokenizer has no chat template.
        """
        check_request(split, n)
        if self.chat and not getattr(tokenizer, "chat_template", None):
            raise TaskError("jsonl: chat=true, but this tokenizer has no chat template; use chat=false")
        rows = self._rows()
        # Rows with the same prompt go together, so that no prompt is in two splits.
        prompts = sorted({row.prompt for row in rows}, key=_hash)
        share = partition(len(prompts))[split] if self.split == "auto" else slice(None)
        chosen = set(prompts[share])
        rows = sorted((row for row in rows if row.prompt in chosen), key=lambda row: row.content)
        if not rows:
            raise TaskError(
                f"{self.path}: split {split!r} is empty: the file has {len(prompts)} different prompts; "
                "give at least 4, or use split=all"
            )
        random.Random(f"jsonl/{seed}").shuffle(rows)
        if len(rows) < n:
            logger.warning("%s: split %r has %d rows; using all of them, not %d", self.path, split, len(rows), n)
        return [self._example(row, tokenizer) for row in rows[:n]]

    def _rows(self) -> list[_Row]:
        rows: dict[str, _Row] = {}
        duplicates = 0
        # Not splitlines: it would also cut at line separators that JSON allows within a string.
        for number, line in enumerate(read_text(self.path).split("\n"), start=1):
            if line.strip():
                row = self._parse(line, number)
                duplicates += row.content in rows
                rows.setdefault(row.content, row)
        if not rows:
            raise TaskError(f"{self.path} has no rows; expected one JSON object on each line")
        if duplicates:
            logger.info("%s: dropped %d duplicate rows", self.path, duplicates)
        return list(rows.values())

    def _parse(self, line: str, number: int) -> _Row:
        where = f"{self.path} line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{where}: not valid JSON ({error}); expected one JSON object a line") from None
        if not isinstance(fields, dict):
            raise TaskError(f"{where}: expected a JSON object with 'prompt' and 'answers', not {_kind(fields)}")
        prompt = _text(fields, "prompt", where)
        answers = _answers(fields, where)
        all_classes = _texts(fields, "all_classes", where) if fields.get("all_classes") is not None else None
        own = [fields.get("metric"), fields.get("max_new_tokens")]
        return _Row(
            id=_row_id(fields, where, number, Path(self.path).stem),
            prompt=prompt,
            answers=answers,
            metric=self.metric or _metric(fields, where),
            max_new_tokens=self.max_new_tokens or _positive(fields, "max_new_tokens", where, default=32),
            all_classes=all_classes,
            # Of the row as it is in the file, so that overriding its settings draws the same rows.
            content=_hash(json.dumps([prompt, answers, all_classes, own])),
        )

    def _example(self, row: _Row, tokenizer: Any) -> Example:
        return Example(
            id=row.id,
            prompt=user_message(tokenizer, row.prompt) if self.chat else row.prompt,
            references=row.answers,
            max_new_tokens=row.max_new_tokens,
            metric=row.metric,
            extra={} if row.all_classes is None else {"all_classes": row.all_classes},
        )


@dataclass(frozen=True)
class _Row:
    """A row of the file, checked; `content` is a hash of all but its id."""

    id: str
    prompt: str
    answers: tuple[str, ...]
    metric: str
    max_new_tokens: int
    all_classes: tuple[str, ...] | None
    content: str


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {str: "a text", bool: "a truth value", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def _check_text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise TaskError(f"{where}: {name} is {_kind(value)}; expected a text")
    if not value.strip():
        raise TaskError(f"{where}: {name} is empty; expected a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TaskError(f"{where}: {name} holds half of a surrogate pair; expected valid Unicode") from None
    return value


def _text(fields: Mapping[str, Any], key: str, where: str) -> str:
    if key not in fields:
        raise TaskError(f"{where}: field {key!r} is missing; expected a text")
    return _check_text(fields[key], repr(key), where)


def _texts(fields: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = fields[key]
    if not isinstance(values, list) or not values:
        found = "empty" if values == [] else _kind(values)
        raise TaskError(f"{where}: {key!r} is {found}; expected a list of texts")
    return tuple(_check_text(value, f"an entry of {key!r}", where) for value in values)


def _answers(fields: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if "answers" in fields:
        return _texts(fields, "answers", where)
    if "answer" in fields:
        return (_text(fields, "answer", where),)
    raise TaskError(f"{where}: field 'answers' is missing; expected a list of texts, or one text as 'answer'")


def _metric(fields: Mapping[str, Any], where: str) -> str:
    metric = fields.get("metric")
    if metric is None:
        return "contains"
    try:
        check_metric(metric)
    except UsageError as error:
        raise TaskError(f"{where}: {error}") from None
    return metric


def _positive(fields: Mapping[str, Any], key: str, where: str, default: int) -> int:
    value = fields.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TaskError(f"{where}: {key!r} is {json.dumps(value)}; expected a whole number, at least 1")
    return value


def _row_id(fields: Mapping[str, Any], where: str, number: int, stem: str) -> str:
    value = fields.get("id")
    if value is None:
        return f"{stem}-{number}"
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TaskError(f"{where}: 'id' is {_kind(value)}; expected a text or a whole number")
    return str(value)
