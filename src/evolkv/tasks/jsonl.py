"""Examples from a JSON Lines file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator

from evolkv.errors import UsageError
from evolkv.schemas import Schema
from evolkv.tasks.base import Example, read_text
from evolkv.tasks.metrics import check_metric
from evolkv.tasks.rows import (
    AnyText,
    Count,
    Name,
    PromptRows,
    Row,
    Splitting,
    Text,
    Texts,
    check_answers,
    check_question,
    checked_rows,
    digest,
    parse_rows,
)


@dataclass(frozen=True)
class JsonLines(PromptRows):
    """Prompts and answers from a JSON Lines file.

    A row is an object with `prompt` (text) and `answers` (a list of texts) or `answer` (one text), and optionally

    * `metric`, `max_new_tokens`, and `all_classes` (a list of texts) for the metric that takes them;
    * `first_line` (whether a text metric judges only the first line of the answer) and `stop` (a list of texts that end
      the answer);
    * `question`, a text that ends the prompt, which the protocol "agnostic" leaves out of what it compresses;
    * `id`.

    Other fields are ignored, blank lines too. Rows that differ in nothing but `id` and `question` count as one.

    Args:
        path: the file, UTF-8.
        metric: judges all rows, whatever they say. Default None: each row's own `metric`, else "contains".
        max_new_tokens: most tokens to generate, whatever the rows say. Default None: each row's own, else 32.
        split: "auto" (default) gives a quarter of the prompts to train, a quarter to validation and half to
            report. Which ones depends on the rows alone, not on seed or n, so searches and
            evaluations of one file never share a prompt across splits. Several questions about one text are
            different prompts, and may be in different splits. "all" uses every row for any split: for different
            files in search and evaluation.
        chat: whether to put the prompt in the model's chat template as a user message. Default False.
        context: most tokens of a prompt before the chat template; of a longer one the middle is cut out, as LongBench
            does. Default None: prompts are left as they are.

    Raises:
        TaskError: a setting out of its range.
        UsageError: an unknown metric.
    """

    name: ClassVar[str] = "jsonl"
    main_setting: ClassVar[str] = "path"

    path: str
    metric: str | None = None
    max_new_tokens: int | None = None
    split: Splitting = "auto"
    chat: bool = False
    context: int | None = None

    def __post_init__(self) -> None:
        if self.metric is not None:
            check_metric(self.metric)
        self._check_settings()

    def _rows(self) -> Iterator[Row[_Fields]]:
        for (number, where), fields in checked_rows(_Fields, parse_rows(read_text(self.path), self.path)):
            metric = self.metric or fields.metric or "contains"
            check_answers(metric, fields.references, where, fields.extra, fields.stop or (), bool(fields.first_line))
            name = fields.id or f"{Path(self.path).stem}-{number}"
            yield Row(name, where, fields, group=fields.prompt, content=fields.content)

    def _example(self, row: Row[_Fields], tokenizer: Any) -> Example:
        fields = row.fields
        prompt, place = self._asked(fields.prompt, fields.question, tokenizer)
        return Example(
            id=row.id,
            prompt=prompt,
            references=tuple(fields.references),
            max_new_tokens=self.max_new_tokens or fields.max_new_tokens or 32,
            metric=self.metric or fields.metric or "contains",
            question_at=place,
            first_line=bool(fields.first_line),
            stop=tuple(fields.stop or ()),
            extra=fields.extra,
        )


def _known_metric(name: str) -> str:
    check_metric(name)
    return name


class _Fields(Schema):
    prompt: Text
    answers: Texts | None = None
    answer: Text | None = None
    metric: Annotated[str, AfterValidator(_known_metric)] | None = None
    max_new_tokens: Count | None = None
    all_classes: Texts | None = None
    first_line: bool | None = None
    # A line break is a text to stop at, too.
    stop: Annotated[list[Annotated[AnyText, Field(min_length=1)]], Field(min_length=1)] | None = None
    question: Text | None = None
    id: Name | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> _Fields:
        if (self.answers is None) == (self.answer is None):
            raise UsageError("expected either 'answers', a list of texts, or 'answer', one text")
        if self.question is not None:
            check_question(self.prompt, self.question)
        return self

    @property
    def references(self) -> list[str]:
        return [self.answer] if self.answer is not None else self.answers or []

    @property
    def extra(self) -> dict[str, Any]:
        return {} if self.all_classes is None else {"all_classes": tuple(self.all_classes)}

    @property
    def content(self) -> str:
        # Of the row as it is in the file, so that overriding its settings draws the same rows.
        own: list[Any] = [self.metric, self.max_new_tokens]
        # Only where they are given, so that files from before these fields existed draw the same rows.
        own += [value for value in (self.first_line, self.stop) if value is not None]
        return digest(json.dumps([self.prompt, self.references, self.all_classes, own]))
