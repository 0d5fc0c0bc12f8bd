"""Examples from a JSON Lines file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

from evolkv.errors import TaskError, UsageError
from evolkv.tasks.base import Example, Split, Task, check_choice, check_request, read_text
from evolkv.tasks.metrics import check_metric, judged_part
from evolkv.tasks.prompts import cut_middle, question_at, user_message, uses_chat
from evolkv.tasks.rows import (
    Splitting,
    answers_score,
    digest,
    draw,
    get_count,
    get_name,
    get_text,
    get_texts,
    kind_of,
    parse_rows,
)


@dataclass(frozen=True)
class JsonLines(Task):
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
            evaluations of one file never share a prompt across splits. "all" uses every row for any
            split: for different files in search and evaluation.
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
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise TaskError(f"jsonl: max_new_tokens={self.max_new_tokens} is out of range; expected at least 1")
        if self.context is not None and self.context < 2:
            raise TaskError(f"jsonl: context={self.context} is out of range; expected at least 2 tokens")
        check_choice(self.name, "split", self.split, get_args(Splitting))

    def examples(self, split: Split, n: int, tokenizer: Any, seed: int = 0) -> list[Example]:
        """Draw n rows of the split in the seed's order; all of them, with a warning, if there are fewer.

        Raises:
            TaskError: the file cannot be read, a row is malformed (the message names file and line), the
                split has no rows, or chat=true and the tokenizer has no chat template.
        """
        check_request(split, n)
        uses_chat(tokenizer, self.chat, self.name)
        drawn = draw(
            self._rows(),
            split,
            n,
            splitting=self.split,
            seed=f"jsonl/{seed}",
            source=self.path,
            groups="prompts",
        )
        return [self._example(row, tokenizer) for row in drawn]

    def check_files(self) -> None:
        """Read all rows."""
        for _ in self._rows():
            pass

    def _rows(self) -> Iterator[_Row]:
        return (self._parse(fields, number) for number, fields in parse_rows(read_text(self.path), self.path))

    def _parse(self, fields: Mapping[str, Any], number: int) -> _Row:
        where = f"{self.path} line {number}"
        prompt = get_text(fields, "prompt", where)
        answers = _answers(fields, where)
        all_classes = get_texts(fields, "all_classes", where) if fields.get("all_classes") is not None else None
        metric = self.metric or _metric(fields, where)
        first_line, stop = _first_line(fields, where), _stop(fields, where)
        extra = {} if all_classes is None else {"all_classes": all_classes}
        judged = [judged_part(answer, stop, first_line) for answer in answers]
        # LongBench's own rows have lines of code with "#" or "//", which `code_sim` passes over.
        if not answers_score(metric, judged, where, **extra) and metric != "code_sim":
            raise TaskError(
                f"{where}: the answer {answers[0][:60]!r} scores 0 under its own metric {metric!r}; correct the row, "
                "or take another metric"
            )
        own = [fields.get("metric"), fields.get("max_new_tokens")]
        # Only where they are: what a row is drawn by shall not depend on the version.
        own += [fields[name] for name in ("first_line", "stop") if fields.get(name) is not None]
        return _Row(
            id=get_name(fields, "id", where, default=f"{Path(self.path).stem}-{number}"),
            prompt=prompt,
            answers=answers,
            metric=metric,
            max_new_tokens=self.max_new_tokens or _max_new_tokens(fields, where),
            all_classes=all_classes,
            first_line=first_line,
            stop=stop,
            question=_question(fields, prompt, where),
            # Of the row as it is in the file, so that overriding its settings draws the same rows.
            content=digest(json.dumps([prompt, answers, all_classes, own])),
        )

    def _example(self, row: _Row, tokenizer: Any) -> Example:
        prompt = row.prompt if self.context is None else cut_middle(tokenizer, row.prompt, self.context)
        if self.chat:
            prompt = user_message(tokenizer, prompt)
        return Example(
            id=row.id,
            prompt=prompt,
            references=row.answers,
            max_new_tokens=row.max_new_tokens,
            metric=row.metric,
            question_at=None if row.question is None else question_at(prompt, row.question),
            first_line=row.first_line,
            stop=row.stop,
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
    first_line: bool
    stop: tuple[str, ...]
    question: str | None
    content: str

    @property
    def group(self) -> str:
        """Rows with the same prompt go together, so that no prompt is in two splits."""
        return self.prompt


def _answers(fields: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if "answers" in fields and "answer" in fields:
        raise TaskError(f"{where}: both 'answers' and 'answer' are given; give all of them as 'answers'")
    if "answers" in fields:
        return get_texts(fields, "answers", where)
    if "answer" in fields:
        return (get_text(fields, "answer", where),)
    raise TaskError(f"{where}: field 'answers' is missing; expected a list of texts, or one text as 'answer'")


def _first_line(fields: Mapping[str, Any], where: str) -> bool:
    value = fields.get("first_line")
    if value is not None and not isinstance(value, bool):
        raise TaskError(f"{where}: 'first_line' is {kind_of(value)}; expected a truth value")
    return bool(value)


def _stop(fields: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if fields.get("stop") is None:
        return ()
    # A line break is a text to stop at, too.
    texts = get_texts(fields, "stop", where, blank=True)
    if "" in texts:
        raise TaskError(f"{where}: an entry of 'stop' is empty; expected a text")
    return texts


def _question(fields: Mapping[str, Any], prompt: str, where: str) -> str | None:
    if fields.get("question") is None:
        return None
    question = get_text(fields, "question", where)
    if not prompt.rstrip().endswith(question.rstrip()):
        raise TaskError(f"{where}: 'prompt' does not end with 'question'; give the prompt whole, question included")
    return question


def _metric(fields: Mapping[str, Any], where: str) -> str:
    metric = fields.get("metric")
    if metric is None:
        return "contains"
    try:
        check_metric(metric)
    except UsageError as error:
        raise TaskError(f"{where}: {error}") from None
    return metric


def _max_new_tokens(fields: Mapping[str, Any], where: str) -> int:
    return 32 if fields.get("max_new_tokens") is None else get_count(fields, "max_new_tokens", where)
