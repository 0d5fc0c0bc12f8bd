"""The search loop: ask, score, tell; then choose on examples the search never saw."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

import evolkv
from evolkv.allocators import complete, pyramid, uniform
from evolkv.cache.compressed import sliding_windows
from evolkv.errors import BudgetError, UsageError
from evolkv.evaluate.engine import Engine
from evolkv.evaluate.intervals import ci95
from evolkv.evaluate.naive import NaiveEngine
from evolkv.evaluate.replay import ReplayEngine
from evolkv.models import describe_model
from evolkv.profile import BudgetProfile
from evolkv.registry import unknown_name
from evolkv.search.objective import cache_score, fitness
from evolkv.search.result import Evaluation, SearchResult, Validated, as_lists, as_rows
from evolkv.search.strategies import STRATEGIES, GroupedCMA, JointCMA, RandomSearch, Strategy
from evolkv.selectors import Selector, get_selector
from evolkv.tasks import Example, Task, encode_prompt, fingerprint, format_spec, get_task
from evolkv.tasks.metrics import METRIC_NAMES

Stage = Literal["prefill", "search", "validation"]
EngineName = Literal["replay", "naive"]


@dataclass(frozen=True)
class SearchProgress:
    """Where a search stands.

    Args:
        stage: what it is doing.
        done: steps done in this stage (examples, candidates, examples).
        total: steps of this stage.
        best: highest fitness so far, or None.
        score: score of the fittest candidate so far, or None.
    """

    stage: Stage
    done: int
    total: int
    best: float | None = None
    score: float | None = None


OnProgress = Callable[[SearchProgress], None]


def search(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    task: str | Task,
    budget: int,
    selector: str | dict[str, Any] | Selector = "snapkv",
    strategy: str = "joint",
    granularity: Literal["layer", "head"] = "layer",
    metric: str = "logprob",
    train: int = 12,
    val: int = 24,
    max_evals: int | None = None,
    population: int | None = None,
    sigma: float | None = None,
    group_size: int = 8,
    lam: float = 0.3,
    gamma: float = 0.2,
    floor: int | None = None,
    ceiling: int | None = None,
    seed: int = 0,
    engine: EngineName = "replay",
    on_progress: OnProgress | None = None,
) -> SearchResult:
    """Evolves a profile: how many cache entries each layer (or KV head) needs for a task.

    Args:
        model: a transformers decoder-only model.
        tokenizer: its tokenizer.
        task: a task or its spec, such as ``"niah:context=1600"``.
        budget: target, in cache entries per KV head, averaged over layers and heads.
        selector: which tokens a budget keeps; a name, or a mapping with the name and parameters.
        strategy: "joint" (one CMA-ES at exactly the target memory), "evolkv" (the paper's Algorithm 1) or "random".
        granularity: "layer" (one budget per layer) or "head" (one per KV head; not for "evolkv").
        metric: what to maximise: "logprob" (smooth; the default) or a text metric.
        train: examples that candidates are scored on.
        val: examples, none of them seen in training, that the result is chosen on.
        max_evals: candidates to evaluate at most, in whole generations. Default: 16 per variable, at most 1,200; for
            "evolkv" 10 generations per group.
        population: candidates per generation. Default: 4 + ⌊3 ln n⌋ for n variables.
        sigma: initial step. Default 0.3 (in units of the budget) for "evolkv", 0.5 (in log budgets) for "joint",
            0.7 with head granularity.
        group_size: layers per group of "evolkv".
        lam: weight λ of the cache score in the fitness.
        gamma: discount γ for budgets below the target.
        floor: the least a head may get. Default: one more than the tokens the selector always keeps.
        ceiling: the most a head may get. Default: the longest training prompt.
        seed: of the examples and the strategy. The same seed on the same machine gives the same history.
        engine: "replay" (prefill once per example) or "naive" (once per candidate and example).
        on_progress: called as the search goes on.

    Returns:
        The profile, every evaluation and the validation scores. KeyboardInterrupt during the search ends it early: the
        result then holds the fittest candidate so far, and says that it was interrupted.

    Raises:
        UsageError: for settings that cannot be used (`BudgetError`, `TaskError`, … name the kind).
        RunError: if memory does not suffice.
        KeyboardInterrupt: if interrupted before the first generation was scored.
    """
    started = time.perf_counter()
    plan = _Plan(
        model, tokenizer, get_task(task), budget, get_selector(selector), granularity, metric, engine, lam, gamma
    )
    if strategy not in STRATEGIES:
        raise unknown_name("strategy", strategy, STRATEGIES)
    report = on_progress or (lambda progress: None)
    examples = plan.task.examples("train", _at_least_one("train", train), tokenizer, seed)
    held_out = plan.task.examples("validation", _at_least_one("val", val), tokenizer, seed)
    plan.set_bounds(examples, floor, ceiling)
    searcher: Strategy
    if strategy == "evolkv":
        if granularity == "head":
            raise UsageError("strategy 'evolkv' searches layers only; use --strategy joint for granularity 'head'")
        searcher, total = _grouped(plan, max_evals, population, sigma, group_size, seed)
    else:
        searcher, total = _joint_or_random(plan, strategy, max_evals, population, sigma, seed)

    scorer = plan.engine(examples, lambda done, of: report(SearchProgress("prefill", done, of)))
    history: list[Evaluation] = []
    best: Evaluation | None = None
    interrupted = False
    try:
        while not searcher.done and len(history) < total:
            group, generation = searcher.group, searcher.generation
            candidates = [plan.matrix(candidate) for candidate in searcher.ask()]
            scores = scorer.score(np.stack(candidates)).mean(axis=1)
            evaluations = []
            for candidate, score in zip(candidates, scores.tolist(), strict=True):
                mean = float(candidate[group].mean())
                evaluations.append(
                    Evaluation(
                        as_lists(candidate),
                        float(fitness(score, mean, budget, lam=lam, gamma=gamma)),
                        score,
                        float(cache_score(mean, budget, gamma=gamma)),
                        generation,
                    )
                )
            searcher.tell([entry.fitness for entry in evaluations])
            history += evaluations
            fittest = max(evaluations, key=lambda entry: entry.fitness)
            if best is None or fittest.fitness > best.fitness:
                best = fittest
            report(SearchProgress("search", min(len(history), total), total, best.fitness, best.score))
    except KeyboardInterrupt:
        interrupted = True
    if best is None:
        raise KeyboardInterrupt
    del scorer

    choices = {"best": plan.completed(np.array(best.budgets))}
    if searcher.mean is not None:
        choices["mean"] = plan.completed(plan.matrix(searcher.mean))
    validation: list[Validated] = []
    if not interrupted:
        try:
            validation = _validate(plan, held_out, choices, report)
        except KeyboardInterrupt:
            interrupted = True
    chosen = validation[0].name if validation else "best"
    budgets = np.array(validation[0].budgets) if validation else choices["best"]
    settings = {
        "task": format_spec(plan.task),
        "metric": metric,
        "strategy": strategy,
        "seed": seed,
        "evaluations": len(history),
        "max_evals": total,
        "lam": lam,
        "gamma": gamma,
        "floor": plan.least,
        "ceiling": plan.most,
        "engine": engine,
        "train": {"n": len(examples), "fingerprint": fingerprint(examples)},
        "validation": {"n": len(held_out), "fingerprint": fingerprint(held_out)},
        "chosen": chosen,
        "interrupted": interrupted,
        "versions": _versions(),
    }
    profile = BudgetProfile.from_budgets(
        model,
        budgets,
        selector=plan.selector.to_dict(),
        budget=budget,
        granularity=granularity,
        search=settings,
        scores={
            "train": {"score": best.score, "n": len(examples), "metric": metric},
            "validation": {entry.name: entry.score for entry in validation},
        },
    )
    return SearchResult(
        profile=profile,
        history=as_rows(history),
        validation=as_rows(validation),
        chosen=chosen,
        improved=bool(validation) and validation[0].evolved,
        evaluations=len(history),
        seconds=time.perf_counter() - started,
        interrupted=interrupted,
        settings=settings,
    )


class _Plan:
    """The settings of a search, checked, and what follows from them."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        task: Task,
        budget: int,
        selector: Selector,
        granularity: str,
        metric: str,
        engine: str,
        lam: float,
        gamma: float,
    ):
        if granularity not in ("layer", "head"):
            raise unknown_name("granularity", granularity, ("layer", "head"))
        if engine not in ("replay", "naive"):
            raise unknown_name("engine", engine, ("replay", "naive"))
        if metric not in METRIC_NAMES:
            raise unknown_name("metric", metric, METRIC_NAMES)
        # Checks its arguments, long before the first candidate would.
        fitness(0.0, 1.0, 1.0, lam=lam, gamma=gamma)
        if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)) or budget < 1:
            raise BudgetError(f"the budget is {budget!r}; expected a whole number of cache entries per KV head")
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.budget, self.selector, self.granularity = int(budget), selector, granularity
        self.metric, self.engine_name = metric, engine
        info = describe_model(model)
        self.layers, self.heads = info.num_layers, info.num_kv_heads
        self.windows = sliding_windows(model)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is searched."""
        return (self.layers, self.heads) if self.granularity == "head" else (self.layers,)

    def set_bounds(self, examples: list[Example], floor: int | None, ceiling: int | None) -> None:
        """Checks floor, budget and ceiling against the examples and each other."""
        longest = max(encode_prompt(self.tokenizer, example).shape[1] for example in examples)
        self.least = floor if floor is not None else self.selector.min_budget + 1
        self.most = ceiling if ceiling is not None else longest
        if self.least < self.selector.min_budget:
            raise BudgetError(
                f"the floor is {self.least}, but {self.selector.name} always keeps {self.selector.min_budget} tokens; "
                f"use --floor {self.selector.min_budget} or more"
            )
        if self.budget < self.least:
            raise BudgetError(
                f"the budget is {self.budget}, below the floor of {self.least}; use --budget {self.least} or more, "
                "a lower --floor, or a selector with a smaller window"
            )
        if self.budget >= longest:
            raise BudgetError(
                f"the budget is {self.budget}, but the longest prompt of the task has {longest} tokens: nothing "
                f"would be evicted; use a --budget below {longest}"
            )
        if self.most < self.budget:
            raise BudgetError(f"the ceiling is {self.most}, below the budget of {self.budget}; raise --ceiling")
        #: Entries beyond a layer's own window would never be held.
        self.ceilings = np.array([self.most if w is None else min(self.most, w) for w in self.windows])
        if self.ceilings.mean() < self.budget:
            raise BudgetError(
                f"the budget is {self.budget}, but with its sliding windows this model holds at most "
                f"{self.ceilings.mean():.0f} entries per head on average; use a smaller --budget"
            )

        total, room = self.budget * self.layers, int(self.ceilings.sum())
        if total in (self.least * self.layers, room):
            raise BudgetError(
                f"a budget of {self.budget} with floor {self.least} and ceiling {self.most} leaves one allocation "
                "and nothing to search; change the budget, the floor or the ceiling"
            )

    def matrix(self, candidate: np.ndarray) -> np.ndarray:
        """A candidate as ``[layers, kv_heads]``."""
        column = candidate if candidate.ndim == 2 else candidate[:, None]
        return np.ascontiguousarray(np.broadcast_to(column, (self.layers, self.heads)))

    def completed(self, budgets: np.ndarray) -> np.ndarray:
        """Budgets ``[layers, kv_heads]`` brought to exactly the target total."""
        if self.granularity == "head":
            target = self.budget * self.layers * self.heads
            return complete(budgets, target, self.least, np.broadcast_to(self.ceilings[:, None], budgets.shape))
        return self.matrix(complete(budgets[:, 0], self.budget * self.layers, self.least, self.ceilings))

    def heuristics(self) -> dict[str, np.ndarray]:
        """The allocations that the result has to beat."""
        window = getattr(self.selector, "window", 0)
        shape = pyramid(self.layers, self.budget, window=min(window, self.budget - 1), ceiling=self.most)
        found = {"uniform": uniform(self.layers, self.budget), "pyramid": shape}
        return {name: self.completed(self.matrix(np.asarray(budgets))) for name, budgets in found.items()}

    def engine(self, examples: list[Example], on_progress: Callable[[int, int], None], hold: bool = True) -> Engine:
        """An engine over some examples; `hold` their prefill if they are to be scored more than once."""
        if self.engine_name == "naive":
            return NaiveEngine(self.model, self.tokenizer, examples, self.selector, self.metric, on_progress)
        return ReplayEngine(
            self.model,
            self.tokenizer,
            examples,
            self.selector,
            self.metric,
            ceiling=self.most,
            hold=hold,
            on_progress=on_progress,
        )


def _grouped(
    plan: _Plan,
    max_evals: int | None,
    population: int | None,
    sigma: float | None,
    group_size: int,
    seed: int,
) -> tuple[GroupedCMA, int]:
    sizes = [min(group_size, plan.layers - start) for start in range(0, plan.layers, max(1, group_size))]
    per_generation = sum(population or 4 + math.floor(3 * math.log(size)) for size in sizes)
    generations = 10 if max_evals is None else max(1, max_evals // per_generation)
    strategy = GroupedCMA(
        num_layers=plan.layers,
        budget=plan.budget,
        group_size=group_size,
        sigma=0.3 if sigma is None else sigma,
        generations=generations,
        population=population,
        floor=plan.least,
        ceiling=plan.ceilings,
        seed=seed,
    )
    return strategy, generations * per_generation


def _joint_or_random(
    plan: _Plan, name: str, max_evals: int | None, population: int | None, sigma: float | None, seed: int
) -> tuple[JointCMA | RandomSearch, int]:
    size = math.prod(plan.shape)
    head = plan.granularity == "head"
    total = max_evals if max_evals is not None else min(1200, 16 * size)
    if total < 1:
        raise UsageError(f"--max-evals is {total}; evaluate at least one candidate")
    ceilings = np.broadcast_to(plan.ceilings[:, None], plan.shape) if head else plan.ceilings
    common: dict[str, Any] = {
        "shape": plan.shape,
        "budget": plan.budget,
        "population": population,
        "floor": plan.least,
        "ceiling": ceilings,
        "seed": seed,
    }
    if name == "random":
        return RandomSearch(**common), total
    return JointCMA(**common, sigma=sigma if sigma is not None else (0.7 if head else 0.5)), total


def _validate(
    plan: _Plan, examples: list[Example], evolved: dict[str, np.ndarray], report: OnProgress
) -> list[Validated]:
    """Scores the evolved allocations beside the heuristics; of equals a heuristic comes first."""
    choices = {**plan.heuristics(), **evolved}
    engine = plan.engine(examples, lambda done, of: report(SearchProgress("validation", done, of)), hold=False)
    scores = engine.score(np.stack(list(choices.values())))
    # Two allocations whose scores differ by no more than rounding are equal, and of equals a heuristic is chosen.
    digits = 4
    rows = [
        Validated(
            name,
            name in evolved,
            as_lists(budgets),
            round(float(scores[i].mean()), digits),
            ci95(scores[i]),
            len(examples),
        )
        for i, (name, budgets) in enumerate(choices.items())
    ]
    return sorted(rows, key=lambda row: (-row.score, row.evolved))


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise UsageError(f"--{name} is {value}; use at least one example")
    return value


def _versions() -> dict[str, str]:
    import cma

    return {
        "evolkv": evolkv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cma": cma.__version__,
        "python": platform.python_version(),
    }
