"""The base class of tasks: a task is a named source of examples, each a prompt with the answers that count as right."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, get_args

from evolkv.errors import TaskError, UsageError
from evolkv.json_files import check_characters
from evolkv.numbers import is_whole
from evolkv.registry import unknown_name
from evolkv.tasks.metrics import LABEL_FREE

#: A part of a task: searches learn from "train" and choose on "validation"; "report" is left to `evolkv.evaluate`.
Split = Literal["train", "validation", "report"]
#: Their names.
SPLITS: tuple[Split, ...] = get_args(Split)
#: The settings of tasks that name a file.
_PATHS = ("path", "shots_path", "haystack", "essays")


@dataclass(frozen=True)
class Example:
    """One prompt and what counts as a right answer to it.

    Args:
        id: name of the example, the same in every run that draws it.
        prompt: the complete text given to the model, chat template included.
        references: the acceptable answers, at least one unless `metric` needs none.
        target: the text whose probability the `logprob` metric measures. Default: the first reference as it follows the
            prompt, see `following`.
        max_new_tokens: most tokens to generate.
        metric: name of the metric that judges the answer.
        first_line: whether a text metric judges only the first line of the answer, line breaks before it left out.
        stop: texts that end the answer; what follows the first of them is not judged by a text metric.
        question_at: where in the prompt the question begins, in characters; None where it does not stand apart at the
            end.
        later: text that the model reads after the prompt was compressed, before it answers; see `under_protocol`.
        extra: keyword arguments of that metric (`all_classes`, …) and facts for reports (`depth`, …);
            values that JSON can hold.

    Raises:
        TaskError: a field of another type, or no reference answer where the metric needs one.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    target: str = ""
    max_new_tokens: int = 32
    metric: str = "contains"
    first_line: bool = False
    stop: tuple[str, ...] = ()
    question_at: int | None = None
    later: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_types()
        if not self.references and self.metric not in LABEL_FREE:
            raise TaskError(f"example {self.id!r} has no reference answer; give at least one")
        if not self.target and self.references:
            object.__setattr__(self, "target", following(self.later or self.prompt, self.references[0]))

    def _check_types(self) -> None:
        """Take numbers of NumPy and lists of texts for what they stand for; raise TaskError for other types."""

        def refuse(name: str, expected: str) -> NoReturn:
            raise TaskError(f"example {self.id!r}: {name} is {getattr(self, name)!r:.60}; expected {expected}")

        for name in ("id", "prompt", "target", "metric", "later"):
            if not isinstance(getattr(self, name), str):
                refuse(name, "a text")
        for name in ("references", "stop"):
            texts = getattr(self, name)
            # A single text would pass for a sequence of its letters.
            if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
                refuse(name, "a tuple of texts")
            object.__setattr__(self, name, tuple(texts))
        for name in ("max_new_tokens", "question_at"):
            number = getattr(self, name)
            if is_whole(number):
                object.__setattr__(self, name, int(number))
            elif number is not None or name == "max_new_tokens":
                refuse(name, "a whole number")
        if self.max_new_tokens < 0:
            refuse("max_new_tokens", "0 or more")
        try:
            fields = {**vars(self), "extra": dict(self.extra)}
            check_characters(json.dumps(fields, sort_keys=True, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TaskError(f"example {self.id!r} holds what a record cannot: {error}") from None


class Task(ABC):
    """A source of examples. A task is a frozen dataclass; its fields are the keys of its spec.

    The first line of a task's docstring is its description in `evolkv list tasks`.
    """

    name: ClassVar[str]
    default_metric: ClassVar[str] = "contains"
    #: The setting whose key may be left out of a spec, at its beginning: `ruler:vt` is `ruler:task=vt`.
    main_setting: ClassVar[str | None] = None
    #: Whether a search weighs the examples by what budgets can gain on each; see `evolkv.evaluation.balance`.
    balanced: ClassVar[bool] = False
    #: Training examples of a search, where it does not say how many.
    train_examples: ClassVar[int] = 24

    @abstractmethod
    def examples(self, split: Split, n: int, tokenizer: Any, seed: int = 0) -> list[Example]:
        """Draw examples; the same arguments always give the same ones.

        Args:
            split: "train", "validation" or "report". Examples of different splits never overlap.
            n: how many, at least 1.
            tokenizer: the tokenizer of the model that will read the prompts.
            seed: chooses the examples within the split. Default 0.

        Returns:
            n examples, or fewer where the task has no more. Neighbours share long prefixes where possible.

        Raises:
            TaskError: the settings or the data cannot be used.
        """

    @property
    def labelled(self) -> bool:
        """True if examples have reference answers."""
        return self.default_metric not in LABEL_FREE

    @property
    def free_text(self) -> bool:
        """True if examples are texts that people wrote, each unlike the others, rather than generated by a rule."""
        return True

    @property
    def kinds(self) -> int:
        """Number of examples after which their kinds begin anew, where kinds take turns; 1 where there is one alone."""
        return 1

    def haystack_used(self) -> str | None:
        """Return what the text around the needles is, for the record; None for a task that hides none in a text."""
        return None

    def check_files(self) -> None:
        """Read the data that examples are drawn from, so that what is wrong with it is said before a model is loaded.

        Unless a task overrides it, this only looks whether its files are there.

        Raises:
            TaskError: the data cannot be found, fetched or read, or is malformed.
        """
        for path in self.files():
            if not Path(os.path.expanduser(path)).exists():
                raise TaskError(f"file {path} does not exist; check the path")

    def files(self) -> list[str]:
        """Paths of the files that the examples are read from."""
        return [value for name in _PATHS if isinstance(value := getattr(self, name, None), str)]


def following(text: str, answer: str) -> str:
    """Return an answer as it follows a text: after a space, unless either has one there, or Chinese or Japanese ends.

    Args:
        text: what the answer follows.
        answer: the answer.
    """
    last = text[-1:]
    # Wide letters and punctuation belong to writing without spaces. Korean has spaces, and emoji say nothing.
    unspaced = unicodedata.east_asian_width(last or " ") in "WF" and not (
        unicodedata.category(last) == "So" or unicodedata.name(last, "").startswith("HANGUL")
    )
    return answer if unspaced or last.isspace() or answer[:1].isspace() else f" {answer}"


def check_request(split: str, n: int) -> None:
    """Raise UsageError unless `split` is one of `SPLITS` and `n` is at least 1."""
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    if not is_whole(n) or n < 1:
        raise UsageError(f"cannot draw {n!r} examples; ask for a whole number, at least 1")


def check_choice(task: str, key: str, value: object, choices: Sequence[str]) -> None:
    """Raise TaskError unless the value of a task's setting is one of the choices."""
    if value not in choices:
        raise TaskError(f"{task}: {key}={value!r} is unknown; expected one of {', '.join(choices)}")


def fingerprint(examples: Iterable[Example]) -> str:
    """Return a 16-digit hexadecimal hash of everything in the examples, in their order, for provenance.

    Args:
        examples: the examples.
    """
    digest = hashlib.sha256()
    for example in examples:
        fields = {f.name: getattr(example, f.name) for f in dataclasses.fields(example)}
        fields["extra"] = dict(example.extra)
        digest.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


def read_text(path: str) -> str:
    """Return the text of a UTF-8 file (a byte-order mark is dropped, `~` is the home folder).

    Raises:
        TaskError: the file is missing, a folder, unreadable or not UTF-8.
    """
    if not path:
        raise TaskError("the path of a file is empty; give one")
    file = Path(os.path.expanduser(path))
    if file.is_dir():
        raise TaskError(f"{path} is a folder; give the path of a file")
    if file.exists() and not file.is_file():
        raise TaskError(
            f"{path} is a pipe or a device, and a task reads its file several times; give the path of a file"
        )
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise TaskError(f"file {path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TaskError(f"file {path} cannot be read: {reason}; give a readable UTF-8 file") from None
    return decode_text(data, path)


def decode_text(data: bytes, source: str) -> str:
    """Return the text of UTF-8 bytes (a byte-order mark is dropped) that come from `source`.

    Raises:
        TaskError: the bytes are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise TaskError(
            f"{source} line {line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file to UTF-8"
        ) from None


def partition(size: int) -> dict[str, slice]:
    """Return where each split lies in an ordered collection of `size` things: ¼ train, ¼ validation, ½ report."""
    quarter, half = size // 4, size // 2
    bounds: Sequence[tuple[int, int]] = [(0, quarter), (quarter, half), (half, size)]
    return {split: slice(*bound) for split, bound in zip(SPLITS, bounds, strict=True)}
