"""A search, from settings to profile: evolve, then choose on examples that the search never saw."""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from evolkv.errors import UsageError
from evolkv.evaluation.engine import Engine
from evolkv.evaluation.shards import Backend
from evolkv.evolution.backends import BackendName, backend_maker
from evolkv.evolution.choose import choose, rows_from
from evolkv.evolution.evolve import Evolution, Rotation, evolve
from evolkv.evolution.kept import kept_positions
from evolkv.evolution.plan import START, EngineName, Granularity, Plan
from evolkv.evolution.progress import OnProgress, SearchProgress
from evolkv.evolution.result import SearchResult, Validated, as_lists, as_rows, without_seconds
from evolkv.evolution.rivals import best_of, under_each_selector
from evolkv.evolution.settings import Start, StrategySettings
from evolkv.profile import BudgetProfile
from evolkv.selectors import Selector, SelectorSpec, get_selector
from evolkv.tasks import Task, get_task
from evolkv.tasks.protocol import AWARE
from evolkv.version import __version__

if TYPE_CHECKING:
    from evolkv.evolution.study import Study

log = logging.getLogger(__name__)


@under_each_selector(best_of)
def search(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    task: str | Task | Sequence[str | Task],
    budget: int,
    selector: SelectorSpec | Sequence[SelectorSpec] = "snapkv",
    strategy: str = "joint",
    granularity: Granularity = "layer",
    metric: str = "logprob",
    protocol: str = AWARE,
    train: int = 12,
    val: int = 24,
    max_evals: int | None = None,
    minibatch: int | None = None,
    population: int | None = None,
    sigma: float | None = None,
    group_size: int = 8,
    lam: float = 0.3,
    gamma: float = 0.2,
    floor: int | None = None,
    ceiling: int | None = None,
    start: str | BudgetProfile | None = None,
    seed: int = 0,
    engine: EngineName = "replay",
    prefill_chunk: int | None = None,
    backend: BackendName | Callable[[], Backend] = "local",
    workers: int | None = None,
    storage: str | None = None,
    study: str = "search",
    on_progress: OnProgress | None = None,
) -> SearchResult:
    """Evolves a profile: how many cache entries each layer (or KV head) needs for a task.

    Args:
        model: a transformers decoder-only model.
        tokenizer: its tokenizer.
        task: a task or its spec, such as ``"niah:context=1600"``; of several, each gives as many examples.
        budget: target, in cache entries per KV head, averaged over layers and heads.
        selector: which tokens a budget keeps; a name, or a mapping with the name and parameters. Of several each gets
            a search of its own, and what does best on the validation examples is returned, with `rivals`.
        strategy: "joint" (one CMA-ES at exactly the target memory), "evolkv" (the paper's Algorithm 1) or "random".
        granularity: "layer" (one budget per layer) or "head" (one per KV head; not for "evolkv").
        metric: what to maximise: "logprob" (smooth; the default) or a text metric.
        protocol: "aware" (the question is in the prompt that is compressed; the default) or "agnostic" (the context is
            compressed before the question is seen); see `evolkv.tasks.protocol`.
        train: examples that candidates are scored on.
        val: examples, none of them seen in training, that the result is chosen on.
        max_evals: candidates to evaluate at most. A search ends with its last whole generation, unless the first one is
            more already. Default: as many generations as 16 candidates per variable take, or 1,200 if that is less;
            for "evolkv" 10 generations per group.
        minibatch: training examples that each generation of "joint" is scored on, all of them in turn. Default: 2 with
            the metric "logprob", else all.
        population: candidates per generation. Default: 4 + ⌊3 ln n⌋ for n variables.
        sigma: initial step. Default 0.3 (in units of the budget) for "evolkv", 0.5 (in log budgets) for "joint",
            0.7 with head granularity.
        group_size: layers per group of "evolkv".
        lam: weight λ of the cache score in the fitness.
        gamma: discount γ for budgets below the target.
        floor: the least a head may get. Default: one more than the tokens the selector always keeps.
        ceiling: the most a head may get. Default: the longest training prompt.
        start: allocation that "joint" starts from: "uniform" (the default), "pyramid", or a profile, which is brought
            to the budget.
        seed: of the examples and the strategy. The same seed on the same machine gives the same history.
        engine: "replay" (prefill once per example) or "naive" (once per candidate and example).
        prefill_chunk: tokens of the chunks in which prompts are read, evicting after each, as `CompressedCache` does:
            for a model that will be run so. Needs engine "naive", and so as many prefills as there are candidates and
            examples: start from a profile that was found without. Default: all at once.
        backend: where replay runs: "local" (threads of this process), "ray" (see
            `evolkv.evaluation.on_ray.RayBackend`), or a function that makes a backend.
        workers: threads, or Ray workers. Default: one per core, or one per GPU.
        storage: an Optuna storage URL, or the path of a file, in which every generation is recorded. A search whose
            study is there already goes on where it was left, and comes to the same result. Default: none.
        study: name of the study in the storage.
        on_progress: called as the search goes on.

    Returns:
        The profile, every evaluation and the validation scores. KeyboardInterrupt during the search ends it early: the
        result then holds the fittest candidate so far (where generations are scored on different examples, the mean of
        the distribution), and says that it was interrupted.

    Raises:
        UsageError: for settings that cannot be used (`BudgetError`, `TaskError`, … name the kind); `StudyError` if the
            study was made with other settings, or another process is at it.
        RunError: if memory does not suffice, or what was found cannot be recorded.
        KeyboardInterrupt: if interrupted before the first generation was scored.
    """
    started = time.perf_counter()
    # Of several, `under_each_selector` passes one.
    assert isinstance(selector, (str, Mapping, Selector))
    with session(
        model,
        tokenizer,
        task=task,
        selector=selector,
        strategy=strategy,
        granularity=granularity,
        metric=metric,
        protocol=protocol,
        train=train,
        val=val,
        max_evals=max_evals,
        minibatch=minibatch,
        population=population,
        sigma=sigma,
        group_size=group_size,
        lam=lam,
        gamma=gamma,
        floor=floor,
        ceiling=ceiling,
        seed=seed,
        engine=engine,
        prefill_chunk=prefill_chunk,
        backend=backend,
        workers=workers,
        on_progress=on_progress,
    ) as running:
        budget = running.plan.check(budget)
        running.open_study(storage, study, [budget], start)
        evolution = running.evolve(budget, start)
        choices = running.choices(budget, evolution)
        validation: list[Validated] = []
        if not evolution.interrupted:
            validation = running.choose({str(budget): choices}).get(str(budget), [])
        took = time.perf_counter() - started + evolution.recorded_seconds
        return running.result(budget, evolution, choices, validation, took)


@contextmanager
def session(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    task: str | Task | Sequence[str | Task],
    selector: SelectorSpec,
    strategy: str,
    max_evals: int | None,
    minibatch: int | None,
    population: int | None,
    sigma: float | None,
    group_size: int,
    seed: int,
    backend: BackendName | Callable[[], Backend],
    workers: int | None,
    on_progress: OnProgress | None,
    **plan: Any,
) -> Iterator[Session]:
    """A checked search with everything that has to be closed after it; arguments as for `search`."""
    settings = StrategySettings(strategy, max_evals, population, sigma, group_size, minibatch, seed)
    if strategy == "evolkv" and plan["granularity"] == "head":
        raise UsageError("strategy 'evolkv' searches layers only; use --strategy joint for granularity 'head'")
    make = backend_maker(model, tokenizer, backend, workers, plan["engine"])
    checked = Plan(
        model, tokenizer, task=get_task(task), selector=get_selector(selector), seed=seed, backend=make, **plan
    )
    running = Session(checked, settings, on_progress or (lambda progress: None))
    try:
        yield running
    finally:
        running.close()


class Session:
    """A search under way: its settings, its study, and the engine over the training examples.

    Args:
        plan: what all budgets share.
        settings: how candidates are proposed.
        report: called as the search goes on.
    """

    def __init__(self, plan: Plan, settings: StrategySettings, report: OnProgress):
        self.plan, self.settings, self.report = plan, settings, report
        size = settings.examples_per_generation(plan.metric, len(plan.train))
        self.rotation = Rotation(len(plan.train), size, settings.seed)
        self.study: Study | None = None
        self._scorer: Engine | None = None
        self._start = "uniform"
        self._given: BudgetProfile | None = None

    def close(self) -> None:
        """Ends the workers and lets go of the study."""
        self.plan.close()
        if self.study is not None:
            self.study.close()

    def open_study(
        self, storage: str | None, name: str, budgets: Sequence[int], start: str | BudgetProfile | None
    ) -> None:
        """Creates a study, or continues one with the same settings; without a storage nothing is recorded."""
        if isinstance(start, BudgetProfile):
            digest = hashlib.sha256(np.ascontiguousarray(start.budgets).tobytes()).hexdigest()
            self._start, self._given = f"profile {digest[:16]}", start
        elif start is not None:
            self._start = start
        # Settings that no strategy can use are not put on record.
        self.settings.strategy(self.plan, budgets[0], start)
        shape = self.plan.shape
        whole, evaluations = self.settings.smallest(shape), self.settings.evaluations(shape)
        if self.settings.evaluations(shape, max(1, len(budgets) - 1)) < whole:
            log.warning(
                "--max-evals %d is less than one generation of %d candidates for each search: nothing can be learned "
                "from them",
                self.settings.max_evals,
                whole,
            )
        if storage is None:
            return
        from evolkv.evolution.study import Study

        identity = {
            **self.plan.describe(),
            **self.settings.describe(),
            "minibatch": self.rotation.size,
            "budgets": list(budgets),
            "start": self._start,
        }
        # Where it decides what the generations are.
        if len(budgets) > 1 or evaluations < whole:
            identity["max_evals"] = self.settings.max_evals
        self.study = Study.open(storage, name, identity)
        if not self.study.begun:
            self.study.put("versions", versions())
        # Not part of what identifies a search: one that goes on may have more of them.
        if self.study.get("max_evals") != evaluations:
            self.study.put("max_evals", evaluations)

    def evolve(self, budget: int, start: Start, share: int = 1, step: float = 1.0) -> Evolution:
        """Searches at one of `share` budgets that share the candidates; `step` is a factor on the default sigma."""
        total = self.settings.evaluations(self.plan.shape, share)
        strategy = self.settings.strategy(self.plan, budget, start, share, step)
        return evolve(self.plan, budget, strategy, total, self.rotation, self._engine, self.report, self.study)

    def choices(self, budget: int, evolution: Evolution) -> dict[str, np.ndarray]:
        """The allocations to choose from, each at exactly the target total."""
        evolved = {"best": np.array(evolution.best.budgets)}
        if evolution.mean is not None:
            evolved["mean"] = evolution.mean
        if self._given is not None:
            evolved[START] = self._given.budgets
        completed = {name: self.plan.completed(budgets, budget) for name, budgets in evolved.items()}
        return {**self.plan.heuristics(budget), **completed}

    def choose(self, choices: dict[str, dict[str, np.ndarray]]) -> dict[str, list[Validated]]:
        """Scores allocations on the validation examples, best first; what the study holds is not scored again.

        Returns nothing if interrupted.
        """
        key = "validation"
        asked = {name: {label: as_lists(b) for label, b in part.items()} for name, part in choices.items()}
        known = self.study.get(key) if self.study is not None else None
        if known is not None:
            found = {name: rows_from(rows) for name, rows in known.items()}
            if asked == {name: {row.name: row.budgets for row in rows} for name, rows in found.items()}:
                return found
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None
        engine = self.plan.engine("validation", lambda done, of: self.report(SearchProgress("validation", done, of)))
        try:
            found = choose(engine, choices)
        except KeyboardInterrupt:
            return {}
        if self.study is not None:
            self.study.put(key, {name: as_rows(rows) for name, rows in found.items()})
        return found

    def result(
        self,
        budget: int,
        evolution: Evolution,
        choices: dict[str, np.ndarray],
        validation: list[Validated],
        seconds: float,
    ) -> SearchResult:
        """The profile, and where it comes from. Without validation the evolved budgets are taken as they are."""
        plan, history = self.plan, evolution.history
        fallback = "best" if self.rotation.everything or evolution.mean is None else "mean"
        chosen = validation[0].name if validation else fallback
        budgets = np.array(validation[0].budgets) if validation else choices[fallback]
        interrupted = evolution.interrupted or not validation
        settings = {
            **plan.describe(),
            **self.settings.describe(),
            "minibatch": self.rotation.size,
            "start": self._start,
            "max_evals": self.settings.evaluations(plan.shape),
            "evaluations": len(history),
            "example_evaluations": sum(len(entry.scores or []) - (entry.scores or []).count(None) for entry in history),
            "chosen": chosen,
            "interrupted": interrupted,
            "versions": versions(),
        }
        for known in ("model", "granularity", "selector"):
            settings.pop(known)
        train = {}
        if np.array_equal(budgets, evolution.best.budgets):
            train["train"] = {"score": evolution.best.score, "n": self.rotation.size, "metric": plan.metric}
        profile = BudgetProfile.from_budgets(
            plan.model,
            budgets,
            selector=plan.selector.to_dict(),
            budget=budget,
            granularity=plan.granularity,  # type: ignore[arg-type]
            search=settings,
            scores={**train, "validation": {entry.name: entry.score for entry in validation}},
        )
        kept = None
        if not interrupted:
            try:
                kept = self._kept(profile)
            except KeyboardInterrupt:
                interrupted = True
        return SearchResult(
            profile=profile,
            history=[without_seconds(row) for row in as_rows(history)],
            validation=as_rows(validation),
            best=without_seconds(as_rows([evolution.best])[0]),
            chosen=chosen,
            improved=bool(validation) and validation[0].evolved,
            evaluations=len(history),
            seconds=seconds,
            interrupted=interrupted,
            settings=settings,
            kept=kept,
        )

    def _kept(self, profile: BudgetProfile) -> dict[str, Any]:
        plan = self.plan
        found = kept_positions(plan.model, plan.tokenizer, plan.held_out[0], profile, plan.prefill_chunk)
        if self.study is not None:
            self.study.put("kept", {**self.study.get("kept", {}), str(profile.budget): found})
        return found

    def _engine(self) -> Engine:
        if self._scorer is None:
            self._scorer = self.plan.engine("train", lambda done, of: self.report(SearchProgress("prefill", done, of)))
        return self._scorer


def versions() -> dict[str, str]:
    """Versions of what a search's result depends on."""
    import cma

    return {
        "evolkv": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cma": cma.__version__,
        "python": platform.python_version(),
    }
