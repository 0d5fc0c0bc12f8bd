"""A search under one selector, from settings to profile: evolve, then choose on examples that it did not train on."""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from evolkv.budgets import Budget
from evolkv.cache.compressed import CompressedCache
from evolkv.evaluation import records
from evolkv.evaluation.engine import Engine
from evolkv.evaluation.records import prompt_digest, seen_by
from evolkv.evolution.calibration import Calibration
from evolkv.evolution.choose import check_unseen, choose, rows_from
from evolkv.evolution.config import COMPUTED, GRADIENT, LUKV, START_ONLY, SearchConfig
from evolkv.evolution.engines import Engines
from evolkv.evolution.evolve import Beginning, Evolved, Rotation, evolve, make_strategy
from evolkv.evolution.gradient import SLOPE_EXAMPLES, STEP_AFTER, descend
from evolkv.evolution.kept import kept_positions
from evolkv.evolution.limit import TimeLimit
from evolkv.evolution.result import TIME_LIMIT, SearchResult, Validated, as_lists, as_rows, public_row
from evolkv.evolution.space import START, SearchSpace, Start
from evolkv.evolution.strategies import STRATEGIES
from evolkv.models import describe_model
from evolkv.profile import BudgetProfile
from evolkv.selectors import get_selector
from evolkv.tasks import fingerprint, format_spec, get_task
from evolkv.tasks.check import warn_of_short_answers
from evolkv.tasks.prompts import prompt_lengths
from evolkv.tasks.protocol import draw_examples

if TYPE_CHECKING:
    from evolkv.evolution.study import Study

log = logging.getLogger(__name__)

# Training examples of free text below which a search warns.
_FEW = 16


class Run:
    """A search under way, under one selector: its examples, its space, its engines and its study.

    Leaving its ``with`` block ends the workers and lets go of the study.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        config: the settings.
        limit: the time that it shares with other searches; None for no limit.
        begun: what was computed before evolution, by budget; what is computed now is added.
        evolves: whether evolution goes on from there.

    Raises:
        UsageError: for settings that cannot be used with this model, or a task that lacks examples.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        config: SearchConfig,
        limit: TimeLimit | None = None,
        begun: dict[int, Beginning] | None = None,
        evolves: bool = True,
    ):
        self._started = time.perf_counter()
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.limit = limit or TimeLimit(None)
        self._begun, self._evolves = {} if begun is None else begun, evolves
        self.task = get_task(config.task)
        # Now, because its file may be gone when the search ends.
        self.haystack = self.task.haystack_used()
        (self.selector,) = map(get_selector, config.selectors.values())
        if config.prefill_chunk is not None:
            # Refuses a selector or a model that cannot read in chunks, before anything is computed.
            some = BudgetProfile.uniform(model, self.selector.min_budget + 1, self.selector.to_dict())
            CompressedCache(model, some, prefill_chunk=config.prefill_chunk)
        how = (tokenizer, config.seed, config.protocol)
        self.train = draw_examples(self.task, "train", config.num_train, *how)
        self.held_out = draw_examples(self.task, "validation", config.val, *how)
        check_unseen(self.train, self.held_out)
        warn_of_short_answers(tokenizer, self.train, config.metric)
        self._seen_before = self._seen_by_start()
        if self.task.free_text and len(self.train) < _FEW:
            log.warning(
                "%d training examples are few for texts as people write them: scores on 10 %% of LongBench ranked "
                "budgets no better than chance, on 30 %% with a Kendall correlation of 0.75 (MOSAIC's authors); give "
                "--train %d or more, and mind the gap between training and validation examples at the end",
                len(self.train),
                _FEW,
            )
        lengths = prompt_lengths(tokenizer, self.train)
        self.space = SearchSpace(model, self.selector, config, max(lengths), min(lengths))
        self.rotation = Rotation(len(self.train), config.examples_per_generation, config.seed)
        #: Scores of the allocations that stood for choice on all training examples, by choice, then by name.
        self.trained: dict[str, dict[str, float]] = {}
        self.study: Study | None = None
        #: Where candidates are scored.
        self.engines = Engines(model, tokenizer, config, self.selector, self.space, self.task.balanced, self.limit)
        self._calibration = Calibration(config, self.space, self._scorer)
        self._stopped = False

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.engines.close()
        if self.study is not None:
            self.study.close()

    @property
    def seconds(self) -> float:
        """The seconds since it began."""
        return time.perf_counter() - self._started

    def open_study(self, targets: Sequence[Budget]) -> list[int]:
        """Create a study, or continue one with the same settings; without a storage nothing is recorded.

        Args:
            targets: the budgets of the search, or the shares of each prompt.

        Returns:
            The budgets of the longest training prompt, at which candidates are proposed.

        Raises:
            BudgetError: one that cannot be searched at.
        """
        config, shape = self.config, self.space.shape
        budgets = self.space.aim(targets)
        evaluations, whole = config.evaluations(shape), STRATEGIES[config.strategy].smallest(config, shape)
        # Made for its checks: settings that no strategy can use are not put on record.
        make_strategy(config, self.space, budgets[0], None if config.begins_at in COMPUTED else config.begins_at)
        if config.evaluations(shape, max(1, len(budgets) - 1)) < whole:
            log.warning(
                "--max-evals %d is less than one generation of %d candidates for each search: nothing can be learned "
                "from them",
                config.max_evals,
                whole,
            )
        if config.storage is None:
            return budgets
        from evolkv.evolution.study import Study

        identity = {
            **self.describe(),
            "minibatch": self.rotation.size,
            "budgets": list(budgets),
            **({"shares": [*self.space.shares.values()]} if self.space.shares else {}),
            "start": self._start_name,
        }
        # Only where it decides what the generations are.
        if len(budgets) > 1 or evaluations < whole:
            identity["max_evals"] = config.max_evals
        self.study = Study.open(config.storage, config.study, identity)
        if not self.study.begun:
            self.study.put("versions", versions())
            self.study.put("haystack", self.haystack)
            self._calibration.forget(self.study)
        # Not part of what identifies a search: a continued one may have more of them.
        if self.study.get("max_evals") != evaluations:
            self.study.put("max_evals", evaluations)
        return budgets

    def evolve(self, budget: int, start: Start, searches: int = 1, step: float = 1.0) -> Evolved:
        """Search at one of so many budgets that divide the candidates; `step` is a factor on the default sigma."""
        config, space = self.config, self.space
        if (before := self._begun.get(budget)) is None:
            before = self._begin(budget, start)
            # The evolution after a contest does not count this time again.
            self._begun[budget] = replace(before, recorded_seconds=0.0)
        if before.descent:
            # Nothing evolves from a descent that was stopped: a continued search finishes it first.
            if before.interrupted or before.out_of_time or not self._evolves:
                self.limit.next_search()
                return Evolved.none(before, before.interrupted)
            start, step = np.array(before.descent[-1].budgets), step * STEP_AFTER
        elif isinstance(start, str) and start == LUKV:
            start = before.lukv
        evolved = evolve(
            make_strategy(config, space, budget, start, searches, step),
            budget,
            config.evaluations(space.shape, searches),
            config=config,
            space=space,
            rotation=self.rotation,
            scorer=self._scorer,
            study=self.study,
            limit=self.limit,
            before=before,
        )
        self.limit.next_search()
        return evolved

    def _begin(self, budget: int, start: Start) -> Beginning:
        lukv = self._calibration.budgets(budget, self.study)
        if not (isinstance(start, str) and start == GRADIENT):
            return Beginning(lukv=lukv)
        descent, interrupted, recorded_seconds = descend(
            budget,
            config=self.config,
            space=self.space,
            rotation=Rotation(len(self.train), SLOPE_EXAMPLES, self.config.seed),
            scorer=self._scorer,
            study=self.study,
            limit=self.limit,
        )
        cut = not interrupted and len(descent) < self.config.gradient_steps
        return Beginning(descent, lukv, interrupted, cut, recorded_seconds)

    def start_at(self, budget: int, start: np.ndarray) -> np.ndarray:
        """Return the budgets that the search at a budget starts from: those on record, else these.

        With a time limit they go on record, because the search that they come from may go on and end elsewhere.
        """
        if self.study is None:
            return start
        if (recorded := self.study.get(f"start {budget}")) is not None:
            return np.array(recorded)
        if self.limit.is_set:
            self.study.put(f"start {budget}", start.tolist())
        return start

    def choices(self, budget: int, evolved: Evolved) -> dict[str, np.ndarray]:
        """Return the allocations to choose from, each at exactly the target total."""
        if self.config.strategy == START_ONLY:
            start = self.config.begins_at
            return {start if isinstance(start, str) else START: np.array(evolved.best.budgets)}
        # Without evolution the best is the descent's last step, which has its own name below.
        allocations = {"best": np.array(evolved.best.budgets)} if evolved.history else {}
        if evolved.mean is not None:
            allocations["mean"] = evolved.mean
        if evolved.before.descent:
            allocations[GRADIENT] = np.array(evolved.before.descent[-1].budgets)
        if evolved.before.lukv is not None:
            allocations[LUKV] = evolved.before.lukv
        if isinstance(self.config.start, BudgetProfile):
            allocations[START] = self.config.start.budgets
        completed = {name: self.space.completed(budgets, budget) for name, budgets in allocations.items()}
        return {**self.space.heuristics(budget), **completed}

    def choose(
        self, choices: dict[str, dict[str, np.ndarray]], interrupted: bool = False
    ) -> dict[str, list[Validated]]:
        """Score allocations on the validation examples, best first; what the study holds is not scored again.

        On all training examples, too, so that the gap can be told. If the search is or was interrupted, the last choice
        that the study holds stands; without one, nothing is returned.
        """
        # A study keeps two choices: the one among descents, and the one after evolution.
        fact = "validation" if self._evolves else "contest"
        asked = {name: {label: as_lists(b) for label, b in part.items()} for name, part in choices.items()}
        recorded: dict[str, list[Validated]] = {}
        if self.study is not None:
            recorded = {name: rows_from(rows) for name, rows in self.study.get(fact, {}).items()}
            self.trained = self.study.get("trained", {})
        if interrupted or asked == {name: {row.name: row.budgets for row in rows} for name, rows in recorded.items()}:
            return recorded
        try:
            # First the training examples, whose prompts are still held.
            trained = choose(self._scorer(), choices)
            self.engines.free()
            validated = choose(self.engines.unseen(self.held_out), choices)
        except KeyboardInterrupt:
            self._stopped = True
            return recorded
        self.trained = {name: {row.name: row.score for row in rows} for name, rows in trained.items()}
        if self.study is not None:
            self.study.put("trained", self.trained)
            self.study.put(fact, {name: as_rows(rows) for name, rows in validated.items()})
        return validated

    def result(
        self,
        budget: int,
        evolved: Evolved,
        choices: dict[str, np.ndarray],
        validation: list[Validated],
        seconds: float,
    ) -> SearchResult:
        """Return the profile, and where it comes from. Without validation the evolved budgets are taken as they are."""
        history, metric = evolved.history, self.config.metric
        fallback = "best" if self.rotation.everything or evolved.mean is None else "mean"
        fallback = fallback if history else GRADIENT
        if fallback not in choices:
            (fallback,) = choices
        chosen = validation[0].name if validation else fallback
        budgets = np.array(validation[0].budgets) if validation else choices[fallback]
        interrupted = evolved.interrupted or self._stopped or not validation
        settings = {
            **self.describe(),
            "minibatch": self.rotation.size,
            "start": self._start_name,
            "max_evals": self.config.evaluations(self.space.shape),
            "evaluations": len(history),
            "example_evaluations": sum(len(entry.scores or []) - (entry.scores or []).count(None) for entry in history),
            "chosen": chosen,
            "interrupted": interrupted,
            "versions": versions(),
            **({"prompt_tokens": self.space.longest} if self.space.shares else {}),
            # Not part of what identifies the search, which has the examples' fingerprints.
            **({} if self.haystack is None else {"haystack": self.haystack}),
        }
        if evolved.out_of_time:
            settings["stopped"] = TIME_LIMIT
        # A profile has fields for these.
        for name in ("model", "granularity", "selector"):
            settings.pop(name)
        score = self.trained.get(str(budget), {}).get(chosen)
        train = None if score is None else {"score": score, "n": len(self.train)}
        on_all = train
        if on_all is None and history and self.rotation.everything and np.array_equal(budgets, evolved.best.budgets):
            # Stopped before the choice, but evolution has scored its best candidate on all of them.
            on_all = {"score": evolved.best.score, "n": len(self.train)}
        profile = BudgetProfile.from_budgets(
            self.model,
            budgets,
            selector=self.selector.to_dict(),
            budget=budget,
            share=self.space.shares.get(budget),
            granularity=self.config.granularity,
            search={**settings, "seen": sorted({*self._seen_before, *map(prompt_digest, self.train + self.held_out)})},
            scores={
                **({} if on_all is None else {"train": {**on_all, "metric": metric}}),
                "validation": {entry.name: entry.score for entry in validation},
                "ci95": {entry.name: list(entry.ci95) for entry in validation},
            },
        )
        kept = None
        if not interrupted:
            try:
                kept = self._kept(profile)
            except KeyboardInterrupt:
                interrupted = True
        return SearchResult(
            profile=profile,
            history=[public_row(entry) for entry in history],
            validation=as_rows(validation),
            best=public_row(evolved.best),
            descent=[public_row(entry) for entry in evolved.before.descent],
            chosen=chosen,
            improved=bool(validation) and validation[0].evolved,
            evaluations=len(history),
            seconds=seconds,
            interrupted=interrupted,
            stopped=TIME_LIMIT if evolved.out_of_time else None,
            settings=settings,
            kept=kept,
            train=train,
        )

    def describe(self) -> dict[str, Any]:
        """Return what identifies the search, as plain JSON values."""
        config, info = self.config, describe_model(self.model)
        return {
            "model": {"name": info.name, "fingerprint": info.fingerprint},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "task": format_spec(self.task),
            "metric": config.metric,
            "protocol": config.protocol,
            "selector": self.selector.to_dict(),
            "granularity": config.granularity,
            "seed": config.seed,
            "lam": config.lam,
            "gamma": config.gamma,
            "floor": self.space.floor,
            "ceiling": self.space.ceiling,
            "engine": config.engine,
            # Left out at their defaults, so that studies from before they existed can be continued.
            **({"least": int(self.space.floors.min())} if self.space.floors.min() < self.space.floor else {}),
            **({"balanced": True} if self.task.balanced else {}),
            **({} if config.prefill_chunk is None else {"prefill_chunk": config.prefill_chunk}),
            **({"gradient_steps": config.gradient_steps} if config.follows_slope else {}),
            "train": {"n": len(self.train), "fingerprint": fingerprint(self.train)},
            "validation": {"n": len(self.held_out), "fingerprint": fingerprint(self.held_out)},
            **STRATEGIES[config.strategy].identity(config),
        }

    @property
    def _start_name(self) -> str:
        start = self.config.begins_at
        if isinstance(start, BudgetProfile):
            return f"profile {hashlib.sha256(np.ascontiguousarray(start.budgets).tobytes()).hexdigest()[:16]}"
        return start

    def _seen_by_start(self) -> set[str]:
        """Return the names of the examples that the profile to start from was found on; warn of a choice on them."""
        start = self.config.start
        if not isinstance(start, BudgetProfile):
            return set()
        seen = seen_by(start)
        if again := sum(prompt_digest(example) in seen for example in self.held_out):
            log.warning(
                "the profile to start from was evolved or chosen on %d of the %d validation examples, where it may "
                "look better than it is; another --seed draws others",
                again,
                len(self.held_out),
            )
        return seen

    def _kept(self, profile: BudgetProfile) -> dict[str, Any] | None:
        if self.study is not None and self.limit.over:
            recorded: dict[str, Any] | None = self.study.get("kept", {}).get(str(profile.budget))
            return recorded
        kept = kept_positions(self.model, self.tokenizer, self.held_out[0], profile, self.config.prefill_chunk)
        if self.study is not None:
            self.study.put("kept", {**self.study.get("kept", {}), str(profile.budget): kept})
        return kept

    def _scorer(self) -> Engine:
        self.limit.compute()
        return self.engines.training(self.train)


def versions() -> dict[str, str]:
    """Return the versions of what a search's result depends on."""
    import cma

    return {**records.versions(), "cma": cma.__version__, "python": platform.python_version()}
