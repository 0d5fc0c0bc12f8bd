"""The settings of a search, checked, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from evolkv.allocators import expand, layout
from evolkv.budgets import BudgetSpec, read_budget
from evolkv.cache.compressed import CompressedCache
from evolkv.errors import BudgetError, UsageError
from evolkv.evaluation.engine import Engine
from evolkv.evaluation.naive_engine import NaiveEngine
from evolkv.evaluation.shards import Backend, ShardedEngine
from evolkv.evolution.objective import fitness
from evolkv.models import describe_model, sliding_windows
from evolkv.numbers import is_whole
from evolkv.profile import BudgetProfile
from evolkv.registry import unknown_name
from evolkv.selectors import Selector
from evolkv.tasks import Example, Task, encode_prompt, fingerprint, format_spec
from evolkv.tasks.metrics import check_metric
from evolkv.tasks.protocol import AWARE, under_protocol

EngineName = Literal["replay", "naive"]
Granularity = Literal["layer", "head"]
#: Allocations that need no search.
HEURISTICS = ("uniform", "pyramid")
#: Name of the profile that a search started from.
START = "start"
#: What a result has to beat.
NOT_EVOLVED = (*HEURISTICS, START)


class Plan:
    """The settings that all budgets of a search share.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        task: what to evolve for.
        selector: which tokens a budget keeps.
        granularity: "layer" or "head".
        metric: what to maximise.
        protocol: whether questions are known when prompts are compressed; see `evolkv.tasks.protocol`.
        engine: "replay" or "naive".
        prefill_chunk: tokens of the chunks in which prompts are read, for engine "naive"; None for all at once.
        train: examples that candidates are scored on.
        val: examples that the result is chosen on.
        floor: the least a head may get, or None for one more than the selector always keeps.
        ceiling: the most a head may get, or None for the longest training prompt.
        lam: weight of the cache score in the fitness.
        gamma: discount for budgets below the target.
        seed: of the examples.
        backend: makes the backend of replay when it is first needed.

    Raises:
        UsageError: for settings that cannot be used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        task: Task,
        selector: Selector,
        granularity: str,
        metric: str,
        engine: str,
        train: int,
        val: int,
        floor: int | None,
        ceiling: int | None,
        lam: float,
        gamma: float,
        seed: int,
        backend: Callable[[], Backend],
        protocol: str = AWARE,
        prefill_chunk: int | None = None,
    ):
        if granularity not in ("layer", "head"):
            raise unknown_name("granularity", granularity, ("layer", "head"))
        if engine not in ("replay", "naive"):
            raise unknown_name("engine", engine, ("replay", "naive"))
        if prefill_chunk is not None and engine == "replay":
            raise UsageError(
                "engine 'replay' cuts prompts that were read at once, and --prefill-chunk evicts while they are read; "
                "add --engine naive, which reads each prompt for each candidate"
            )
        check_metric(metric)
        # Checks its arguments, long before the first candidate would.
        fitness(0.0, 1.0, 1.0, lam=lam, gamma=gamma)
        self.model, self.tokenizer, self.task, self.selector = model, tokenizer, task, selector
        self.granularity, self.metric, self.engine_name = granularity, metric, engine
        self.lam, self.gamma, self.seed = lam, gamma, seed
        info = describe_model(model)
        self.layers, self.heads = info.num_layers, info.num_kv_heads
        self.protocol, self.prefill_chunk = protocol, prefill_chunk
        if prefill_chunk is not None:
            # Refused now, if the selector or the model cannot be read so.
            some = BudgetProfile.uniform(model, selector.min_budget + 1, selector.to_dict())
            CompressedCache(model, some, prefill_chunk=prefill_chunk)
        self.train = under_protocol(protocol, task.examples("train", _at_least_one("train", train), tokenizer, seed))
        self.held_out = under_protocol(
            protocol, task.examples("validation", _at_least_one("val", val), tokenizer, seed)
        )
        _check_unseen(self.train, self.held_out)
        self.longest = max(encode_prompt(tokenizer, example).shape[1] for example in self.train)
        self.floor = floor if floor is not None else selector.min_budget + 1
        self.ceiling = ceiling if ceiling is not None else self.longest
        #: Entries beyond a layer's own window would never be held.
        self.ceilings = np.array([min(self.ceiling, w or self.ceiling) for w in sliding_windows(model)])
        #: A layer whose window is below the floor holds its window.
        self.floors = np.minimum(self.floor, self.ceilings)
        self._make_backend = backend
        self._backend: Backend | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is searched."""
        return (self.layers, self.heads) if self.granularity == "head" else (self.layers,)

    def check(self, budget: BudgetSpec) -> int:
        """A budget, checked against the examples and the bounds.

        Raises:
            BudgetError: if it cannot be searched at.
        """
        budget = read_budget(budget)
        least, most, selector = self.floor, self.ceiling, self.selector
        if least < selector.min_budget:
            raise BudgetError(
                f"the floor is {least}, but {selector.name} always keeps {selector.min_budget} tokens; "
                f"use --floor {selector.min_budget} or more"
            )
        if budget < least:
            other = "a selector with a smaller window, such as --selector snapkv:window=16"
            if least > selector.min_budget + 1:
                other = f"a lower --floor ({selector.name} always keeps {selector.min_budget})"
            raise BudgetError(
                f"the budget is {budget}, below the floor of {least}; use --budget {least} or more, or {other}"
            )
        if budget >= self.longest:
            raise BudgetError(
                f"the budget is {budget}, but the longest prompt of the task has {self.longest} tokens: nothing "
                f"would be evicted; use a --budget below {self.longest}"
            )
        if most < budget:
            raise BudgetError(f"the ceiling is {most}, below the budget of {budget}; raise --ceiling")
        if self.ceilings.mean() < budget:
            raise BudgetError(
                f"the budget is {budget}, but with its sliding windows this model holds at most "
                f"{self.ceilings.mean():.0f} entries per head on average; use a smaller --budget"
            )
        if budget * self.layers in (self.floors.sum(), self.ceilings.sum()):
            raise BudgetError(
                f"a budget of {budget} with floor {least} and ceiling {most} leaves one allocation "
                "and nothing to search; change the budget, the floor or the ceiling"
            )
        return budget

    def matrix(self, candidate: np.ndarray) -> np.ndarray:
        """A candidate as ``[layers, kv_heads]``."""
        column = candidate if candidate.ndim == 2 else candidate[:, None]
        return np.ascontiguousarray(np.broadcast_to(column, (self.layers, self.heads)))

    def completed(self, budgets: np.ndarray, budget: int) -> np.ndarray:
        """Budgets ``[layers, kv_heads]`` brought to exactly the total of another budget."""
        found = budgets if self.granularity == "head" else budgets.mean(axis=1)
        return self.matrix(expand(found, budget, self.floor, self.ceilings))

    def heuristics(self, budget: int) -> dict[str, np.ndarray]:
        """The allocations that a result has to beat."""
        return {
            name: self.matrix(layout(name, self.shape, budget, self.selector, self.ceilings, self.floor))
            for name in HEURISTICS
        }

    def start(self, given: str | BudgetProfile | np.ndarray | None, budget: int) -> np.ndarray | None:
        """Where a search at a budget starts, of `shape`; None for uniform. Budgets are brought to the total.

        Raises:
            UsageError: for an unknown name, or a profile of another model.
        """
        if given is None:
            return None
        if isinstance(given, str):
            if given not in HEURISTICS:
                raise unknown_name("start", given, HEURISTICS)
            budgets = self.heuristics(budget)[given]
        elif isinstance(given, BudgetProfile):
            given.check_model(self.model)
            budgets = self.completed(np.asarray(given.budgets), budget)
        else:
            budgets = self.completed(given, budget)
        return budgets if self.granularity == "head" else budgets[:, 0]

    def engine(self, split: Literal["train", "validation"], on_progress: Callable[[int, int], None]) -> Engine:
        """An engine over the examples of a split; those of training are held for many calls."""
        examples = self.train if split == "train" else self.held_out
        if self.engine_name == "naive":
            return NaiveEngine(
                self.model, self.tokenizer, examples, self.selector, self.metric, on_progress, self.prefill_chunk
            )
        if self._backend is None:
            self._backend = self._make_backend()
        return ShardedEngine(
            self._backend, examples, self.selector, self.metric, self.ceiling, split == "train", on_progress
        )

    def close(self) -> None:
        """Ends the workers of replay."""
        if self._backend is not None:
            self._backend.close()

    def describe(self) -> dict[str, Any]:
        """What identifies the search, as plain JSON values."""
        info = describe_model(self.model)
        return {
            "model": {"name": info.name, "fingerprint": info.fingerprint},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "task": format_spec(self.task),
            "metric": self.metric,
            "protocol": self.protocol,
            "selector": self.selector.to_dict(),
            "granularity": self.granularity,
            "seed": self.seed,
            "lam": self.lam,
            "gamma": self.gamma,
            "floor": self.floor,
            "ceiling": self.ceiling,
            "engine": self.engine_name,
            # Left out where it says nothing: studies from before it existed go on.
            **({"least": int(self.floors.min())} if self.floors.min() < self.floor else {}),
            **({} if self.prefill_chunk is None else {"prefill_chunk": self.prefill_chunk}),
            "train": {"n": len(self.train), "fingerprint": fingerprint(self.train)},
            "validation": {"n": len(self.held_out), "fingerprint": fingerprint(self.held_out)},
        }


def _check_unseen(train: Sequence[Example], held_out: Sequence[Example]) -> None:
    known = {(example.prompt, example.later) for example in train}
    twice = [example.id for example in held_out if (example.prompt, example.later) in known]
    if twice:
        raise UsageError(
            f"{len(twice)} of {len(held_out)} validation examples are training examples too, such as {twice[0]}, so "
            "that nothing would be chosen on unseen ones; give the task more rows, or use a smaller --train or --val"
        )


def _at_least_one(name: str, value: int) -> int:
    if not is_whole(value) or value < 1:
        raise UsageError(f"--{name} is {value!r}; use a whole number, at least one example")
    return value
