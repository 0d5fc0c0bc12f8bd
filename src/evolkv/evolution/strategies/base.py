"""The contract of a strategy: `ask` for candidates, `tell` their fitness."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv.allocators.complete import broadcast_bounds, complete
from evolkv.errors import BudgetError, UsageError

Budgets = NDArray[np.int64]

#: Standard deviation, in cache entries, below which a distribution has converged: samples round to its mean.
CONVERGED = 0.5
#: Candidates of a search whose length is not said.
PER_VARIABLE, MOST_EVALUATIONS = 16, 1200


class Settings(Protocol):
    """The settings of a search that a strategy goes by; `evolkv.evolution.config.SearchConfig` has them."""

    @property
    def strategy(self) -> str: ...
    @property
    def population(self) -> int | None: ...
    @property
    def sigma(self) -> float | None: ...
    @property
    def group_size(self) -> int: ...
    @property
    def max_evals(self) -> int | None: ...


class Strategy(ABC):
    """Proposes candidates and learns from their fitness, a generation at a time.

    A search calls `ask`, scores the candidates, calls `tell`, and so on until `done`. Same arguments and same fitness
    give the same candidates, whatever else draws random numbers in the process. So a search is resumed by telling a
    fresh strategy the recorded fitness again.

    A subclass proposes a population in `_propose` and learns from it in `_learn`. Its constructor takes the shape of
    the budgets and the budget, and by name sigma, population, floor, ceiling, seed and its `own_arguments`.

    Args:
        shape: (L,) for layer budgets or (L, H) for head budgets; an int means (L,).
        budget: c, the target mean budget in cache entries.
        floor: the least an entry may get, an int or an array that broadcasts to `shape`.
        ceiling: the most an entry may get, likewise.
        seed: seed of the random numbers, not negative.

    Attributes:
        mean_first: whether the first candidate of each generation is the mean of the distribution, `mean`. Only such
            a strategy can have each generation scored on other examples: the search then goes by the mean.
        layers_only: whether it cannot search budgets per head.
        starts_anywhere: whether it can start from other budgets than uniform ones.
        default_sigma: initial step in the strategy's own units, for budgets per layer and per head.
        searches: whether it proposes more than its start.
        least_population: the fewest candidates per generation that it takes.
        generation: number of generations told, which is also that of the generation `ask` returns, from 0.
        group: the layers whose mean is k̄ in `cache_score`, for the candidates that `ask` returns.
        done: whether nothing is left to search.
    """

    mean_first: ClassVar[bool] = False
    layers_only: ClassVar[bool] = False
    starts_anywhere: ClassVar[bool] = False
    searches: ClassVar[bool] = True
    default_sigma: ClassVar[tuple[float, float]]
    least_population: ClassVar[int] = 1
    group: slice = slice(None)

    def __init__(self, shape: int | tuple[int, ...], budget: int, floor: ArrayLike, ceiling: ArrayLike, seed: int):
        self.shape, self.budget = layers_or_heads(shape), whole_number("budget", budget, 1)
        self.seed = whole_number("seed", seed, 0)
        self._floor, self._ceiling = bounds(self.shape, self.budget, floor, ceiling)
        self._total = self.budget * math.prod(self.shape)
        self.generation = 0
        self.done = False
        self._population: list[Budgets] | None = None
        self._best: tuple[Budgets, float] | None = None

    @classmethod
    def own_arguments(cls, config: Settings, shape: tuple[int, ...], evaluations: int) -> dict[str, Any]:
        """Return the arguments that only this strategy has.

        Args:
            config: the settings of the search.
            shape: of the budgets.
            evaluations: candidates of the search.
        """
        return {}

    @classmethod
    def smallest(cls, config: Settings, shape: tuple[int, ...]) -> int:
        """Return the fewest candidates from which a search learns: one generation.

        Args:
            config: the settings of the search.
            shape: of the budgets.
        """
        return config.population or default_population(math.prod(shape))

    @classmethod
    def default_evaluations(cls, config: Settings, shape: tuple[int, ...], searches: int) -> int:
        """Return how many candidates a search evaluates by default, in whole generations.

        Args:
            config: the settings of the search.
            shape: of the budgets.
            searches: that divide the candidates, of which this is one.
        """
        whole = cls.smallest(config, shape)
        return math.ceil(min(MOST_EVALUATIONS, PER_VARIABLE * math.prod(shape)) / searches / whole) * whole

    @classmethod
    def identity(cls, config: Settings) -> dict[str, Any]:
        """Return what a continued search must share, as plain JSON values.

        Args:
            config: the settings of the search.
        """
        return {"strategy": config.strategy, "population": config.population, "sigma": config.sigma}

    @property
    def mean(self) -> Budgets | None:
        """The mean of the search distribution as budgets, or None where that is not a candidate."""
        return None

    @property
    def best(self) -> tuple[Budgets, float]:
        """The fittest candidate told so far and its fitness. Of equals the first.

        Raises:
            UsageError: nothing has been told yet.
        """
        if self._best is None:
            raise UsageError("there is no best candidate yet: ask() for candidates and tell() their fitness first")
        budgets, fitness = self._best
        return budgets.copy(), fitness

    def ask(self) -> list[Budgets]:
        """Return the candidates of the current generation, int64 of shape (L,) or (L, H).

        Asking again before `tell` returns the same candidates.

        Raises:
            UsageError: the search is done.
        """
        if self._population is None:
            if self.done:
                raise UsageError("the search is done: read .best, or start a new strategy with another seed")
            self._population = self._propose()
        return [candidate.copy() for candidate in self._population]

    def tell(self, fitness: Sequence[float]) -> None:
        """Learn the fitness of the candidates last asked for.

        Args:
            fitness: of each candidate, in their order; higher is better.

        Raises:
            UsageError: nothing was asked for, the wrong number of values, or a value that is not finite.
        """
        population = self._population
        if population is None:
            raise UsageError("tell() without candidates: ask() for them first")
        values = [float(value) for value in fitness]
        if len(values) != len(population):
            raise UsageError(f"tell() got {len(values)} fitness values for {len(population)} candidates")
        if not np.isfinite(values).all():
            raise UsageError(f"fitness must be finite, got {values}")
        top = int(np.argmax(values))
        if self._best is None or values[top] > self._best[1]:
            self._best = population[top], values[top]
        self._learn(values)
        self._population = None
        self.generation += 1

    def _projected(self, weights: NDArray[Any]) -> Budgets:
        """Return the budgets in proportion to weights, at exactly the target total and within floor and ceiling."""
        return complete(weights, self._total, self._floor, self._ceiling)

    @property
    def _single(self) -> bool:
        """True if floor, ceiling and total leave just one allocation, so that there is nothing to search."""
        total_at_bound = self._total in (self._floor.sum(), self._ceiling.sum())
        return total_at_bound or int((self._floor < self._ceiling).sum()) <= 1

    @abstractmethod
    def _propose(self) -> list[Budgets]:
        """Return the next population."""

    @abstractmethod
    def _learn(self, fitness: list[float]) -> None:
        """Update the search distribution with the fitness of the population that `_propose` returned last."""


def default_population(variables: int) -> int:
    """Return the usual population of CMA-ES, 4 + ⌊3 ln n⌋."""
    return 4 + math.floor(3 * math.log(variables))


def whole_number(name: str, value: int, least: int) -> int:
    """Return `value` as an int of at least `least`, or raise `UsageError`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def positive_number(name: str, value: float) -> float:
    """Return `value` as a positive, finite float, or raise `UsageError`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < np.inf:
        raise UsageError(f"{name} must be a positive number, got {value!r}")
    return number


def layers_or_heads(shape: int | tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape` as (L,) or (L, H), or raise `UsageError`."""
    sizes = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    if len(sizes) not in (1, 2):
        raise UsageError(f"shape must be (layers,) or (layers, heads), got {shape!r}")
    return tuple(whole_number("shape", size, 1) for size in sizes)


def bounds(shape: tuple[int, ...], budget: int, floor: ArrayLike, ceiling: ArrayLike) -> tuple[Budgets, Budgets]:
    """Return floor and ceiling as int64 arrays of `shape`.

    Raises:
        BudgetError: bounds that are not whole numbers, do not broadcast to `shape`, cross, or leave the mean
            `budget` out of reach.
    """
    low, high = broadcast_bounds(shape, floor, ceiling)
    if not low.mean() <= budget <= high.mean():
        raise BudgetError(
            f"a mean budget of {budget} is out of reach: floor and ceiling allow {low.mean():g} to {high.mean():g}"
        )
    return low, high
