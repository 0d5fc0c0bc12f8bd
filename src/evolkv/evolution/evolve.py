"""One search at one budget: ask, score, tell; every generation recorded before the next begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evolkv.errors import StudyError
from evolkv.evaluation.engine import Engine
from evolkv.evaluation.shards import SHARD_SIZE
from evolkv.evolution.config import SearchConfig
from evolkv.evolution.limit import TimeLimit
from evolkv.evolution.objective import cache_score, fitness
from evolkv.evolution.progress import SearchProgress
from evolkv.evolution.result import Evaluation, as_lists
from evolkv.evolution.space import SearchSpace, Start
from evolkv.evolution.strategies import STRATEGIES, Strategy

if TYPE_CHECKING:
    from evolkv.evolution.study import Study


@dataclass(frozen=True)
class Beginning:
    """Results at a budget that are there before evolution.

    Args:
        descent: the steps of the gradient start; none of a search that starts elsewhere.
        lukv: the budgets of LU-KV, ``[layers, kv_heads]``, or None where it cannot be calibrated.
        interrupted: whether the descent was stopped before its end.
        out_of_time: whether the time limit ended it.
        recorded_seconds: that earlier runs took for the steps that the study held.
    """

    descent: Sequence[Evaluation] = ()
    lukv: np.ndarray | None = None
    interrupted: bool = False
    out_of_time: bool = False
    recorded_seconds: float = 0.0


@dataclass(frozen=True)
class Evolved:
    """The outcome of one search, before the choice on validation examples.

    Args:
        history: every candidate, in order of evaluation.
        best: the candidate to put forward.
        mean: the distribution's mean as ``[layers, kv_heads]`` budgets, or None where there is no such candidate.
        before: what was there before evolution.
        interrupted: whether it was stopped before its end.
        out_of_time: whether the time limit ended it.
        recorded_seconds: that earlier runs took for what the study held, the descent included.
    """

    history: list[Evaluation]
    best: Evaluation
    mean: np.ndarray | None
    before: Beginning
    interrupted: bool
    out_of_time: bool = False
    recorded_seconds: float = 0.0

    @classmethod
    def none(cls, before: Beginning, interrupted: bool) -> Evolved:
        """Return the outcome of a search that ends with its descent."""
        return cls([], before.descent[-1], None, before, interrupted, before.out_of_time, before.recorded_seconds)


class Rotation:
    """The training examples that each generation is scored on: a few at a time, all of them in turn.

    All candidates of a generation are scored on the same examples, so differences between examples do not blur the
    comparison. The order is drawn anew for every round, and neighbours in it come from different shards as far as
    possible, so that workers side by side share a generation. Where `size` does not divide the number of examples, a
    round leaves out the last of its order.

    Args:
        examples: number of training examples.
        size: examples per generation, at most all.
        seed: of the order.
    """

    def __init__(self, examples: int, size: int, seed: int):
        self.examples, self.size, self.seed = examples, min(size, examples), seed

    @property
    def everything(self) -> bool:
        """True if each generation is scored on all examples."""
        return self.size == self.examples

    def __call__(self, generation: int) -> list[int]:
        """Return the numbers of a generation's examples, ascending."""
        turn, place = divmod(generation, self.examples // self.size)
        order = np.random.default_rng([self.seed, turn]).permutation(self.examples).tolist()
        met: dict[int, int] = {}
        rank = {}
        for example in order:
            shard = example // SHARD_SIZE
            rank[example] = met[shard] = met.get(shard, -1) + 1
        order.sort(key=rank.__getitem__)
        return sorted(order[place * self.size : (place + 1) * self.size])

    def spread(self, columns: Sequence[int], values: Sequence[float]) -> list[float | None]:
        """Return the values of some examples as a list of all, with None for the others."""
        known = dict(zip(columns, values, strict=True))
        return [known.get(example) for example in range(self.examples)]


def evolve(
    strategy: Strategy,
    budget: int,
    total: int,
    *,
    config: SearchConfig,
    space: SearchSpace,
    rotation: Rotation,
    scorer: Callable[[], Engine],
    study: Study | None = None,
    limit: TimeLimit | None = None,
    before: Beginning | None = None,
) -> Evolved:
    """Run a strategy until it is done, or its next generation would be more than `total` candidates.

    A generation that is cut short teaches a strategy nothing, so only the first one can be: where `total` is less.
    Generations that the study holds are told to the strategy again instead of being scored, which brings it to where
    it was. KeyboardInterrupt ends the search early.

    Args:
        strategy: proposes candidates.
        budget: the target, in cache entries per KV head.
        total: candidates to evaluate at most.
        config: the settings of the search.
        space: the budgets to choose from.
        rotation: which examples each generation is scored on.
        scorer: the engine over the training examples; asked for only if something has to be scored.
        study: where generations are recorded.
        limit: ends the search before the first generation for which there is no time.
        before: what was there before.

    Raises:
        StudyError: if what the study holds is not what the strategy proposes.
        KeyboardInterrupt: if interrupted before the first generation was scored, and without a descent before it.
    """
    stage = stage_name(budget)
    recorded = study.generations(stage) if study is not None else []
    leader = _Leader(rotation)
    limit, before = limit or TimeLimit(None), before or Beginning()
    interrupted = out_of_time = False
    done, recorded_seconds = 0, before.recorded_seconds
    try:
        while not strategy.done and done < total:
            group, generation = strategy.group, strategy.generation
            proposed = strategy.ask()
            if done + len(proposed) > total and done:
                break
            # A search shorter than one generation evaluates part of it.
            population = [space.matrix(candidate) for candidate in proposed[:total]]
            if generation < len(recorded):
                evaluations = recorded[generation]
                if [entry.budgets for entry in evaluations] != [as_lists(candidate) for candidate in population]:
                    raise StudyError(
                        f"generation {generation} of {stage} in the study is not what this version of the libraries "
                        "proposes; continue with the versions that the study was made with, or start another --study"
                    )
                recorded_seconds += sum(entry.seconds for entry in evaluations)
            else:
                columns = rotation(generation)
                engine = scorer()
                if leader.history and limit.reached():
                    out_of_time = True
                    break
                started = time.perf_counter()
                scores = engine.score(np.stack(population), columns)
                seconds = time.perf_counter() - started
                limit.scored(len(population) * len(columns), seconds)
                took = seconds / len(population)
                evaluations = []
                for candidate, row in zip(population, scores, strict=True):
                    score, spent = float(row.mean()), float(candidate[group].mean())
                    evaluations.append(
                        Evaluation(
                            as_lists(candidate),
                            fitness(score, spent, budget, lam=config.lam, gamma=config.gamma),
                            score,
                            cache_score(spent, budget, gamma=config.gamma),
                            generation,
                            rotation.spread(columns, row.tolist()),
                            took,
                        )
                    )
                if study is not None:
                    study.record(stage, generation, evaluations)
            if len(population) == len(proposed):
                strategy.tell([entry.fitness for entry in evaluations])
            leader.add(evaluations)
            done += len(evaluations)
            best, score = leader.standing()
            config.report(
                SearchProgress(
                    "search",
                    done,
                    total,
                    best,
                    score,
                    leader.entry.budgets,
                    max(entry.fitness for entry in evaluations),
                    generation,
                    budget,
                )
            )
    except KeyboardInterrupt:
        interrupted = True
    if not leader.history:
        if not before.descent:
            raise KeyboardInterrupt
        return Evolved.none(before, interrupted=True)
    mean = None if strategy.mean is None else space.matrix(strategy.mean)
    return Evolved(leader.history, leader.finalist(), mean, before, interrupted, out_of_time, recorded_seconds)


def make_strategy(
    config: SearchConfig, space: SearchSpace, budget: int, start: Start, searches: int = 1, step: float = 1.0
) -> Strategy:
    """Return the strategy of a search at one budget.

    Args:
        config: the settings of the search.
        space: the budgets to choose from.
        budget: the target.
        start: where to start from, if the strategy `starts_anywhere`.
        searches: that divide the candidates, of which this is one.
        step: factor on the default sigma.

    Raises:
        UsageError: a setting is out of its range.
    """
    strategy = STRATEGIES[config.strategy]
    floor, ceiling = space.bounds
    arguments = {
        "budget": budget,
        "sigma": step * strategy.default_sigma[space.by_head] if config.sigma is None else config.sigma,
        "population": config.population,
        "floor": floor,
        "ceiling": ceiling,
        "seed": config.seed,
        **strategy.own_arguments(config, space.shape, config.evaluations(space.shape, searches)),
    }
    if strategy.starts_anywhere:
        arguments["x0"] = space.start(start, budget)
    return strategy(space.layers if strategy.layers_only else space.shape, **arguments)


def stage_name(budget: int) -> str:
    """Return a study's name for the search at a budget."""
    return f"budget {budget}"


class _Leader:
    """The best so far.

    Fitness on different examples cannot be compared. There the distribution's mean leads, the first candidate of each
    generation of a strategy with `mean_first`.
    """

    def __init__(self, rotation: Rotation):
        self.rotation = rotation
        self.history: list[Evaluation] = []
        self.entry: Evaluation
        self._latest: dict[int, float] = {}

    def add(self, evaluations: list[Evaluation]) -> None:
        """Take in a generation."""
        if self.rotation.everything:
            fittest = max(evaluations, key=lambda entry: entry.fitness)
            if not self.history or fittest.fitness > self.entry.fitness:
                self.entry = fittest
        else:
            self.entry = evaluations[0]
            self._latest.update({i: s for i, s in enumerate(self.entry.scores or []) if s is not None})
        self.history += evaluations

    def standing(self) -> tuple[float, float]:
        """Return fitness and score of the leader, each example counted as last seen."""
        if self.rotation.everything:
            return self.entry.fitness, self.entry.score
        score = float(np.mean(list(self._latest.values())))
        return score * self.entry.fitness / self.entry.score if self.entry.score else score, score

    def finalist(self) -> Evaluation:
        """Return the candidate to put forward: of the last quarter, the one furthest ahead of the mean beside it."""
        if self.rotation.everything:
            return self.entry
        means: dict[int, float] = {}
        for entry in self.history:
            means.setdefault(entry.generation, entry.fitness)
        late = [entry for entry in self.history if 4 * entry.generation >= 3 * self.history[-1].generation]
        return max(late, key=lambda entry: entry.fitness - means[entry.generation])
