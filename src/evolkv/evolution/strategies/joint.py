"""Strategy `joint`: one CMA-ES over all layers, or layers × heads, at exactly the target memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv.errors import BudgetError
from evolkv.evolution.strategies.base import (
    CONVERGED,
    Budgets,
    Strategy,
    default_population,
    positive_number,
    whole_number,
)
from evolkv.evolution.strategies.cma_es import cma_es

#: Factor on the standard deviations after a generation of flat fitness.
WIDENING = math.exp(0.2)


class JointCMA(Strategy):
    """One CMA-ES over the logarithms of all entries; every candidate is projected onto the exact total.

    A sample x gives weights exp(x), which `evolkv.allocators.complete` turns into budgets. So every candidate
    spends the target memory, no more and no less, and its cache score is 1. The first candidate of each
    generation is the mean of the distribution, the others are its samples; the mean of the first generation
    is the uniform allocation, or `x0`. The mean is evaluated but not told to the CMA-ES, whose update expects
    independent samples.

    A generation of equally fit samples says nothing about where to go: the distribution then stays where it
    is and widens, as Hansen's tutorial suggests for flat fitness (arXiv 1604.00772, appendix B). The search
    is done when the samples of every entry spread by less than half a cache entry.

    Args:
        shape: (L,) for layer budgets or (L, H) for head budgets; an int means (L,).
        budget: c, the mean budget of every candidate, in cache entries.
        sigma: initial standard deviation of the logarithms (0.5: a typical entry moves by a factor of 1.6).
        population: candidates per generation, at least 4; default 4 + ⌊3 ln n⌋ for n entries.
        floor: the least an entry may get, an int or an array that broadcasts to `shape`.
        ceiling: the most an entry may get, likewise.
        seed: seed of the random numbers, not negative.
        x0: budgets to start from, of shape `shape`; default: uniform. They are brought to the total first.

    Raises:
        UsageError: an argument out of its range (`BudgetError` for budget, floor, ceiling and x0).
    """

    mean_first = True
    starts_anywhere = True
    default_sigma = (0.5, 0.7)
    least_population = 4

    def __init__(
        self,
        shape: int | tuple[int, ...] = (32,),
        budget: int = 128,
        sigma: float = 0.5,
        population: int | None = None,
        floor: ArrayLike = 33,
        ceiling: ArrayLike = 1600,
        seed: int = 0,
        x0: ArrayLike | None = None,
    ):
        super().__init__(shape, budget, floor, ceiling, seed)
        self.sigma = positive_number("sigma", sigma)
        size = math.prod(self.shape)
        population = default_population(size) if population is None else population
        self.population = whole_number("population", population, self.least_population)
        start = np.ones(self.shape) if x0 is None else np.asarray(x0)
        if start.shape != self.shape:
            raise BudgetError(f"x0 has shape {start.shape}, expected {self.shape}")
        start = np.maximum(self._projected(start), 1)
        low, high = max(1, int(self._floor.min())), int(self._ceiling.max())
        # Samples that spread wider than the permitted range all project onto its corners.
        self._widest = max(self.sigma, math.log(high / low) / 2)
        self._cma: Any = cma_es(
            np.log(start / self.budget).ravel(),
            self.sigma,
            self.population - 1,
            self.seed,
            # A variance per entry but no covariances: n numbers from few evaluations instead of n (n + 1) / 2. What
            # all entries depend on, their shared total, is left to the projection.
            CMA_diagonal=True,
            maxstd=self._widest,
        )

    @property
    def mean(self) -> Budgets:
        """The mean of the search distribution, projected: int64 budgets of shape `shape`."""
        return self._sampled(self._cma.mean)

    def _sampled(self, logarithms: NDArray[np.float64]) -> Budgets:
        return self._projected(np.exp(logarithms - logarithms.max()).reshape(self.shape))

    def _propose(self) -> list[Budgets]:
        self._samples = self._cma.ask()
        return [self.mean, *(self._sampled(sample) for sample in self._samples)]

    def _learn(self, fitness: list[float]) -> None:
        if min(fitness[1:]) < max(fitness[1:]):
            self._cma.tell(self._samples, [-value for value in fitness[1:]])
        else:
            self._cma.sigma *= min(WIDENING, self._widest / self._cma.stds.max())
        in_entries = self._cma.stds * self.mean.ravel()
        self.done = self._single or float(in_entries.max()) < CONVERGED
