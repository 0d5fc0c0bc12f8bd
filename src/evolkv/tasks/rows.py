"""Rows of JSON Lines data: read, checked field by field, and drawn for a split.

Every error about a row begins with `where`: the file and the line.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from evolkv.errors import TaskError, UsageError
from evolkv.json_files import RepeatedKeyError, check_characters, unique_keys
from evolkv.models.chat import around_message, user_message
from evolkv.numbers import is_whole
from evolkv.schemas import Schema, checked
from evolkv.tasks.base import Example, Split, Task, check_choice, check_request, partition
from evolkv.tasks.metrics import MODEL_METRICS, get_metric, judged_part
from evolkv.tasks.prompts import cut_middle, question_at, uses_chat

logger = logging.getLogger(__name__)

_NOT_ASKED = (*MODEL_METRICS, "rouge_l", "rouge_l_zh")
#: It passes over comments, and so may give a right answer 0: LongBench has lines of code with "#" or "//".
_LENIENT = "code_sim"

Splitting = Literal["auto", "all"]
"""The way in which rows serve the splits: "auto" shares them out, "all" gives every row to every split."""


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("a text that is not blank")
    return value


AnyText = Annotated[str, AfterValidator(check_characters)]
Text = Annotated[AnyText, AfterValidator(_not_blank)]
Texts = Annotated[list[Text], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
#: What a row is called: a text, or a whole number.
Name = Annotated[Text, BeforeValidator(lambda value: str(value) if is_whole(value) else value)]
AnyFields = TypeVar("AnyFields", bound=Schema)


def check_question(prompt: str, question: str) -> None:
    """Raise UsageError unless a question ends its prompt."""
    if not prompt.rstrip().endswith(question.rstrip()):
        raise UsageError("'prompt' does not end with 'question'; give the prompt whole, question included")


@dataclass(frozen=True)
class Row(Generic[AnyFields]):
    """A row of a file.

    Args:
        id: the name of its example.
        where: the file and the line, for messages.
        fields: what the row says, checked.
        group: what must not be in two splits: the prompt, or the document that it is about.
        content: a hash of all that makes the row what it is, its name excepted; tells rows apart.
    """

    id: str
    where: str
    fields: AnyFields
    group: str
    content: str


Place = tuple[int, str]
"""The number of a row, from 1, and the words for its place in messages: the file and the line."""


def checked_rows(
    kind: type[AnyFields], rows: Iterable[tuple[Place, dict[str, Any]]]
) -> Iterator[tuple[Place, AnyFields]]:
    """Yield the place of each row, and its fields as a task reads them.

    Raises:
        TaskError: a row is not of that kind.
    """
    return ((place, checked(kind, place[1], fields, TaskError)) for place, fields in rows)


def parse_rows(text: str, source: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield the place and the fields of every row; blank lines are passed over.

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
            fields = json.loads(line, object_pairs_hook=unique_keys)
        except RepeatedKeyError as error:
            raise TaskError(f"{where}: key {error} is given twice; give it once") from None
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{where}: not valid JSON ({error}); expected one JSON object a line") from None
        if not isinstance(fields, dict):
            raise TaskError(f"{where}: expected a JSON object on the line, not a {type(fields).__name__}")
        yield (number, where), fields
    if empty:
        raise TaskError(f"{source} has no rows; expected one JSON object on each line")


def answers_score(
    metric: str, answers: Sequence[str], where: str, extra: Mapping[str, Any], judged: Sequence[str] | None = None
) -> bool:
    """Return whether any of a row's own answers, or of what is `judged` of them, scores above 0 under a metric.

    Answers that are summaries are taken to score, because ROUGE takes minutes for a file of them.

    Raises:
        TaskError: the metric needs what `extra` lacks, or an answer that reads otherwise.
    """
    if metric in _NOT_ASKED:
        return True
    judge = get_metric(metric)
    try:
        return any(judge(text, answers, **extra) for text in (answers if judged is None else judged))
    except UsageError as error:
        raise TaskError(f"{where}: {error}") from None


def check_answers(
    metric: str,
    answers: Sequence[str],
    where: str,
    extra: Mapping[str, Any],
    stop: Sequence[str] = (),
    first_line: bool = False,
) -> None:
    """Raise TaskError where each of a row's own answers scores 0, so that nothing can be right; see `answers_score`."""
    judged = [judged_part(answer, stop, first_line) for answer in answers]
    if not answers_score(metric, answers, where, extra, judged) and metric != _LENIENT:
        raise TaskError(
            f"{where}: the answer {answers[0][:60]!r} scores 0 under metric {metric!r}; correct the answer, or take "
            "another metric"
        )


def distinct(rows: Iterable[Row[AnyFields]], source: str) -> list[Row[AnyFields]]:
    """Return the rows without those whose content came before; how many were dropped is logged."""
    kept: dict[str, Row[AnyFields]] = {}
    total = 0
    for row in rows:
        total += 1
        kept.setdefault(row.content, row)
    if total > len(kept):
        logger.info("%s: dropped %d duplicate rows", source, total - len(kept))
    return list(kept.values())


def of_split(rows: Sequence[Row[AnyFields]], split: Split, splitting: Splitting) -> list[Row[AnyFields]]:
    """Return the rows that serve a split, in their order; see `draw` for which."""
    groups = sorted({row.group for row in rows}, key=digest)
    own = set(groups[partition(len(groups))[split]] if splitting == "auto" else groups)
    return [row for row in rows if row.group in own]


def check_split(
    own: Sequence[Row[AnyFields]], rows: Sequence[Row[AnyFields]], split: Split, source: str, groups: str
) -> None:
    """Raise TaskError if no rows of all are a split's own; `source` and `groups` are as for `draw`."""
    if not own:
        raise TaskError(
            f"{source}: split {split!r} is empty: the file has {len({row.group for row in rows})} different {groups}; "
            "give at least 4, or use split=all"
        )


def draw(
    rows: Iterable[Row[AnyFields]], split: Split, n: int, *, splitting: Splitting, seed: str, source: str, groups: str
) -> list[Row[AnyFields]]:
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


class PromptRows(Task):
    """The base of tasks whose rows hold a whole prompt each. They are dataclasses with these settings.

    A subclass reads the rows in `_rows` and makes an example of one in `_example`.

    Attributes:
        groups: what stands together in one split, in the words of a message.
    """

    groups: ClassVar[str] = "prompts"

    path: str
    max_new_tokens: int | None
    split: Splitting
    chat: bool
    context: int | None

    def _check_settings(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise TaskError(f"{self.name}: max_new_tokens={self.max_new_tokens} is out of range; expected at least 1")
        if self.context is not None and self.context < 2:
            raise TaskError(f"{self.name}: context={self.context} is out of range; expected at least 2 tokens")
        check_choice(self.name, "split", self.split, get_args(Splitting))

    def examples(self, split: Split, n: int, tokenizer: Any, seed: int = 0) -> list[Example]:
        """Draw n rows of the split in the seed's order; all of them, with a warning, if there are fewer.

        Raises:
            TaskError: a file cannot be read, a row is malformed (the message names file and line), the split has no
                rows, or the tokenizer has no chat template where one is asked for, or one that does not take the row.
        """
        check_request(split, n)
        uses_chat(tokenizer, self.chat, self.name)
        drawn = draw(
            self._rows(),
            split,
            n,
            splitting=self.split,
            seed=f"{self.name}/{seed}",
            source=self.path,
            groups=self.groups,
        )
        return [self._example(row, tokenizer) for row in drawn]

    def check_files(self) -> None:
        """Read all rows."""
        for _ in self._rows():
            pass

    def _asked(self, text: str, question: str | None, tokenizer: Any) -> tuple[str, int | None]:
        """Return a row's prompt, cut and in the chat template as the settings say, and where its question begins."""
        prompt = text if self.context is None else cut_middle(tokenizer, text, self.context)
        if self.chat:
            prompt = user_message(tokenizer, prompt)
        if question is None:
            return prompt, None
        return prompt, question_at(prompt, question, around_message(tokenizer)[1] if self.chat else "")

    @abstractmethod
    def _rows(self) -> Iterator[Row[Any]]:
        """Yield the rows of the file."""

    @abstractmethod
    def _example(self, row: Row[Any], tokenizer: Any) -> Example:
        """Return a row as an example."""
