"""One seed of a benchmark of searches: its examples, prefilled once and held, and engines over them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import numpy as np

from evolkv.evaluation.engine import Engine
from evolkv.evaluation.local import LocalBackend
from evolkv.evaluation.shards import ShardedEngine
from evolkv.evolution import SearchConfig
from evolkv.evolution.config import Granularity
from evolkv.evolution.evolve import Evolved, Rotation, evolve, make_strategy
from evolkv.evolution.run import Run
from evolkv.evolution.space import SearchSpace, Start
from evolkv.evolution.strategies import Strategy
from evolkv.tasks import get_task
from evolkv.tasks.base import Split


class Trial:
    """Searches on one set of training examples, scored on one set of held-out examples; both are prefilled once.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        task: spec of the task, or those of several.
        selector: spec of the selector.
        train: training examples.
        held_out: examples that no search sees.
        seed: of the examples and the strategies.
        split: where the held-out examples come from.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        task: str | list[str],
        train: int,
        held_out: int,
        seed: int,
        selector: Any = "snapkv",
        split: Split = "report",
    ):
        # The search's own validation examples are not looked at, so there are as few as a mixture takes: one a task.
        val = 1 if isinstance(task, str) else len(task)
        self.config = SearchConfig(task=task, selector=selector, train=train, val=val, seed=seed)
        self._backend = LocalBackend(model, tokenizer)
        self._run = Run(model, tokenizer, self.config)
        self._held_out = get_task(task).examples(split, held_out, tokenizer, seed)
        self.space = cache(self._space)

    def _space(self, granularity: Granularity) -> SearchSpace:
        config = replace(self.config, granularity=granularity)
        return SearchSpace(self._run.model, self._run.selector, config, self._run.space.longest)

    @cached_property
    def train(self) -> Engine:
        """Scores on the training examples."""
        return self._engine(self._run.train)

    @cached_property
    def held_out(self) -> Engine:
        """Scores on the held-out examples."""
        return self._engine(self._held_out)

    def _engine(self, examples: Any) -> Engine:
        return ShardedEngine(self._backend, examples, self._run.selector, self.config.metric, self._run.space.ceiling)

    def strategy(self, config: SearchConfig, budget: int, start: Start = None, step: float = 1.0) -> Strategy:
        """The strategy of a search at a budget."""
        space = self.space(config.granularity)
        return make_strategy(config, space, budget, start, step=step)

    def rotation(self, size: int) -> Rotation:
        """Which of the training examples each generation is scored on; a task may have fewer than it was asked for."""
        return Rotation(len(self._run.train), size, self.config.seed)

    def evolve(self, config: SearchConfig, budget: int) -> Evolved:
        """One search, scored on `train`."""
        space = self.space(config.granularity)
        return evolve(
            self.strategy(config, space.check(budget)),
            budget,
            config.evaluations(space.shape),
            config=config,
            space=space,
            rotation=self.rotation(config.examples_per_generation),
            scorer=lambda: self.train,
        )

    def close(self) -> None:
        """Frees the prefill."""
        for name in ("train", "held_out"):
            if name in self.__dict__:
                getattr(self, name).close()
        self._backend.close()


def outcome(space: SearchSpace, evolved: Evolved, budget: int) -> np.ndarray:
    """Return the budgets of a search at exactly the target total, ``[layers, kv_heads]``: the mean if there is one."""
    budgets = evolved.mean if evolved.mean is not None else np.array(evolved.best.budgets)
    return space.completed(budgets, budget)
