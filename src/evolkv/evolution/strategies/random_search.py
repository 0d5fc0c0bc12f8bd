"""Strategy `random`: log-normal allocations at exactly the target memory, the baseline for the others."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from evolkv.evolution.strategies.base import (
    Budgets,
    Strategy,
    default_population,
    positive_number,
    whole_number,
)


class RandomSearch(Strategy):
    """Independent log-normal weights around uniform, each projected onto the exact total.

    The very first candidate is the uniform allocation itself. The search learns nothing from fitness, and is
    done only when the bounds leave a single allocation.

    Args:
        shape: (L,) for layer budgets or (L, H) for head budgets; an int means (L,).
        budget: c, the mean budget of every candidate, in cache entries.
        sigma: standard deviation of the logarithms of the weights.
        population: candidates per generation; default 4 + ⌊3 ln n⌋ for n entries.
        floor: the least an entry may get, an int or an array that broadcasts to `shape`.
        ceiling: the most an entry may get, likewise.
        seed: seed of the random numbers, not negative.

    Raises:
        UsageError: an argument out of its range (`BudgetError` for budget, floor and ceiling).
    """

    default_sigma = (1.0, 1.0)

    def __init__(
        self,
        shape: int | tuple[int, ...] = (32,),
        budget: int = 128,
        sigma: float = 1.0,
        population: int | None = None,
        floor: ArrayLike = 33,
        ceiling: ArrayLike = 1600,
        seed: int = 0,
    ):
        super().__init__(shape, budget, floor, ceiling, seed)
        self.sigma = positive_number("sigma", sigma)
        default = default_population(math.prod(self.shape))
        self.population = default if population is None else whole_number("population", population, 1)
        self._rng = np.random.default_rng(self.seed)

    def _propose(self) -> list[Budgets]:
        weights = np.exp(self.sigma * self._rng.standard_normal((self.population, *self.shape)))
        if self.generation == 0:
            weights[0] = 1
        return [self._projected(each) for each in weights]

    def _learn(self, fitness: list[float]) -> None:
        self.done = self._single
