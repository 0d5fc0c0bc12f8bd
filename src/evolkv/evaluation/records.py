"""Every example of an evaluation on record: what was asked, answered and held, one line of JSON each.

The first line of a file is its header, ``{"format": "evolkv.records/1", "settings": {…}}``; each other line is a
`Record`. Lines are appended as examples finish, and a last line that a killed program left incomplete is ignored.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from evolkv.claims import ClaimedError, FileClaim
from evolkv.errors import RunError, UsageError
from evolkv.schemas import RecordedBudget, checked, differences
from evolkv.version import __version__

if TYPE_CHECKING:
    from evolkv.profile import BudgetProfile
    from evolkv.tasks import Example

logger = logging.getLogger(__name__)

FORMAT = "evolkv.records/1"
_START = f'{{"format": "{FORMAT}"'.encode()
_MOST_DIFFERENCES = 3

Name = Annotated[str, Field(min_length=1)]


class _Checked(BaseModel):
    # Settings and facts of later versions are kept: whoever continues a file must share them.
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class ModelSettings(_Checked):
    """The model, and how it was run."""

    name: str
    fingerprint: str
    dtype: str
    attention: str
    device: str


class MethodSettings(_Checked):
    """A method at a budget.

    Args:
        method: its name.
        budget: mean budget in entries, or as a share of each prompt, such as "10%"; None for the full cache.
        budgets_sha256: of the allocation, as JSON; None for the full cache. Of a share: of that for a prompt which
            fills the model's context.
        selector: name and parameters; None for the full cache.
        expanded_from: the budget that a profile was found at, if it is another.
        seen: by task, names of the examples that a profile was evolved or chosen on, as far as the profile says so.
    """

    method: Name
    budget: RecordedBudget | None
    budgets_sha256: str | None
    selector: dict[str, Any] | None
    expanded_from: RecordedBudget | None
    seen: dict[str, list[str]] = {}


class TaskSettings(_Checked):
    """The examples of a task: their names in order, a hash of all that is in them, and what their needles hide in."""

    fingerprint: str
    examples: Annotated[list[Name], Field(min_length=1)]
    haystack: str | None = None


class Settings(_Checked):
    """The settings that identify an evaluation. Methods go by `label`, tasks by their spec.

    `prefill_chunk` is the number of tokens in which prompts were read, None for all at once. `block_size` is the
    number of tokens in a block of a server that would hold the entries, None where each budget was held to the entry.
    """

    model: ModelSettings
    metric: str | None
    protocol: Name
    seed: int
    samples: int
    sample_ids: list[str] | None
    prefill_chunk: int | None = None
    block_size: int | None = None
    methods: Annotated[dict[str, MethodSettings], Field(min_length=1)]
    tasks: Annotated[dict[str, TaskSettings], Field(min_length=1)]
    versions: dict[str, str]


class Record(_Checked):
    """One method at one budget on one example.

    Args:
        task: spec of the task.
        example: name of the example.
        prompt_sha256: of the prompt's text, the question included.
        prompt_tokens: length of what was compressed.
        method: name of the method.
        budget: mean budget in entries, or as a share of each prompt; None for the full cache.
        metric: name of the metric.
        protocol: whether the question was seen when the prompt was compressed; see `evolkv.tasks.protocol`.
        prediction: the text generated; None for metrics that read an answer.
        first_line: whether the metric judges only the first line of the prediction.
        stop: texts that end what the metric judges of the prediction.
        references: the acceptable answers; none where the metric needs none.
        score: in [0, 1].
        kv_bytes: what the cache held after prefill.
        read_bytes: what the attention of one generated token would read of that; None in records of earlier versions,
            whose methods read all that they held.
        companion_bytes: of both, what a companion model's cache took; 0 without one.
        mean_budget: the same as entries per KV head.
        prefill_factor: tokens that the model read before the first answer token for each of the prompt's; above 1 where
            the selector has it read the prompt again.
        prefill_share: tokens of the prompt that entered each layer, summed, as a share of all tokens in all layers.
        extra: facts about the example (depth, length, …) and keyword arguments of the metric.
    """

    task: str
    example: Name
    prompt_sha256: str
    prompt_tokens: Annotated[int, Field(ge=1)]
    method: Name
    budget: RecordedBudget | None
    metric: Name
    protocol: Name
    prediction: str | None
    first_line: bool
    stop: list[str]
    references: list[str]
    score: Annotated[float, Field(ge=0, le=1)]
    kv_bytes: Annotated[int, Field(ge=1, le=2**53)]
    read_bytes: Annotated[int | None, Field(ge=1, le=2**53)] = None
    companion_bytes: Annotated[int, Field(ge=0, le=2**53)] = 0
    mean_budget: Annotated[float, Field(gt=0)]
    prefill_factor: Annotated[float, Field(ge=1)] = 1.0
    prefill_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    extra: dict[str, Any] = {}

    @property
    def label(self) -> str:
        """Method and budget in one word; see `label`."""
        return label(self.method, self.budget)


#: Records of one example by label of the method.
ByMethod = dict[str, Record]


@dataclass
class Records:
    """An evaluation's settings, and what is on record: by task and example, then by label of the method."""

    settings: Settings
    examples: dict[tuple[str, str], ByMethod] = field(default_factory=dict)

    @cached_property
    def named(self) -> dict[str, set[str]]:
        """Names of the examples that the settings speak of, by task."""
        return {task: set(each.examples) for task, each in self.settings.tasks.items()}

    def complete(self, task: str) -> list[ByMethod]:
        """The examples of a task that all methods are done with, in the order of the settings."""
        rows = [self.examples.get((task, name), {}) for name in self.settings.tasks[task].examples]
        return [by_method for by_method in rows if len(by_method) == len(self.settings.methods)]

    def warn_unfinished(self, path: object, because: str) -> None:
        """Warn of tasks that were not evaluated to their end; `because` says why that matters."""
        for task, settings in self.settings.tasks.items():
            done, asked = len(self.complete(task)), len(settings.examples)
            if done < asked:
                logger.warning("%s has %d of %d examples of %s; %s", path, done, asked, task, because)

    def put(self, record: Record) -> None:
        """Add a record, or let the one that is there stand."""
        self.examples.setdefault((record.task, record.example), {}).setdefault(record.label, record)


class RecordLog:
    """The records of an evaluation that is going on, in memory and, where there is a path, in a file. Use `open`."""

    def __init__(self, records: Records, path: Path | None = None, undo: contextlib.ExitStack | None = None):
        self.records = records
        self._path, self._undo = path, undo or contextlib.ExitStack()
        self._file = -1
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, settings: Settings) -> RecordLog:
        """Begin a file of records, or continue the one that is there. No other process can until it is closed.

        Args:
            path: of the file; missing folders are made. None keeps the records in memory.
            settings: of the evaluation, which a file that is continued must share.

        Raises:
            UsageError: the file is not one of records, has other settings, is in use, or cannot be written there.
            RunError: the disk is full, or fails.
        """
        if path is None:
            return cls(Records(settings))
        with contextlib.ExitStack() as undo, _reporting(path, opening=True):
            target = Path(os.path.realpath(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                claim = FileClaim(target.with_name(f"{target.name}.lock"))
            except ClaimedError as owner:
                raise UsageError(
                    f"{path} is in use by another evaluation, {owner}; wait for it, or give another --records"
                ) from None
            undo.callback(claim.release)
            whole, records = _recorded(path, target)
            if records is not None:
                _check_settings(path, records.settings, settings)
            log = cls(records or Records(settings), Path(path))
            log._file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
            undo.callback(os.close, log._file)
            os.ftruncate(log._file, whole)
            if records is None:
                log._append([{"format": FORMAT, "settings": settings.model_dump()}])
            log._undo = undo.pop_all()
            return log

    def has(self, task: str, example: str) -> bool:
        """True if all methods are done with an example."""
        return len(self.records.examples.get((task, example), {})) == len(self.records.settings.methods)

    def add(self, records: Sequence[Record]) -> None:
        """Put records on record that are not yet, unless the log is closed. May be called from any thread.

        Raises:
            RunError: they cannot be written; what was recorded before is kept.
        """
        with self._lock:
            if self._closed:
                return
            recorded = self.records.examples
            fresh = [each for each in records if each.label not in recorded.get((each.task, each.example), {})]
            if self._path is not None and fresh:
                with _reporting(self._path):
                    self._append(record.model_dump() for record in fresh)
            for record in fresh:
                self.records.put(record)

    def close(self) -> None:
        """Let go of the file, so that others may open it."""
        with self._lock:
            self._closed = True
            self._undo.close()

    def _append(self, lines: Iterable[dict[str, Any]]) -> None:
        # All at once, so that a program that is killed leaves at most one line incomplete. Halves of characters, which
        # UTF-8 cannot hold, become JSON's escapes.
        texts = [json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines]
        data = "".join(texts).encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(self._file, data) :]


def label(method: str, budget: int | str | None) -> str:
    """A method at a budget in one word: ``snapkv@64``, ``snapkv@10%``; the full cache has no budget."""
    return method if budget is None else f"{method}@{budget}"


def metrics_of(records: Iterable[Record]) -> str:
    """The metric that scored the records: where there are several, their names joined with ``+``."""
    return "+".join(sorted({record.metric for record in records}))


def sha256(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8, hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def prompt_sha256(example: Example) -> str:
    """Return the SHA-256 of an example's whole prompt, the question included."""
    return sha256(example.prompt + example.later)


def prompt_digest(example: Example) -> str:
    """Return the name of an example in a profile whose search saw it."""
    return digest_of(prompt_sha256(example))


def seen_by(profile: BudgetProfile | None) -> set[str]:
    """Return the `prompt_digest` of each example that a profile was evolved or chosen on, as far as it says so."""
    return set() if profile is None else set(profile.search.get("seen") or ())


def warn_of_seen(label: str, seen: int, examples: int, task: str) -> None:
    """Warn that a profile was evolved or chosen on some of the examples that it is judged by."""
    logger.warning("%s was evolved or chosen on %d of the %d examples of %s", label, seen, examples, task)


def digest_of(prompt: str) -> str:
    """Return the `prompt_digest` of an example, given its `prompt_sha256`: the first 16 digits."""
    return prompt[:16]


def versions() -> dict[str, str]:
    """Return the versions of what computes the scores."""
    import torch
    import transformers

    return {"evolkv": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def read_records(path: str | os.PathLike[str]) -> Records:
    """Read a file of records, which may be in use, and change nothing.

    Raises:
        UsageError: it cannot be read, is not a file of records, or a line of it is damaged.
    """
    if not Path(path).exists():
        raise UsageError(f"{path}: no such file; give a file that evolkv eval --records wrote")
    try:
        _, records = _recorded(path, Path(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    if records is None:
        raise UsageError(f"{path}: no records in this file; expected what evolkv eval --records writes")
    return records


def _recorded(path: str | os.PathLike[str], target: Path) -> tuple[int, Records | None]:
    """Bytes of whole lines, and what they hold: None for a file that is missing, empty or was not begun properly."""
    if not target.exists():
        return 0, None
    if not target.is_file():
        raise UsageError(f"{path}: not a regular file; give the name of a file of records")
    whole = 0
    records: Records | None = None
    with target.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                if records is None and not (line.startswith(_START) or _START.startswith(line)):
                    raise _not_records(path)
                break
            whole += len(line)
            if records is None:
                records = Records(_header(path, line))
            else:
                _take(f"{path} line {number}", line, records)
    return whole, records


def _header(path: str | os.PathLike[str], line: bytes) -> Settings:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        raise _not_records(path) from None
    form = header.get("format") if isinstance(header, dict) else None
    if isinstance(form, str) and form.startswith("evolkv.records/") and form != FORMAT:
        raise UsageError(f"{path}: has the format {form[:80]!r}, this EvolKV reads {FORMAT!r}; update EvolKV")
    if form != FORMAT:
        raise _not_records(path)
    settings: Settings = checked(Settings, f"{path} line 1: settings", header.get("settings"))
    return settings


def _take(where: str, line: bytes, records: Records) -> None:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error}); delete the line, and its example is evaluated again") from None
    record: Record = checked(Record, where, data)
    settings = records.settings
    if record.example not in records.named.get(record.task, ()):
        raise UsageError(f"{where}: example {record.example!r} of {record.task!r} is not among those of the header")
    if record.label not in settings.methods:
        raise UsageError(f"{where}: method {record.label!r} is not among those of the header")
    before = records.examples.get((record.task, record.example), {}).get(record.label)
    if before is not None and before != record:
        raise UsageError(f"{where}: {record.label} on {record.example} was on record before, and not the same")
    records.put(record)


def _not_records(path: str | os.PathLike[str]) -> UsageError:
    return UsageError(f"{path}: not a file of records; expected what evolkv eval --records writes, or another name")


def _check_settings(path: str | os.PathLike[str], before: Settings, now: Settings) -> None:
    different = differences(before.model_dump(), now.model_dump(), "the records have", whole=("methods", "tasks"))
    if different:
        more = f"; and {len(different) - _MOST_DIFFERENCES} more" if len(different) > _MOST_DIFFERENCES else ""
        raise UsageError(
            f"{path} was begun with other settings ({'; '.join(different[:_MOST_DIFFERENCES])}{more}); use the same "
            "settings to continue it, or give another --records, or delete it to begin anew"
        )


@contextlib.contextmanager
def _reporting(path: str | os.PathLike[str], opening: bool = False) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"records {path} cannot be written: {error.strerror or error}"
        # A file that cannot be opened is a wrong path, unless the disk is at fault.
        if opening and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise UsageError(f"{message}; give another path with --records") from None
        raise RunError(f"{message}; what was recorded before is kept") from None
