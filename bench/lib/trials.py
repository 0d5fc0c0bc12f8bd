"""One seed of a benchmark of searches: its examples, prefilled once and held, and engines over them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from evolkv.evaluation.engine import Engine
from evolkv.evaluation.local import LocalBackend
from evolkv.evaluation.shards import ShardedEngine
from evolkv.evolution.evolve import Evolution, Rotation, evolve
from evolkv.evolution.plan import Plan
from evolkv.evolution.progress import OnProgress
from evolkv.evolution.settings import Start, StrategySettings
from evolkv.selectors import get_selector
from evolkv.tasks import get_task
from evolkv.tasks.base import Split


class Trial:
    """Searches on one set of training examples, scored on one set of held-out examples; both are prefilled once.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        task: spec of the task.
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
        task: str,
        train: int,
        held_out: int,
        seed: int,
        selector: Any = "snapkv",
        split: Split = "report",
    ):
        self.seed = seed
        self._backend = LocalBackend(model, tokenizer)
        self._given = {"model": model, "tokenizer": tokenizer, "task": get_task(task), "train": train, "seed": seed}
        self._given["selector"] = get_selector(selector)
        self._plans: dict[str, Plan] = {}
        self._held_out = get_task(task).examples(split, held_out, tokenizer, seed)

    def plan(self, granularity: str) -> Plan:
        """The settings of a search over layers or heads."""
        if granularity not in self._plans:
            self._plans[granularity] = Plan(
                **self._given,
                granularity=granularity,
                metric="logprob",
                engine="replay",
                val=1,
                floor=None,
                ceiling=None,
                lam=0.3,
                gamma=0.2,
                backend=lambda: self._backend,
            )
        return self._plans[granularity]

    @cached_property
    def train(self) -> Engine:
        """Scores on the training examples."""
        return self._engine(self.plan("layer").train)

    @cached_property
    def held_out(self) -> Engine:
        """Scores on the held-out examples."""
        return self._engine(self._held_out)

    def _engine(self, examples: Any) -> Engine:
        plan = self.plan("layer")
        return ShardedEngine(self._backend, examples, plan.selector, plan.metric, plan.ceiling)

    def evolve(
        self,
        strategy: StrategySettings,
        budget: int,
        *,
        granularity: str = "layer",
        start: Start = None,
        step: float = 1.0,
        scorer: Callable[[], Engine] | None = None,
        report: OnProgress | None = None,
    ) -> Evolution:
        """One search; `scorer` and `report` take the place of scoring on `train`, and of silence."""
        plan = self.plan(granularity)
        plan.check(budget)
        examples = len(plan.train)
        size = strategy.examples_per_generation(plan.metric, examples)
        return evolve(
            plan,
            budget,
            strategy.strategy(plan, budget, start, step=step),
            strategy.evaluations(plan.shape),
            Rotation(examples, size, self.seed),
            scorer or (lambda: self.train),
            report or (lambda progress: None),
        )

    def close(self) -> None:
        """Frees the prefill."""
        for name in ("train", "held_out"):
            if name in self.__dict__:
                getattr(self, name).close()
        self._backend.close()


def outcome(plan: Plan, evolution: Evolution, budget: int) -> np.ndarray:
    """What a search came to at exactly the target total, ``[layers, kv_heads]``: the mean if there is one."""
    found = evolution.mean if evolution.mean is not None else np.array(evolution.best.budgets)
    return plan.completed(found, budget)
