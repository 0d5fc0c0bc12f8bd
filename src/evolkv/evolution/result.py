"""The result of a search."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from evolkv.profile import BudgetProfile

FORMAT = "evolkv.search/1"
#: What stopped a search.
TIME_LIMIT = "time limit"


@dataclass(frozen=True)
class Evaluation:
    """One candidate on the training examples.

    Args:
        budgets: ``L × H`` ints.
        fitness: what evolution maximises.
        score: mean metric over the training examples it was scored on.
        cache_score: how well the budgets meet the target memory.
        generation: number of the generation, from 0.
        scores: metric on each training example; None for those it was not scored on.
        seconds: its share of the time that scoring its generation took.
        slope: of a step of a descent, how the loss changes with each budget, ``L × H`` (``L × 1`` of layers).
            Its scores are those under soft cuts, which cannot be compared with others.
    """

    budgets: list[list[int]]
    fitness: float
    score: float
    cache_score: float
    generation: int
    scores: list[float | None] | None = None
    seconds: float = 0.0
    slope: list[list[float]] | None = None


@dataclass(frozen=True)
class Validated:
    """One allocation on the validation examples.

    Args:
        name: "best" or "mean" of the search, "gradient", "expanded from …" of one at another budget, "lukv", the
            heuristic "uniform" or "pyramid", or "start", the profile that the search started from.
        evolved: whether it comes from the search.
        budgets: ``L × H`` ints, at exactly the target total.
        score: mean metric over the validation examples.
        ci95: 95 % interval of the score.
        n: number of validation examples.
        scores: the metric on each of them.
        retained: where scores are balanced, and so relative to uniform budgets under the same selector: the mean over
            the examples of the plain score as a share of the full cache's, at most 1. By it selectors are compared.
    """

    name: str
    evolved: bool
    budgets: list[list[int]]
    score: float
    ci95: tuple[float, float]
    n: int
    scores: list[float] = field(default_factory=list)
    retained: float | None = None


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        profile: the allocation chosen on the validation examples (after an interruption: the last choice on record, or
            else what evolution had come to).
        history: every evaluated candidate, in order of evaluation.
        validation: the allocations that stood for choice, best first; after an interruption those of the last choice on
            record, if there is one.
        best: the candidate that evolution put forward.
        chosen: name of the one chosen.
        improved: whether an evolved allocation beat every heuristic on the validation examples.
        evaluations: number of candidates evaluated.
        seconds: wall-clock time of the whole search; of one of a curve's, of evolving at its budget.
        interrupted: whether the search was stopped before its end.
        stopped: "time limit" if that ended the search, which then chose among what it had come to; else None.
        settings: task, strategy, seed, … as the profile records them.
        kept: which parts of one validation prompt the profile keeps; see `evolkv.evolution.kept.kept_positions`. None
            after an interruption.
        train: the chosen allocation on all training examples: ``score, n``. None without a choice, and in studies from
            before it was recorded.
        descent: the steps of the gradient start, in order, as `history`; their scores are those under soft cuts.
        rivals: of a search under several selectors, one row for each: ``selector, chosen, score`` (on the validation
            examples; None after an interruption)``, evaluations, seconds``. `evaluations` and `history` are those of
            the winner alone.
    """

    profile: BudgetProfile
    history: list[dict[str, Any]] = field(repr=False)
    validation: list[dict[str, Any]] = field(repr=False)
    best: dict[str, Any] = field(repr=False)
    chosen: str
    improved: bool
    evaluations: int
    seconds: float
    interrupted: bool
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    stopped: str | None = None
    kept: dict[str, Any] | None = field(default=None, repr=False)
    descent: list[dict[str, Any]] = field(default_factory=list, repr=False)
    rivals: list[dict[str, Any]] = field(default_factory=list)
    train: dict[str, Any] | None = None

    @property
    def gap(self) -> float | None:
        """Return the chosen allocation's score on the training examples minus that in validation; None without."""
        if self.train is None or not self.validation:
            return None
        return float(self.train["score"] - self.validation[0]["score"])

    def out_of_time(self) -> SearchResult:
        """Return the result as one of a search that the time limit ended."""
        profile = replace(self.profile, search={**self.profile.search, "stopped": TIME_LIMIT})
        return replace(self, profile=profile, settings={**self.settings, "stopped": TIME_LIMIT}, stopped=TIME_LIMIT)

    def followed_by(self, later: SearchResult) -> SearchResult:
        """Return the result of a search in two parts; of the second only the candidates, if it has not chosen."""
        if later.validation:
            return later
        counts = {name: later.settings[name] for name in ("evaluations", "example_evaluations")}
        settings = {**self.settings, **counts}
        return replace(self, history=later.history, evaluations=later.evaluations, settings=settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a ``--json`` file."""
        return {
            "format": FORMAT,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "stopped": self.stopped,
            "chosen": self.chosen,
            "improved": self.improved,
            "best": self.best,
            "settings": self.settings,
            "profile": self.profile.to_dict(),
            "train": self.train,
            "gap": self.gap,
            "kept": self.kept,
            "rivals": self.rivals,
            "descent": self.descent,
            "history": self.history,
            "validation": self.validation,
        }


def as_rows(entries: list[Any]) -> list[dict[str, Any]]:
    """Return dataclasses as plain dictionaries that JSON can hold; without `retained` where that says nothing."""
    rows = [asdict(entry) for entry in entries]
    return [{key: value for key, value in row.items() if key != "retained" or value is not None} for row in rows]


def as_lists(budgets: np.ndarray) -> list[list[int]]:
    """Return a budgets matrix as lists of ints."""
    return [[int(value) for value in row] for row in budgets]


def public_row(entry: Evaluation) -> dict[str, Any]:
    """Return a history entry without its time, which no two runs have in common, and without its slope."""
    return {key: value for key, value in asdict(entry).items() if key not in ("seconds", "slope")}
