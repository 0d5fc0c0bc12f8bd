"""Strategies `start` and `gradient`: the allocation that a search starts from, and nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from evolkv.evolution.strategies.base import Budgets, Settings, Strategy


class StartOnly(Strategy):
    """Take what the search starts from, whatever else would do better: an allocation as it was published, for instance.

    Args:
        shape: (L,) for layer budgets or (L, H) for head budgets.
        budget: c, the mean budget, in cache entries.
        floor: the least an entry may get, an int or an array that broadcasts to `shape`.
        ceiling: the most an entry may get, likewise.
        x0: the candidate, of shape `shape`; default: uniform. It is brought to the total first.
        sigma: not used, nor are the others.
        population: see `sigma`.
        seed: see `sigma`.

    Raises:
        BudgetError: for bounds that leave the budget out of reach.
    """

    starts_anywhere = True
    searches = False
    default_sigma = (0.5, 0.7)

    def __init__(
        self,
        shape: int | tuple[int, ...] = (32,),
        budget: int = 128,
        floor: ArrayLike = 33,
        ceiling: ArrayLike = 1600,
        x0: ArrayLike | None = None,
        sigma: float = 0.5,
        population: int | None = None,
        seed: int = 0,
    ):
        super().__init__(shape, budget, floor, ceiling, seed)
        self._start = self._projected(np.ones(self.shape) if x0 is None else np.asarray(x0))

    @classmethod
    def smallest(cls, config: Settings, shape: tuple[int, ...]) -> int:
        """Return 1."""
        return 1

    @classmethod
    def default_evaluations(cls, config: Settings, shape: tuple[int, ...], searches: int) -> int:
        """Return 1."""
        return 1

    def _propose(self) -> list[Budgets]:
        return [self._start]

    def _learn(self, fitness: list[float]) -> None:
        self.done = True


class GradientOnly(StartOnly):
    """Take what the gradient start comes to, or a heuristic where that does better on the validation examples."""
