"""Examples of a LongBench subset: rows read, cut to length, asked as published."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

from pydantic import AfterValidator, Field

from evolkv.errors import TaskError
from evolkv.models.chat import user_message
from evolkv.registry import unknown_name
from evolkv.schemas import Schema
from evolkv.tasks.base import Example, Split, Task, check_choice, check_request
from evolkv.tasks.longbench.files import read_subset
from evolkv.tasks.longbench.subsets import EXTENDED, NAMES, SUBSETS, Subset
from evolkv.tasks.prompts import cut_middle, question_at, uses_chat
from evolkv.tasks.rows import (
    AnyText,
    Count,
    Name,
    Row,
    Splitting,
    Text,
    Texts,
    answers_score,
    checked_rows,
    digest,
    draw,
    parse_rows,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LongBench(Task):
    """One subset of LongBench or LongBench-E, asked and judged as published.

    Prompts, answer lengths, metrics, truncation and the use of chat templates are those of LongBench's `pred.py`
    and `eval.py`. `Example.extra` has each row's `length` as the file gives it (words, or characters of Chinese);
    for LongBench-E also its `bin`: "0-4k", "4-8k" or "8k+".

    Two differences. For samsum the official script ends an answer at its first line break and forbids the answer
    to begin with one or to be empty. Here, as in the other few-shot subsets, the model goes on and only the first
    line is judged; the score is the same unless the model would have begun with a line break or said nothing.
    And rows that differ in nothing but `_id` count as one (multifieldqa_zh has two such rows among its 200).

    Args:
        subset: one of the 21 subsets (`lcc`, …), or with `_e` one of the 13 of LongBench-E (`lcc_e`, …).
        path: a folder with `SUBSET.jsonl`, that file, or LongBench's data.zip. Default None: data.zip from the
            Hugging Face Hub dataset THUDM/LongBench, fetched once.
        context: most tokens of a prompt before the chat template; of a longer one the middle is cut out, and its
            first and last `context // 2` tokens stay (where the halves meet, tokens may merge or split). The
            template's own tokens and up to 512 new ones come on top, so stay that much below the model's context.
            Default 3500, LongBench's own value for models with 4k; it takes 7500 for 8k, 15500 for 16k and 31500
            for 32k.
        split: "auto" (default) gives a quarter of the documents to train, a quarter to validation and half to
            report. Which ones depends on the rows alone, and rows about one document stay together. "all" uses
            every row for any split. A subset and its `_e` namesake are split independently, so examples
            of one may be in another split of the other.
        chat: whether to put the prompt in the model's chat template. Default None: where the tokenizer has one, for
            all subsets but trec, triviaqa, samsum, lsht, lcc and repobench-p.

    Raises:
        UsageError: an unknown subset.
        TaskError: another setting out of its range.
    """

    name: ClassVar[str] = "longbench"
    main_setting: ClassVar[str] = "subset"

    subset: str
    path: str | None = None
    context: int = 3500
    split: Splitting = "auto"
    chat: bool | None = None

    def __post_init__(self) -> None:
        if self.subset not in NAMES:
            raise unknown_name("longbench subset", self.subset, NAMES)
        if self.context < 2:
            raise TaskError(f"longbench: context={self.context} is out of range; expected at least 2 tokens")
        check_choice(self.name, "split", self.split, get_args(Splitting))

    def examples(self, split: Split, n: int, tokenizer: Any, seed: int = 0) -> list[Example]:
        """Draw n rows of the split; all of them, with a warning, if there are fewer. Rows of a document are neighbours.

        Raises:
            TaskError: the data cannot be found, fetched or read, a row is malformed (the message names file and
                line), or the split has no rows.
        """
        check_request(split, n)
        rows, source = self._rows()
        drawn = draw(
            rows,
            split,
            n,
            splitting=self.split,
            seed=f"longbench/{seed}",
            source=source,
            groups="documents",
        )
        place: dict[str, int] = {}
        for row in drawn:
            place.setdefault(row.group, len(place))
        drawn.sort(key=lambda row: place[row.group])
        self._warn_of_unanswerable(drawn, source)
        return [self._example(row, tokenizer) for row in drawn]

    def files(self) -> list[str]:
        """Return the subset's file, also where `path` is the folder that it is in."""
        if self.path is not None and Path(os.path.expanduser(self.path)).is_dir():
            return [str(Path(self.path) / f"{self.subset}.jsonl")]
        return super().files()

    def check_files(self) -> None:
        """Read all rows of the subset."""
        rows, _ = self._rows()
        for _ in rows:
            pass

    def _rows(self) -> tuple[Iterator[_Row], str]:
        """Return the rows, and where they are from."""
        text, source = read_subset(self.subset, self.path)
        kind = _FieldsWithClasses if self._work.metric == "classification" else _Fields
        return (self._row(*place, fields) for place, fields in checked_rows(kind, parse_rows(text, source))), source

    def _row(self, number: int, where: str, fields: _Fields) -> _Row:
        dataset = fields.dataset
        if dataset in NAMES and _work_name(dataset) != _work_name(self.subset):
            raise TaskError(f"{where}: the row is of dataset {dataset!r}, not {self.subset!r}; give subset={dataset}")
        content = digest(json.dumps([fields.input, fields.context, fields.answers, fields.all_classes]))
        return Row(f"{self.subset}-{fields.id or number}", where, fields, group=fields.context, content=content)

    def _scores(self, row: _Row) -> bool:
        """Return whether any of a row's answers can score; one that its metric cannot read does not."""
        try:
            extra = {"all_classes": row.fields.all_classes}
            return answers_score(self._work.metric, row.fields.answers, row.where, extra)
        except TaskError:
            return False

    def _warn_of_unanswerable(self, rows: Sequence[_Row], source: str) -> None:
        # Not refused: published scores count such rows too. `code_sim`, for one, passes over lines with "#".
        at_zero = [row.id for row in rows if not self._scores(row)]
        if at_zero:
            logger.warning(
                "%s: no answer can score under %s in %d of %d rows (%s, …); they count, as in published scores",
                source,
                self._work.metric,
                len(at_zero),
                len(rows),
                at_zero[0],
            )

    @property
    def _work(self) -> Subset:
        return SUBSETS[_work_name(self.subset)]

    def _example(self, row: _Row, tokenizer: Any) -> Example:
        work, fields = self._work, row.fields
        prompt = cut_middle(tokenizer, work.prompt.format(context=fields.context, input=fields.input), self.context)
        by_default = None if work.chat else False
        if uses_chat(tokenizer, by_default if self.chat is None else self.chat, self.name):
            prompt = user_message(tokenizer, prompt)
        extra: dict[str, Any] = {"length": fields.length}
        if self.subset in EXTENDED:
            extra["bin"] = _length_bin(fields.length)
        if fields.all_classes is not None:
            extra["all_classes"] = tuple(fields.all_classes)
        return Example(
            id=row.id,
            prompt=prompt,
            references=tuple(fields.answers),
            target=fields.answers[0] if work.chinese else "",
            max_new_tokens=work.max_new_tokens,
            metric=work.metric,
            first_line=work.first_line,
            question_at=question_at(prompt, work.prompt.partition("{context}")[2].format(input=fields.input)),
            extra=extra,
        )


class _Fields(Schema):
    input: AnyText
    context: Text
    answers: Annotated[list[AnyText], Field(min_length=1)]
    length: Count
    id: Name | None = Field(None, alias="_id")
    dataset: Any = None
    #: Other subsets have none to choose among, whatever the file says.
    all_classes: Annotated[Any, AfterValidator(lambda _: None)] = None


class _FieldsWithClasses(_Fields):
    all_classes: Texts


_Row = Row[_Fields]


def _work_name(subset: str) -> str:
    return subset.removesuffix("_e")


def _length_bin(length: int) -> str:
    if length < 4000:
        return "0-4k"
    return "4-8k" if length < 8000 else "8k+"
