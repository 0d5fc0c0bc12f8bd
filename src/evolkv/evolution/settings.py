"""How candidates are proposed: the strategy's settings, and the strategy that follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from evolkv.errors import UsageError
from evolkv.evolution.plan import Plan
from evolkv.evolution.strategies import STRATEGIES, GroupedCMA, JointCMA, RandomSearch, Strategy
from evolkv.evolution.strategies.base import default_population
from evolkv.numbers import is_whole
from evolkv.profile import BudgetProfile
from evolkv.registry import unknown_name

Start = str | BudgetProfile | np.ndarray | None
#: Examples that a generation of `joint` is scored on. With the metric logprob two in turn reach a given held-out score
#: with about a quarter of the example evaluations that twelve need (docs/performance.md). Text metrics are coarse:
#: a few examples would leave most candidates equal.
MINIBATCH = 2
#: Of one generation, where a search's length is not said.
MOST_POPULATION = 10_000
#: Candidates of a search whose length is not said; `evolkv` has generations per group instead.
PER_VARIABLE, MOST_EVALUATIONS, GENERATIONS = 16, 1200, 10
#: σ₀ of each strategy, in its own units, for budgets per layer and per head.
_SIGMA = {"evolkv": (0.3, 0.3), "joint": (0.5, 0.7), "random": (1.0, 1.0)}


@dataclass(frozen=True)
class StrategySettings:
    """How candidates are proposed; see `evolkv.search`.

    Raises:
        UsageError: for settings that cannot be used.
    """

    name: str
    max_evals: int | None = None
    population: int | None = None
    sigma: float | None = None
    group_size: int = 8
    minibatch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise unknown_name("strategy", self.name, STRATEGIES)
        for option, value, what in (
            ("--minibatch", self.minibatch, "example"),
            ("--max-evals", self.max_evals, "candidate"),
            ("--group-size", self.group_size, "layer"),
        ):
            if value is not None and (not is_whole(value) or value < 1):
                raise UsageError(f"{option} is {value!r}; use a whole number, at least one {what}")
        if self.population is not None and not is_whole(self.population):
            raise UsageError(f"--population is {self.population!r}; use a whole number of candidates")
        if self.population is not None and self.population > (self.max_evals or MOST_POPULATION):
            raise UsageError(
                f"--population is {self.population}, more than all candidates of the search ("
                f"{f'--max-evals {self.max_evals}' if self.max_evals else f'at most {MOST_POPULATION:,}'}); "
                "a search wants many generations: leave --population out, or raise --max-evals"
            )
        if self.minibatch is not None and self.name != "joint":
            raise UsageError(
                f"strategy {self.name!r} compares candidates of different generations, which needs them all scored on "
                "the same examples; leave --minibatch out, or use --strategy joint"
            )

    def examples_per_generation(self, metric: str, train: int) -> int:
        """How many of the training examples each generation is scored on."""
        default = MINIBATCH if self.name == "joint" and metric == "logprob" else train
        return min(self.minibatch or default, train)

    def evaluations(self, shape: tuple[int, ...], share: int = 1) -> int:
        """Return how many candidates a search evaluates, at most `max_evals`: whole generations, or part of one.

        Args:
            shape: of the budgets.
            share: searches that `max_evals` is for, of which this is one.
        """
        whole = self.smallest(shape)
        if self.max_evals is not None:
            asked = self.max_evals // share
            return asked // whole * whole or max(1, asked)
        if self.name == "evolkv":
            return max(1, GENERATIONS // share) * whole
        return math.ceil(min(MOST_EVALUATIONS, PER_VARIABLE * math.prod(shape)) / share / whole) * whole

    def smallest(self, shape: tuple[int, ...]) -> int:
        """Return the candidates of one generation; of `evolkv`, of one generation of every group of layers."""
        group = self.group_size if self.name == "evolkv" else math.prod(shape)
        sizes = [min(group, math.prod(shape) - start) for start in range(0, math.prod(shape), group)]
        return sum(self.population or default_population(n) for n in sizes)

    def strategy(self, plan: Plan, budget: int, start: Start = None, share: int = 1, step: float = 1.0) -> Strategy:
        """The strategy for one budget.

        Args:
            plan: what all budgets share.
            budget: the target.
            start: where it starts from: a heuristic's name, a profile, or budgets ``[layers, kv_heads]``; None for
                uniform.
            share: searches that `max_evals` is for, of which this is one.
            step: factor on the default sigma.

        Raises:
            UsageError: if this strategy cannot start there, or a setting is out of its range.
        """
        if self.name != "joint" and not (start is None or (isinstance(start, str) and start == "uniform")):
            raise UsageError(f"strategy {self.name!r} starts from uniform budgets; leave --start out, or use 'joint'")
        head = plan.granularity == "head"
        sigma = step * _SIGMA[self.name][head] if self.sigma is None else self.sigma
        common: dict[str, Any] = {
            "budget": budget,
            "sigma": sigma,
            "population": self.population,
            "floor": plan.floors[:, None] if head else plan.floors,
            "ceiling": plan.ceilings[:, None] if head else plan.ceilings,
            "seed": self.seed,
        }
        if self.name == "evolkv":
            generations = max(1, self.evaluations(plan.shape, share) // self.smallest(plan.shape))
            return GroupedCMA(plan.layers, group_size=self.group_size, generations=generations, **common)
        if self.name == "random":
            return RandomSearch(plan.shape, **common)
        return JointCMA(plan.shape, **common, x0=plan.start(start, budget))

    def describe(self) -> dict[str, Any]:
        """What identifies the search, as plain JSON values."""
        found = {"strategy": self.name, "population": self.population, "sigma": self.sigma}
        if self.name == "evolkv":
            # Here the number of candidates decides how many generations a group gets, so it is part of the search.
            found |= {"group_size": self.group_size, "max_evals": self.max_evals}
        return found
