"""A generation as an Optuna trial, and back.

- value: the highest fitness of its candidates (to be maximised); a step of a descent has none, and is "pruned";
- params: where that is the highest of its stage so far, the budgets of that candidate, as means per layer, as long as
  recording has taken no more than a hundredth of what scoring has (each parameter is a row, and a slow one);
- user attributes "stage", "generation", and "candidates_000", …: lists of candidates, as many as go into one
  attribute; the number is that of the first.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from evolkv.errors import StudyError
from evolkv.evolution.result import Evaluation
from evolkv.schemas import Schema, first_error

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_CANDIDATES = "candidates_"
#: Bytes of one attribute's JSON, which is ASCII. MySQL's TEXT holds 65,535.
_ATTRIBUTE_BYTES = 60_000
#: No budget is larger.
_MAX_BUDGET = 2**31 - 1


class _Candidate(Schema):
    """One recorded candidate."""

    budgets: list[list[int]]
    fitness: float
    score: float
    cache_score: float
    scores: list[float | None] | None = None
    seconds: float
    slope: list[list[float]] | None = None


_CANDIDATE_LIST = TypeAdapter(list[_Candidate])


class _Written(list[Any]):
    """A list that is written once and never changed: Optuna need not copy it, which takes longer than writing it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Written:
        return self


def budget_span(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return least and largest budget of a search. Optuna's plots go by it, and want it the same throughout."""
    floor, ceiling = settings.get("least", settings.get("floor")), settings.get("ceiling")
    return (floor, ceiling) if isinstance(floor, int) and isinstance(ceiling, int) else (0, _MAX_BUDGET)


def to_trial(
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
        row = {key: value for key, value in vars(entry).items() if key != "generation" and value is not None}
        size = len(json.dumps(row, allow_nan=False)) + len(", ")
        if size > room:
            part = attributes[f"{_CANDIDATES}{i:03d}"] = _Written()
            room = _ATTRIBUTE_BYTES
        part.append(row)
        room -= size
    params: dict[str, int] = {}
    # The score of a step of a descent is that of soft cuts: Optuna must not take it for the best.
    soft = fittest.slope is not None
    # Each parameter costs a database three statements, so only a new best has them.
    if improved and not soft:
        params = {f"layer_{layer:02d}": round(sum(row) / len(row)) for layer, row in enumerate(fittest.budgets)}
    low, high = min([span[0], *params.values()]), max([span[1], *params.values()])
    trial = create_trial(
        state=TrialState.PRUNED if soft else TrialState.COMPLETE,
        value=None if soft else fittest.fitness,
        params=params,
        distributions=dict.fromkeys(params, IntDistribution(low, high)),
        user_attrs=attributes,
    )
    if trial.datetime_complete is not None:
        trial.datetime_start = trial.datetime_complete - timedelta(seconds=sum(entry.seconds for entry in evaluations))
    return trial


def stages_of(name: str, trials: Iterable[FrozenTrial]) -> dict[str, list[list[Evaluation]]]:
    """Return the generations of each stage up to the first that is missing; of one recorded twice, the first."""
    numbered: dict[str, dict[int, list[Evaluation]]] = {}
    for trial in trials:
        stage, generation = trial.user_attrs.get("stage"), trial.user_attrs.get("generation")
        if not trial.state.is_finished() or not isinstance(stage, str) or not isinstance(generation, int):
            continue
        generations = numbered.setdefault(stage, {})
        if generation not in generations:
            generations[generation] = _evaluations(name, trial, generation)
    return {
        stage: [generations[i] for i in itertools.takewhile(generations.__contains__, itertools.count())]
        for stage, generations in numbered.items()
    }


def _evaluations(name: str, trial: FrozenTrial, generation: int) -> list[Evaluation]:
    # By number: above a thousand candidates the names differ in length.
    keys = [key for key in trial.user_attrs if key.startswith(_CANDIDATES)]
    keys.sort(key=lambda key: (len(key), key))
    try:
        rows = [row for key in keys for row in _CANDIDATE_LIST.validate_python(trial.user_attrs[key])]
    except ValidationError as error:
        raise StudyError(f"study {name!r} is damaged: trial {trial.number}, candidates{first_error(error)}") from None
    return [
        Evaluation(row.budgets, row.fitness, row.score, row.cache_score, generation, row.scores, row.seconds, row.slope)
        for row in rows
    ]
