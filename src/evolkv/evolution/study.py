"""The durable record of a search: a study in an Optuna storage, which a killed search continues from.

One Optuna trial is one generation, written in one transaction:

- value: the highest fitness of its candidates (to be maximised);
- params: where that is the highest of its stage so far, the budgets of that candidate, as means per layer, as long as
  recording has taken no more than a hundredth of what scoring has (each parameter is a row, and a slow one);
- user attributes "stage", "generation", and "candidates_000", …: lists of candidates, as many as go into one
  attribute; the number is that of the first.

The study's own attribute "evolkv" holds the format and the settings; the others are facts by name.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from evolkv.errors import StudyError
from evolkv.evolution.result import Evaluation
from evolkv.evolution.storage import (
    LEASE,
    FileClaim,
    Lease,
    Location,
    check_file,
    close_storage,
    locate,
    open_storage,
    reporting,
)
from evolkv.registry import unknown_name

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study._frozen import FrozenStudy
    from optuna.trial import FrozenTrial

FORMAT = "evolkv.study/1"
_HEADER = "evolkv"
_CANDIDATES = "candidates_"
#: Bytes of one attribute's JSON, which is ASCII. MySQL's TEXT holds 65,535.
_ATTRIBUTE_BYTES = 60_000
#: Share of the time of scoring that recording may take and still spend more, on parameters.
_AFFORDABLE = 0.01
#: No budget is larger.
_MAX_BUDGET = 2**31 - 1


class _Candidate(BaseModel):
    """The types of one recorded candidate; a storage is a file that anyone may have written."""

    model_config = ConfigDict(strict=True, extra="ignore")

    budgets: list[list[int]]
    fitness: float
    score: float
    cache_score: float
    scores: list[float | None] | None
    seconds: float


_CANDIDATE_LIST = TypeAdapter(list[_Candidate])


class _Written(list[Any]):
    """A list that is written once and never changed: Optuna need not copy it, which takes longer than writing it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Written:
        return self


@dataclass(frozen=True)
class StudyRecord:
    """What a study holds.

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
        self._span = _span(settings)
        self._location, self._storage, self._study_id = location, storage, study_id
        self._claim, self._undo = claim, undo
        attributes = storage.get_study_user_attrs(study_id)
        self._facts = _facts(attributes)
        self._stages = _stages(name, storage.get_all_trials(study_id, deepcopy=False))
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
            storage: see `storage_url`. A missing file is made, with its folders.
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
                claim = FileClaim(location, name)
                undo.callback(claim.release)
            opened = open_storage(location, create=True)
            undo.callback(close_storage, opened)
            study_id = _find_or_create(opened, location, name)
            if location.path is None:
                claim = Lease(opened, study_id, location, name)
                undo.callback(claim.release)
            found = opened.get_study_user_attrs(study_id).get(_HEADER)
            if found is not None:
                _check_header(name, location, found)
            if found is not None and opened.get_n_trials(study_id):
                _check_settings(name, location, found["settings"], header["settings"])
            elif found != header:
                # Stopped before its first generation, it holds nothing that other settings would contradict.
                opened.set_study_user_attr(study_id, _HEADER, header)
            return cls(location, name, opened, study_id, header["settings"], claim, undo.pop_all())

    @property
    def begun(self) -> bool:
        """Whether any generation is on record."""
        return bool(self._stages)

    def generations(self, stage: str) -> list[list[Evaluation]]:
        """The recorded generations of a stage, from the first, in order."""
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
        trial = _trial(stage, generation, evaluations, fittest, improved and affordable, self._span)
        with reporting(self._location, "written to"):
            self._claim.check()
            self._storage.create_new_trial(self._study_id, trial)
        self._recording += time.perf_counter() - started
        self._stages.setdefault(stage, []).append(list(evaluations))
        if improved:
            self._best[stage] = fittest.fitness

    def get(self, key: str, default: Any = None) -> Any:
        """The fact put on record under a name, or `default`."""
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
        with reporting(self._location, "written to"):
            self._claim.check()
            self._storage.set_study_user_attr(self._study_id, key, plain)
        self._facts[key] = plain

    def close(self) -> None:
        """Let go of the study, so that others may open it."""
        self._undo.close()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def storage_url(storage: str | os.PathLike[str]) -> str:
    """The URL of a storage that is given as a path or a URL.

    Args:
        storage: an Optuna storage URL (``sqlite:///PATH``, ``postgresql://…``, ``mysql://…``), ``journal:///PATH`` for
            an Optuna journal file, or the path of a file: a journal if it is one or, where there is none, if it ends
            in ``.log`` or ``.journal``; else SQLite. As with SQLAlchemy, a fourth slash begins an absolute path.

    Raises:
        StudyError: it is none of these.
    """
    return locate(storage).url


def read_study(storage_or_path: str | os.PathLike[str], name: str | None = None) -> StudyRecord:
    """Read a study, which may be in use, and change nothing.

    Args:
        storage_or_path: see `storage_url`.
        name: of the study. Default: the only one of ours there.

    Raises:
        StudyError: there is no such study, there are several and no name, or the file is not what it should be.
        RunError: the storage is out of reach.
    """
    return _read(storage_or_path, name, rivals=False)[0]


def read_studies(storage_or_path: str | os.PathLike[str], name: str | None = None) -> list[StudyRecord]:
    """As `read_study`, but of a search under several selectors the studies of all of them, ``NAME/SELECTOR``."""
    return _read(storage_or_path, name, rivals=True)


def _read(storage_or_path: str | os.PathLike[str], name: str | None, rivals: bool) -> list[StudyRecord]:
    location = locate(storage_or_path)
    with reporting(location, "read"), contextlib.ExitStack() as undo:
        check_file(location, exists=True)
        storage = open_storage(location, create=False)
        undo.callback(close_storage, storage)
        every = {study.study_name: study for study in storage.get_all_studies()}
        ours = [key for key, study in every.items() if _HEADER in study.user_attrs]
        if rivals and (several := _rivals(ours, name)):
            return [_record(every[key], location, storage) for key in several]
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
        return [_record(every[name], location, storage)]


def _rivals(ours: list[str], name: str | None) -> list[str]:
    """The studies of one search under several selectors, of that name or of the only one there is."""
    if name in ours:
        return []
    prefixes = {key.partition("/")[0] for key in ours} if name is None else {name}
    found = [key for key in ours if key.startswith(tuple(f"{prefix}/" for prefix in prefixes))]
    return found if name is not None or (len(prefixes) == 1 and len(found) == len(ours)) else []


def _record(study: FrozenStudy, location: Location, storage: BaseStorage) -> StudyRecord:
    header = study.user_attrs[_HEADER]
    _check_header(study.study_name, location, header)
    return StudyRecord(
        study.study_name,
        location.safe_url,
        header["settings"],
        _facts(study.user_attrs),
        _stages(study.study_name, storage.get_all_trials(study._study_id, deepcopy=False)),
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
    # One of ours that was killed before it had its settings is empty, and new.
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


def _check_settings(name: str, location: Location, before: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = dict(_flat(before)), dict(_flat(now))
    differences = [
        f"{key}: the study has {_shown(old, key)}, now {_shown(new, key)}"
        for key in {**old, **new}
        if key not in old or key not in new or old[key] != new[key]
    ]
    if differences:
        raise StudyError(
            f"study {name!r} in {location} was begun with other settings ({'; '.join(differences)}); "
            "use the same settings to continue it, or another --study or --storage to begin anew"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _shown(settings: dict[str, Any], key: str) -> str:
    if key not in settings:
        return "nothing"
    text = json.dumps(settings[key], ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def _span(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Least and largest budget of a search. Optuna's plots and analyses go by it, and want it the same throughout."""
    floor, ceiling = settings.get("least", settings.get("floor")), settings.get("ceiling")
    return (floor, ceiling) if isinstance(floor, int) and isinstance(ceiling, int) else (0, _MAX_BUDGET)


def _trial(
    stage: str,
    generation: int,
    evaluations: Sequence[Evaluation],
    fittest: Evaluation,
    improved: bool,
    span: tuple[int, int],
) -> FrozenTrial:
    from optuna.distributions import IntDistribution
    from optuna.trial import TrialState, create_trial

    attributes: dict[str, Any] = {"stage": stage, "generation": generation}
    room = 0
    for i, entry in enumerate(evaluations):
        row = {
            "budgets": entry.budgets,
            "fitness": entry.fitness,
            "score": entry.score,
            "cache_score": entry.cache_score,
            "scores": entry.scores,
            "seconds": entry.seconds,
        }
        size = len(json.dumps(row, allow_nan=False)) + len(", ")
        if size > room:
            part = attributes[f"{_CANDIDATES}{i:03d}"] = _Written()
            room = _ATTRIBUTE_BYTES
        part.append(row)
        room -= size
    params: dict[str, int] = {}
    # Each costs a database three statements; so only what beats all before it has them.
    if improved:
        params = {f"layer_{layer:02d}": round(sum(row) / len(row)) for layer, row in enumerate(fittest.budgets)}
    low, high = min([span[0], *params.values()]), max([span[1], *params.values()])
    trial = create_trial(
        state=TrialState.COMPLETE,
        value=fittest.fitness,
        params=params,
        distributions=dict.fromkeys(params, IntDistribution(low, high)),
        user_attrs=attributes,
    )
    if trial.datetime_complete is not None:
        trial.datetime_start = trial.datetime_complete - timedelta(seconds=sum(entry.seconds for entry in evaluations))
    return trial


def _stages(name: str, trials: Iterable[FrozenTrial]) -> dict[str, list[list[Evaluation]]]:
    """The generations of each stage up to the first that is missing; of one recorded twice, the first."""
    found: dict[str, dict[int, list[Evaluation]]] = {}
    for trial in trials:
        stage, generation = trial.user_attrs.get("stage"), trial.user_attrs.get("generation")
        if not trial.state.is_finished() or not isinstance(stage, str) or not isinstance(generation, int):
            continue
        generations = found.setdefault(stage, {})
        if generation not in generations:
            generations[generation] = _evaluations(name, trial, generation)
    return {
        stage: [generations[i] for i in itertools.takewhile(generations.__contains__, itertools.count())]
        for stage, generations in found.items()
    }


def _evaluations(name: str, trial: FrozenTrial, generation: int) -> list[Evaluation]:
    # By number: the names of a population above a thousand are of unequal length.
    keys = [key for key in trial.user_attrs if key.startswith(_CANDIDATES)]
    keys.sort(key=lambda key: (len(key), key))
    try:
        rows = [row for key in keys for row in _CANDIDATE_LIST.validate_python(trial.user_attrs[key])]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StudyError(
            f"study {name!r} is damaged: trial {trial.number}, candidate {where}: {first['msg'].lower()}"
        ) from None
    return [
        Evaluation(row.budgets, row.fitness, row.score, row.cache_score, generation, row.scores, row.seconds)
        for row in rows
    ]
