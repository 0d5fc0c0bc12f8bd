"""The records that a report reads, as they are checked: what others wrote is never trusted to be well formed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from evolkv.numbers import is_whole
from evolkv.profile_file import ProfileFile
from evolkv.schemas import Count, RecordedBudget, Schema

Share = Annotated[float, Field(ge=0, le=1)]
Budgets = Annotated[
    list[Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1, max_length=4096)]],
    Field(min_length=1, max_length=4096),
]


class _Scored(Schema):
    score: Share
    ci95: Annotated[list[Share], Field(min_length=2, max_length=2)]
    n: Annotated[int, Field(ge=1)]


class _Allocated(Schema):
    budgets: Budgets

    @field_validator("budgets")
    @classmethod
    def _rectangular(cls, budgets: list[list[int]]) -> list[list[int]]:
        if len({len(row) for row in budgets}) > 1:
            raise ValueError("rows of equal length, one per layer")
        return budgets


class Candidate(_Allocated):
    """One evaluated candidate; see `evolkv.evolution.result.Evaluation`."""

    fitness: float
    score: Share
    cache_score: float
    generation: Count
    scores: list[Share | None] | None = None


class Validated(_Allocated, _Scored):
    """One allocation on validation examples; see `evolkv.evolution.result.Validated`."""

    name: str
    evolved: bool
    scores: list[Share] = Field([])


class Answer(Schema):
    """An answer that stands in a prompt: its tokens, from `start` to before `end`, with the text around it."""

    start: Count
    end: Count
    text: str = ""


class Kept(Schema):
    """Prompt positions that are kept, for one example.

    `share` is ``L × bins``: of the tokens in a bin, the share that is kept, averaged over the layer's KV heads.
    `answers` are the places where the prompt says what the answer repeats.
    """

    example: str
    tokens: Annotated[int, Field(ge=1)]
    bin: Annotated[int, Field(ge=1)]
    share: Annotated[
        list[Annotated[list[Share], Field(min_length=1, max_length=65536)]], Field(min_length=1, max_length=4096)
    ]
    answers: Annotated[list[Answer], Field(max_length=16)] = Field([])

    @model_validator(mode="after")
    def _rectangular(self) -> Kept:
        bins = -(-self.tokens // self.bin)
        if any(len(row) != bins for row in self.share):
            raise ValueError(f"{bins} shares per layer, for {self.tokens} tokens in bins of {self.bin}")
        if any(not answer.start < answer.end <= self.tokens for answer in self.answers):
            raise ValueError(f"answers within its {self.tokens} tokens")
        return self


class Search(Schema):
    """One search: an ``evolkv.search/1`` file, or a stage of a study.

    `origin` is what it was read from; the searches of one curve or study share it. `rival` is the selector of one of
    several searches under different ones. `descent` are the steps of a gradient start.
    """

    evaluations: Count
    seconds: Annotated[float, Field(ge=0)] = 0.0
    interrupted: bool = False
    chosen: str = ""
    improved: bool = False
    settings: dict[str, Any] = Field({})
    history: list[Candidate] = Field([])
    descent: list[Candidate] = Field([])
    validation: list[Validated] = Field([])
    best: Candidate | None = None
    profile: ProfileFile | None = None
    kept: Kept | None = None
    stage: str = ""
    rival: str = ""
    origin: str = ""

    @field_validator("settings")
    @classmethod
    def _budgets_of_one_kind(cls, settings: dict[str, Any]) -> dict[str, Any]:
        budgets = settings.get("budgets", [])
        if not isinstance(budgets, list) or not all(map(is_whole, budgets)):
            raise ValueError("budgets that are a list of whole numbers")
        return settings

    @property
    def result(self) -> Validated | None:
        """The allocation that was chosen on the validation examples."""
        return next((entry for entry in self.validation if entry.name == self.chosen), None)

    @property
    def allocations(self) -> list[Validated]:
        """The allocations that stood for choice, each once; of several names of one, the chosen or first."""
        chosen = [entry for entry in self.validation if entry.name == self.chosen]
        once: list[Validated] = []
        for entry in chosen + self.validation:
            if all(entry.budgets != other.budgets for other in once):
                once.append(entry)
        return sorted(once, key=lambda entry: -entry.score)

    @property
    def rotating(self) -> bool:
        """True if generations were scored on a few of the training examples in turn."""
        return any(entry.scores and None in entry.scores for entry in self.history)

    @property
    def leader(self) -> Candidate | None:
        """The candidate that evolution puts forward, or would if it ended now."""
        if self.best is not None or not self.history:
            return self.best
        if not self.rotating:
            return max(self.history, key=lambda entry: entry.fitness)
        last = self.history[-1].generation
        return next(entry for entry in self.history if entry.generation == last)

    def course(self) -> list[tuple[int, float]]:
        """Return (candidates evaluated, score) for each change of the fittest so far.

        Scores on different examples cannot be compared. Where generations are scored on a few examples in turn, what
        is followed is the first candidate of each, the mean of the distribution, with each example as last seen.
        """
        if self.rotating:
            return course_in_turn(self.history)
        steps: list[tuple[int, float]] = []
        best = -math.inf
        for i, entry in enumerate(self.history, 1):
            if entry.fitness > best:
                best = entry.fitness
                steps.append((i, entry.score))
        return steps


def course_in_turn(entries: Sequence[Candidate]) -> list[tuple[int, float]]:
    """Return (candidates evaluated, score) after each generation: of its first, with each example as last seen."""
    steps: list[tuple[int, float]] = []
    seen: dict[int, float] = {}
    done = 0
    for _, members in groupby(entries, key=lambda entry: entry.generation):
        mean, *others = members
        done += 1 + len(others)
        seen |= {i: score for i, score in enumerate(mean.scores or []) if score is not None}
        steps.append((done, sum(seen.values()) / len(seen) if seen else mean.score))
    return steps


class _Measured(_Scored):
    metric: str
    kv_bytes: Annotated[float, Field(gt=0, le=2**63)]
    mean_budget: Annotated[float, Field(gt=0, le=2**53)]


class Row(_Measured):
    """A method at a budget on some examples: an entry of an ``evolkv.results/1`` file.

    `seen` is the number of examples that a profile was evolved or chosen on.
    """

    model: str
    task: str
    method: str
    budget: RecordedBudget | None = None
    seed: int | None = None
    protocol: str = ""
    read_bytes: Annotated[float | None, Field(gt=0, le=2**63)] = None
    resident_bytes: Annotated[float | None, Field(gt=0, le=2**63)] = None
    companion_bytes: Annotated[float, Field(ge=0, le=2**63)] = 0
    haystack: str = ""
    seen: Annotated[int, Field(ge=0)] = 0
    prefill_chunk: Count | None = None
    block_size: Count | None = None
    prefill_share: Share | None = None
    dtype: str = ""


class Point(_Measured):
    """One budget of a curve."""

    budget: RecordedBudget
    profile: str = ""
    source: str = "search"
    evaluations: Count | None = None
    on_front: bool = True


class Curve(Schema):
    """An ``evolkv.curve/1`` file: one profile per budget, and the searches that they come from."""

    points: Annotated[list[Point], Field(min_length=1)]
    searches: list[Search] = Field([])


class Results(Schema):
    interrupted: bool = False
    rows: Annotated[list[Row], Field(min_length=1)]


def mean_of(budgets: Sequence[Sequence[int]]) -> float:
    """Mean entries per KV head of an allocation."""
    return sum(map(sum, budgets)) / (len(budgets) * len(budgets[0]))
