"""The durable record of a search: a study in an Optuna storage, which a killed search continues from.

One Optuna trial is one generation, written in one transaction; see `evolkv.evolution.trials`. The study's own attribute
"evolkv" holds the format and the settings; the others are facts by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from evolkv.claims import ClaimedError, FileClaim
from evolkv.errors import StudyError
from evolkv.evolution.failures import reporting
from evolkv.evolution.lease import LEASE, Lease
from evolkv.evolution.location import Location, check_file, locate
from evolkv.evolution.result import Evaluation
from evolkv.evolution.storage import close_storage, open_storage
from evolkv.evolution.trials import budget_span, stages_of, to_trial
from evolkv.registry import unknown_name
from evolkv.schemas import differences
from evolkv.selectors import SELECTORS

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study._frozen import FrozenStudy

FORMAT = "evolkv.study/1"
_HEADER = "evolkv"
#: Share of the time of scoring that recording may take and still spend more, on parameters.
_AFFORDABLE = 0.01


@dataclass(frozen=True)
class StudyRecord:
    """The content of a study.

    Args:
        name: of the study.
        storage: URL of its storage, without a password.
        settings: of the search, as plain JSON values.
        facts: what else was put on record, by name.
        stages: the recorded generations of each stage, in order.
    """

    name: str
    storage: str
    settings: dict[str, Any]
    facts: dict[str, Any]
    stages: dict[str, list[list[Evaluation]]]


class Study:
    """A study that this process records to, and no other does until it is closed. Make one with `open`."""

    def __init__(
        self,
        location: Location,
        name: str,
        storage: BaseStorage,
        study_id: int,
        settings: Mapping[str, Any],
        claim: FileClaim | Lease,
        undo: contextlib.ExitStack,
    ):
        self.name = name
        self._span = budget_span(settings)
        self._location, self._storage, self._study_id = location, storage, study_id
        self._claim, self._undo = claim, undo
        attributes = storage.get_study_user_attrs(study_id)
        self._facts = _facts(attributes)
        self._stages = stages_of(name, storage.get_all_trials(study_id, deepcopy=False))
        #: Seconds that this process has spent on recording, and on scoring what it recorded.
        self._recording = self._scoring = 0.0
        self._best = {
            stage: max(entry.fitness for generation in generations for entry in generation)
            for stage, generations in self._stages.items()
        }

    @classmethod
    def open(cls, storage: str | os.PathLike[str], name: str, settings: Mapping[str, Any]) -> Study:
        """Begin a study, or continue the one of that name.

        Args:
            storage: see `evolkv.evolution.location.locate`. A missing file is made, with its folders.
            name: of the study; one storage holds any number.
            settings: plain JSON values that a continued search must share. A study without a generation takes new ones.

        Raises:
            StudyError: the study was begun with other settings, is in use by another process, or is none of ours;
                or the storage is not one.
            RunError: the storage is full, read-only or out of reach.
        """
        location = locate(storage)
        if not name or len(name) > 512 or not name.isprintable():
            raise StudyError(f"the study's name is {name!r}; expected 1 to 512 printable characters")
        header = {"format": FORMAT, "settings": json.loads(json.dumps(settings, allow_nan=False))}
        with contextlib.ExitStack() as undo, reporting(location, "written to"):
            claim: FileClaim | Lease
            if location.path is not None:
                check_file(location, exists=False)
                claim = _claim_file(location, name)
                undo.callback(claim.release)
            opened = open_storage(location, create=True)
            undo.callback(close_storage, opened)
            study_id = _find_or_create(opened, location, name)
            if location.path is None:
                try:
                    claim = Lease(opened, study_id)
                except ClaimedError as owner:
                    raise _in_use(location, name, owner) from None
                undo.callback(claim.release)
            recorded = opened.get_study_user_attrs(study_id).get(_HEADER)
            if recorded is not None:
                _check_header(name, location, recorded)
            if recorded is not None and opened.get_n_trials(study_id):
                different = differences(recorded["settings"], header["settings"], "the study has")
                if different:
                    raise StudyError(
                        f"study {name!r} in {location} was begun with other settings ({'; '.join(different)}); "
                        "use the same settings to continue it, or another --study or --storage to begin anew"
                    )
            elif recorded != header:
                # Stopped before its first generation, it holds nothing that other settings would contradict.
                opened.set_study_user_attr(study_id, _HEADER, header)
            return cls(location, name, opened, study_id, header["settings"], claim, undo.pop_all())

    @property
    def begun(self) -> bool:
        """True if any generation is on record."""
        return bool(self._stages)

    def generations(self, stage: str) -> list[list[Evaluation]]:
        """Return the recorded generations of a stage, from the first, in order."""
        return [list(generation) for generation in self._stages.get(stage, [])]

    def record(self, stage: str, generation: int, evaluations: Sequence[Evaluation]) -> None:
        """Put one generation on record, whole or not at all. One that is on record already stays as it is.

        Args:
            stage: which part of the search it belongs to.
            generation: its number within the stage, from 0 and without gaps.
            evaluations: its candidates, in order of evaluation.

        Raises:
            RunError: it could not be written; what was recorded before is kept.
            StudyError: another process has taken the study over.
        """
        recorded = self._stages.get(stage, [])
        if generation < len(recorded):
            return
        if generation > len(recorded):
            raise ValueError(f"generation {generation} of stage {stage!r} comes after {len(recorded)} recorded ones")
        fittest = max(evaluations, key=lambda entry: entry.fitness)
        improved = stage not in self._best or fittest.fitness > self._best[stage]
        self._scoring += sum(entry.seconds for entry in evaluations)
        affordable = self._recording <= _AFFORDABLE * self._scoring
        started = time.perf_counter()
        trial = to_trial(stage, generation, evaluations, fittest, improved and affordable, self._span)
        with self._writing():
            self._storage.create_new_trial(self._study_id, trial)
        self._recording += time.perf_counter() - started
        self._stages.setdefault(stage, []).append(list(evaluations))
        if improved:
            self._best[stage] = fittest.fitness

    def get(self, key: str, default: Any = None) -> Any:
        """Return the fact put on record under a name, or `default`."""
        return self._facts.get(key, default)

    def put(self, key: str, value: Any) -> None:
        """Put a fact on record: JSON under a name. It replaces what was there.

        Raises:
            RunError: it could not be written.
            StudyError: another process has taken the study over.
        """
        if key in (_HEADER, LEASE):
            raise ValueError(f"{key!r} is the study's own")
        # What a reader will get: tuples become lists.
        plain = json.loads(json.dumps(value, allow_nan=False))
        with self._writing():
            self._storage.set_study_user_attr(self._study_id, key, plain)
        self._facts[key] = plain

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with reporting(self._location, "written to"):
            try:
                self._claim.check()
            except ClaimedError as owner:
                raise _in_use(self._location, self.name, owner) from None
            yield

    def close(self) -> None:
        """Let go of the study, so that others may open it."""
        self._undo.close()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_studies(storage: str | os.PathLike[str], name: str | None = None) -> list[StudyRecord]:
    """Read a study, which may be in use, and change nothing.

    Args:
        storage: see `evolkv.evolution.location.locate`.
        name: of the study. Default: the only one of ours there.

    Returns:
        The study; of a search under several selectors the studies of all of them, ``NAME/SELECTOR``.

    Raises:
        StudyError: there is no such study, there are several and no name, or the file is not what it should be.
        RunError: the storage is out of reach.
    """
    location = locate(storage)
    with reporting(location, "read"), contextlib.ExitStack() as undo:
        check_file(location, exists=True)
        opened = open_storage(location, create=False)
        undo.callback(close_storage, opened)
        every = {study.study_name: study for study in opened.get_all_studies()}
        ours = [key for key, study in every.items() if _HEADER in study.user_attrs]
        if several := _rivals(ours, name):
            return [_record(every[key], location, opened) for key in several]
        if name is None:
            if not ours:
                raise StudyError(f"{location} holds no study of EvolKV; give the storage of a search")
            if len(ours) > 1:
                raise StudyError(
                    f"{location} holds {len(ours)} studies; give the name of one: {', '.join(sorted(ours))}"
                )
            name = ours[0]
        elif name not in ours:
            if name in every:
                raise _not_ours(name, location)
            raise StudyError(f"{location}: {unknown_name('study', name, ours)}")
        return [_record(every[name], location, opened)]


def _rivals(ours: list[str], name: str | None) -> list[str]:
    """Return the studies of one search under several selectors, of that name or of the only one there is."""
    searches = {} if name in ours else {key: _search_of(key) for key in ours}
    if name is None and len({*searches.values()}) > 1:
        return []
    return [key for key, search in searches.items() if search is not None and name in (None, search)]


def _search_of(key: str) -> str | None:
    """Return the name of the search that a study ``NAME/SELECTOR`` belongs to; None of one such as ``team/run``."""
    parts = key.split("/")
    ends = (i for i in range(1, len(parts)) if parts[i].partition(":")[0] in SELECTORS)
    return next(("/".join(parts[:i]) for i in ends), None)


def _record(study: FrozenStudy, location: Location, storage: BaseStorage) -> StudyRecord:
    header = study.user_attrs[_HEADER]
    _check_header(study.study_name, location, header)
    return StudyRecord(
        study.study_name,
        location.safe_url,
        header["settings"],
        _facts(study.user_attrs),
        stages_of(study.study_name, storage.get_all_trials(study._study_id, deepcopy=False)),
    )


def _claim_file(location: Location, name: str) -> FileClaim:
    """Claim a study in a local file, whose folder is made if it is missing; others in the same file are free."""
    path = Path(os.path.realpath(cast(Path, location.path)))
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    try:
        return FileClaim(path.with_name(f"{path.name}.{digest}.lock"))
    except ClaimedError as owner:
        raise _in_use(location, name, owner) from None


def _in_use(location: Location, name: str, owner: ClaimedError) -> StudyError:
    return StudyError(
        f"study {name!r} in {location} is in use by {owner}; wait until it ends, or give another --study or --storage"
    )


def _find_or_create(storage: BaseStorage, location: Location, name: str) -> int:
    from optuna.exceptions import DuplicatedStudyError
    from optuna.study import StudyDirection

    try:
        study_id = storage.get_study_id_from_name(name)
    except KeyError:
        try:
            return storage.create_new_study([StudyDirection.MAXIMIZE], name)
        except DuplicatedStudyError:
            study_id = storage.get_study_id_from_name(name)
    attributes = storage.get_study_user_attrs(study_id)
    # A study of ours that was killed before its settings were written is empty, and counts as new.
    empty = not set(attributes) - {LEASE} and not storage.get_n_trials(study_id)
    if _HEADER not in attributes and not (
        empty and storage.get_study_directions(study_id) == [StudyDirection.MAXIMIZE]
    ):
        raise _not_ours(name, location)
    return study_id


def _not_ours(name: str, location: Location) -> StudyError:
    return StudyError(f"study {name!r} in {location} is not a study of EvolKV; give another --study")


def _facts(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if key not in (_HEADER, LEASE)}


def _check_header(name: str, location: Location, header: Any) -> None:
    form = header.get("format") if isinstance(header, dict) else None
    if form == FORMAT and isinstance(header.get("settings"), dict):
        return
    if isinstance(form, str) and form.startswith("evolkv.study/") and form != FORMAT:
        raise StudyError(
            f"study {name!r} in {location} has the format {form!r}, this EvolKV reads {FORMAT!r}; update EvolKV"
        )
    raise StudyError(f"study {name!r} in {location} is damaged: its header is not that of {FORMAT!r}")
