"""Grade-school maths: worked examples, then a problem.

The data is that of Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168; the form is that
of lm-evaluation-harness's task `gsm8k`, version 3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import field_validator

from evolkv.errors import TaskError
from evolkv.models.chat import user_message
from evolkv.schemas import Schema
from evolkv.tasks.base import Example, Split, Task, check_choice, check_request, following, read_text
from evolkv.tasks.hub import hub_file
from evolkv.tasks.parquet import parse_parquet
from evolkv.tasks.prompts import question_at, uses_chat
from evolkv.tasks.rows import (
    Name,
    Place,
    Row,
    Splitting,
    Text,
    checked_rows,
    digest,
    distinct,
    draw,
    of_split,
    parse_rows,
)

Mode = Literal["flexible", "strict"]

STOP = ("Question:", "</s>", "<|im_end|>")
"""Texts at which the harness ends a generation."""

_REPOSITORY, _TEST_FILE = "openai/gsm8k", "main/test-00000-of-00001.parquet"
_INSTEAD = "give path= a file of questions and answers, such as test.jsonl of github.com/openai/grade-school-math"
_NUMBER = re.compile(r"#### (-?[$0-9.,]*[0-9][0-9.,]*)\s*\Z")


@dataclass(frozen=True)
class Gsm8k(Task):
    """Solve a grade-school maths problem after a few worked examples (GSM8K).

    Prompts, answer length, stop texts and metric are those of lm-evaluation-harness. A row of the file is an object
    with `question` and `answer`, a worked solution that ends in "#### " and the final number. The reference is that
    number. The target of the `logprob` metric is the whole solution, "#### " and number included: right after
    "Answer:" the number alone would measure guessing. Rows with the same question and answer count as one.

    The worked examples ("shots") are the same for every example of a file, whatever split, seed and n, so that
    prompts share them as a prefix, and no problem that serves as a shot is drawn. The harness draws fresh shots for
    each problem, from the dataset's train file.

    Args:
        path: the file: train.jsonl or test.jsonl of github.com/openai/grade-school-math, UTF-8, JSON Lines; or a
            Parquet file with the same fields. Default None: the test file that openai/gsm8k has on the Hugging Face
            Hub, fetched once. Parquet needs pyarrow (``pip install 'evolkv[parquet]'``).
        shots: how many worked examples come before the problem. Default 5, as in the harness.
        shots_path: the file whose first rows are the shots. Default None: rows of `path` itself, from those that
            serve train.
        mode: which number of the answer counts. "flexible" (default) is the last, "strict" the first after "#### ".
        chat: whether to put shots and problem in the model's chat template, as one user message. Default False, as in
            the harness.
        split: "auto" (default) gives a quarter of the questions to train, a quarter to validation and half to
            report. Which ones depends on the rows alone, not on seed, n or shots. "all" uses every row for any split.
        max_new_tokens: most tokens to generate. Default 256, as in the harness.

    Raises:
        TaskError: a setting out of its range.
    """

    name: ClassVar[str] = "gsm8k"
    default_metric: ClassVar[str] = "gsm8k"
    main_setting: ClassVar[str] = "path"

    path: str | None = None
    shots: int = 5
    shots_path: str | None = None
    mode: Mode = "flexible"
    chat: bool = False
    split: Splitting = "auto"
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise TaskError(f"gsm8k: shots={self.shots} is out of range; expected 0 or more")
        if self.max_new_tokens < 1:
            raise TaskError(f"gsm8k: max_new_tokens={self.max_new_tokens} is out of range; expected at least 1")
        for key, choices in (("mode", Mode), ("split", Splitting)):
            check_choice(self.name, key, getattr(self, key), get_args(choices))

    def examples(self, split: Split, n: int, tokenizer: Any, seed: int = 0) -> list[Example]:
        """Draw n problems of the split in the seed's order; all of them, with a warning, if there are fewer.

        Raises:
            TaskError: a file cannot be fetched or read, a row is malformed (the message names file and line), there are
                too few rows for the shots or none besides them, or chat=true and the tokenizer has no chat
                template.
        """
        check_request(split, n)
        template = tokenizer if uses_chat(tokenizer, self.chat, self.name) else None
        path = self._file()
        problems = _read(path)
        shots = self._shots(problems, path)
        shown = {shot.group for shot in shots}
        left = [problem for problem in self._share(problems, split) if problem.group not in shown]
        if not left:
            instead = "" if self.split == "all" else ", or use split=all"
            raise TaskError(
                f"{path}: split {split!r} is empty: the file has {len(problems)} problems, of which {len(shots)} "
                f"may be shots; give a file with more, or fewer shots{instead}"
            )
        drawn = draw(left, split, n, splitting="all", seed=f"gsm8k/{seed}", source=path, groups="questions")
        shared = "".join(f"{shot.fields.asked} {shot.fields.answer}\n\n" for shot in shots)
        return [self._example(problem, shared, template) for problem in drawn]

    def check_files(self) -> None:
        """Read all problems, and count the shots."""
        path = self._file()
        self._shots(_read(path), path)

    def _file(self) -> str:
        return hub_file(_REPOSITORY, _TEST_FILE, self.name, _INSTEAD) if self.path is None else self.path

    def _shots(self, problems: Sequence[_Problem], path: str) -> Sequence[_Problem]:
        if self.shots_path is None:
            pool, source = self._share(problems, "train"), f"{path} (what of it serves train)"
        else:
            pool, source = _read(self.shots_path), self.shots_path
        if len(pool) < self.shots:
            raise TaskError(
                f"gsm8k: shots={self.shots}, but {source} has {len(pool)} problems; give fewer shots or "
                "shots_path= a file with more"
            )
        return pool[: self.shots]

    def _share(self, problems: Sequence[_Problem], split: Split) -> list[_Problem]:
        """Return the problems that serve a split, in an order that depends on them alone."""
        own = of_split(problems, split, self.split)
        return sorted(own, key=lambda problem: (digest(problem.group), problem.content))

    def _example(self, problem: _Problem, shots: str, template: Any) -> Example:
        text = shots + problem.fields.asked
        prompt = text if template is None else user_message(template, text)
        return Example(
            id=problem.id,
            prompt=prompt,
            references=(problem.fields.number,),
            target=following(prompt, problem.fields.answer),
            max_new_tokens=self.max_new_tokens,
            metric=self.default_metric,
            stop=STOP,
            question_at=question_at(prompt, problem.fields.asked),
            extra={"mode": self.mode},
        )


class _Fields(Schema):
    question: Text
    #: The worked solution.
    answer: Text
    id: Name | None = None

    @field_validator("answer")
    @classmethod
    def _ends_in_a_number(cls, answer: str) -> str:
        if _NUMBER.search(answer) is None:
            raise ValueError("a text that ends in a number after '#### ', as in '#### 18'")
        return answer

    @property
    def asked(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def number(self) -> str:
        return _NUMBER.findall(self.answer)[-1]


_Problem = Row[_Fields]


def _read(path: str) -> list[_Problem]:
    rows = parse_parquet(path) if path.lower().endswith(".parquet") else parse_rows(read_text(path), path)
    return distinct((_problem(path, place, fields) for place, fields in checked_rows(_Fields, rows)), path)


def _problem(path: str, place: Place, fields: _Fields) -> _Problem:
    number, where = place
    content = digest(json.dumps([fields.question, fields.answer]))
    return Row(fields.id or f"{Path(path).stem}-{number}", where, fields, group=fields.question, content=content)
