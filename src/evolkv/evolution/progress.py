"""The progress of a search, as it reports it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["prefill", "gradient", "search", "validation"]


@dataclass(frozen=True)
class SearchProgress:
    """The progress of a search.

    Args:
        stage: what it is doing.
        done: steps done in this stage (examples, steps, candidates, examples).
        total: steps of this stage.
        best: highest fitness so far, or None. Where generations are scored on different examples: that of the
            distribution's mean, each example counted as last seen.
        score: score of the candidate that `best` belongs to, or None.
        budgets: that candidate, a row of KV heads per layer, or None.
        fitness: highest fitness in the latest generation, or None.
        generation: the latest generation, or None.
        budget: the target, where several are searched.
        selector: the one that the search runs under, where there are several.
    """

    stage: Stage
    done: int
    total: int
    best: float | None = None
    score: float | None = None
    budgets: list[list[int]] | None = None
    fitness: float | None = None
    generation: int | None = None
    budget: int | None = None
    selector: str | None = None


OnProgress = Callable[[SearchProgress], None]
