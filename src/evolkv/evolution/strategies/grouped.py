"""Strategy `evolkv`: the paper's search, layer group by layer group (arXiv 2509.08315, Algorithm 1)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from evolkv.evolution.strategies.base import (
    CONVERGED,
    Budgets,
    Settings,
    Strategy,
    default_population,
    positive_number,
    whole_number,
)
from evolkv.evolution.strategies.cma_es import cma_es

#: Of each group, where a search's length is not said.
GENERATIONS = 10


class GroupedCMA(Strategy):
    """A fresh CMA-ES for each group of neighbouring layers, bottom to top; the others stay as they are best.

    The variables are the layer budgets of the group in units of c, started at 1. The best scheme G* and its
    fitness run through all groups and are never reset: a later candidate replaces it only if it is strictly
    fitter. Groups not yet searched stay uniform at c. Candidates may spend more or less than c on average:
    the cache score of the fitness, taken over `group`, holds them near it, and `evolkv.allocators.complete`
    brings the result to the exact total.

    Args:
        num_layers: L.
        budget: c, the target mean budget in cache entries.
        group_size: n_g, layers per group; the last group may be shorter.
        sigma: σ₀, the initial standard deviation in units of c.
        generations: generations per group. A group ends early when its CMA-ES has converged
            (no spread left beyond rounding).
        population: candidates per generation, at least 4; default 4 + ⌊3 ln n⌋ for a group of n layers.
        floor: the least a layer may get, an int or (L,) ints.
        ceiling: the most a layer may get, an int or (L,) ints.
        seed: seed of the random numbers, not negative.

    Raises:
        UsageError: an argument out of its range (`BudgetError` for budget, floor and ceiling).
    """

    layers_only = True
    default_sigma = (0.3, 0.3)
    least_population = 4

    def __init__(
        self,
        num_layers: int = 32,
        budget: int = 128,
        group_size: int = 8,
        sigma: float = 0.3,
        generations: int = 10,
        population: int | None = None,
        floor: ArrayLike = 33,
        ceiling: ArrayLike = 1600,
        seed: int = 0,
    ):
        self.num_layers = whole_number("num_layers", num_layers, 1)
        super().__init__(self.num_layers, budget, floor, ceiling, seed)
        self.group_size = whole_number("group_size", group_size, 1)
        self.sigma = positive_number("sigma", sigma)
        self.generations = whole_number("generations", generations, 1)
        self.population = None if population is None else whole_number("population", population, self.least_population)
        self._scheme: Budgets = np.clip(np.full(self.num_layers, self.budget), self._floor, self._ceiling)
        self._start_group(0)

    @classmethod
    def own_arguments(cls, config: Settings, shape: tuple[int, ...], evaluations: int) -> dict[str, Any]:
        """Return the size of the groups, and the generations that each gets."""
        generations = max(1, evaluations // cls.smallest(config, shape))
        return {"group_size": config.group_size, "generations": generations}

    @classmethod
    def smallest(cls, config: Settings, shape: tuple[int, ...]) -> int:
        """Return the candidates of one generation of every group."""
        starts = range(0, shape[0], config.group_size)
        sizes = [min(config.group_size, shape[0] - start) for start in starts]
        return sum(config.population or default_population(size) for size in sizes)

    @classmethod
    def default_evaluations(cls, config: Settings, shape: tuple[int, ...], searches: int) -> int:
        """Return the candidates of ten generations of every group, or of its part of them."""
        return max(1, GENERATIONS // searches) * cls.smallest(config, shape)

    @classmethod
    def identity(cls, config: Settings) -> dict[str, Any]:
        """Return what a continued search must share; here `max_evals` decides how many generations a group gets."""
        return {**super().identity(config), "group_size": config.group_size, "max_evals": config.max_evals}

    def _start_group(self, start: int) -> None:
        self.group = slice(start, min(start + self.group_size, self.num_layers))
        self._generation_in_group = 0
        size = self.group.stop - self.group.start
        low, high = self._floor[self.group] / self.budget, self._ceiling[self.group] / self.budget
        # CMA-ES needs room between its bounds; less than half an entry is lost in rounding.
        high = np.where(high > low, high, high + 0.4 / self.budget)
        self._cma: Any = cma_es(
            np.clip(np.ones(size), low, high),
            self.sigma if size > 1 else min(self.sigma, float(high[0] - low[0]) / 3),
            self.population or default_population(size),
            [self.seed, start],
            bounds=[low, high],
            # pycma limits the spread to a third of the room, and fails at that where there is one variable alone.
            maxstd=np.inf if size == 1 else None,
        )

    def _propose(self) -> list[Budgets]:
        self._samples = self._cma.ask()
        population = []
        for sample in self._samples:
            budgets = np.rint(sample * self.budget).astype(np.int64)
            candidate = self._scheme.copy()
            candidate[self.group] = np.clip(budgets, self._floor[self.group], self._ceiling[self.group])
            population.append(candidate)
        return population

    def _learn(self, fitness: list[float]) -> None:
        self._cma.tell(self._samples, [-value for value in fitness])
        self._generation_in_group += 1
        spread = float(np.max(self._cma.stds)) * self.budget
        if self._generation_in_group < self.generations and spread >= CONVERGED:
            return
        self._scheme = self.best[0]
        if self.group.stop == self.num_layers:
            self.done = True
        else:
            self._start_group(self.group.stop)
