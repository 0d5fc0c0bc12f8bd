"""A whole search. Of several selectors each gets a descent, and evolution goes on under the one that did best.

How far budgets can go depends on the selector whose ranking they cut (docs/results.md), and which selector suits a task
is seldom known beforehand. All are validated on the same examples, so their scores compare. Where the metric has no
slope there is no descent, and each selector gets a whole search.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedModel

from evolkv.budgets import Budget, Share, size_of
from evolkv.errors import enough_memory
from evolkv.evolution.backends import SharedBackend, make_backend
from evolkv.evolution.bounds import default_floor, narrowed
from evolkv.evolution.config import ALONE, COMPETING, OneBudget, SearchConfig, SeveralBudgets
from evolkv.evolution.evolve import Beginning
from evolkv.evolution.limit import OutOfTimeError, TimeLimit
from evolkv.evolution.result import SearchResult
from evolkv.evolution.run import Run
from evolkv.evolution.strategies import STRATEGIES
from evolkv.models.forward import without_dropout
from evolkv.profile import BudgetProfile
from evolkv.selectors import SelectorSpec, get_selector
from evolkv.tasks import get_task
from evolkv.tasks.prompts import prompt_lengths
from evolkv.tasks.protocol import draw_examples

log = logging.getLogger(__name__)


class _Result(Protocol):
    @property
    def interrupted(self) -> bool: ...

    @property
    def seconds(self) -> float: ...

    def out_of_time(self) -> Any: ...

    def followed_by(self, later: Any) -> Any: ...


Config = TypeVar("Config", bound=OneBudget | SeveralBudgets)
Result = TypeVar("Result", bound=_Result)


def whole_search(
    model: PreTrainedModel,
    tokenizer: Any,
    config: Config,
    search: Callable[[Run, Config], Result],
    score: Callable[[Result], float | None],
    best: Callable[[list[Result], bool], Result],
) -> Result:
    """Run a search under its selector, or under each of several in turn.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        config: the settings.
        search: searches under one selector.
        score: by which the results of several selectors are compared; None, for one without a choice, counts as 0.
        best: makes one result of theirs; it is told whether some selector's search did not come to its end.

    Raises:
        RunError: if memory does not suffice.
        KeyboardInterrupt: if interrupted before the first step or generation was scored, or twice.
    """
    config = settled(tokenizer, config)
    selectors = {name: fitted(spec, config.targets) for name, spec in config.selectors.items()}
    balanced = get_task(config.task).balanced
    counts = (searches_of(config), len(config.targets), config.val, config.num_train)
    limit = TimeLimit(config.time_limit, *counts, balanced)

    def under_one(config: Config, begun: dict[int, Beginning], evolves: bool) -> Result:
        with Run(model, tokenizer, config, limit, begun, evolves) as run:
            return search(run, config)

    def under_all(config: Config) -> Result:
        if len(selectors) == 1:
            return under_one(replace(config, selector=[*selectors.values()]), {}, True)
        return best(*_under_each(model, tokenizer, config, selectors, under_one, score))

    less = "a smaller --ceiling, fewer --train and --val examples, and shorter prompts take less"
    kept = f"; what is done is in {config.storage}, and the same command goes on from there" if config.storage else ""
    with without_dropout(model), enough_memory("in the search", f"{less}{kept}"):
        result = under_all(config)
        if result.interrupted and config.storage is not None and not limit.computes:
            # Interrupted while it read its study. What was read until then is less than what is on record, and would
            # take its place in the files of the result.
            limit.over = True
            result = under_all(replace(config, on_progress=None))
            if result.interrupted and not limit.computes:
                raise KeyboardInterrupt
    return result


def settled(tokenizer: Any, config: Config) -> Config:
    """Return the settings with selectors: where none is given, those that compete by default and fit the budgets.

    Warns of settings that have no effect, and where no selector is that of the profile to start from.

    Args:
        tokenizer: of the model.
        config: the settings.
    """
    _warn_of_unused(config)
    start = config.start
    if isinstance(start, BudgetProfile) and (own := get_selector(start.selector).spec) not in config.selectors:
        log.warning(
            "the profile to start from is under %s, and the search under %s: the result has to beat the profile's "
            "budgets under another selector, not the profile",
            own,
            ", ".join(config.selectors),
        )
    if config.selector is not None:
        return config
    if not config.follows_slope:
        return replace(config, selector=ALONE)
    # How many entries a share is depends on the prompts.
    tokens = longest_prompt(tokenizer, config) if any(isinstance(target, Share) for target in config.targets) else 0
    least = min(target.of(tokens) if isinstance(target, Share) else target for target in config.targets)
    if config.floor is not None:
        least = min(least, config.floor + 2)
    return replace(config, selector=competing(config.protocol, least))


def _warn_of_unused(config: SearchConfig) -> None:
    """Warn of settings that are not the defaults and change nothing in a search such as this one."""
    used = dict.fromkeys(("max_evals", "population", "sigma"), STRATEGIES[config.strategy].searches)
    used |= {"group_size": config.strategy == "evolkv", "gradient_steps": config.follows_slope}
    changed = [name for name in used if getattr(config, name) != getattr(SearchConfig, name)]
    if unused := [f"--{name.replace('_', '-')}" for name in changed if not used[name]]:
        start = "a profile" if isinstance(config.begins_at, BudgetProfile) else config.begins_at
        log.warning(
            "not used, because the strategy is %s and the search starts from %s: %s",
            config.strategy,
            start,
            ", ".join(unused),
        )


def competing(protocol: str, least: int) -> list[str]:
    """Return the selectors that compete by default and leave the smallest budget something to choose, or the first.

    Args:
        protocol: of the search.
        least: the smallest budget, in cache entries.
    """
    known = COMPETING[protocol]
    # At the floor nothing is left to search.
    return [each for each in known if default_floor(get_selector(each)) < least] or [known[0]]


def fitted(spec: SelectorSpec, targets: Sequence[Budget]) -> SelectorSpec:
    """Return a selector as `narrowed` does, with a warning where its window shrinks."""
    narrower = narrowed(spec, targets)
    if narrower is not spec:
        chosen = get_selector(narrower)
        log.warning(
            "budget %d needs a smaller window: %s now uses window=%d at all budgets",
            *(min(targets, key=size_of), chosen.name, chosen.window),
        )
    return narrower


def longest_prompt(tokenizer: Any, config: SearchConfig) -> int:
    """Return the tokens of the longest training prompt."""
    drawn = draw_examples(get_task(config.task), "train", config.num_train, tokenizer, config.seed, config.protocol)
    return max(prompt_lengths(tokenizer, drawn))


def searches_of(config: SearchConfig) -> int:
    """Return how many searches there are at each budget, one after the other."""
    several = len(config.selectors)
    return several + (several > 1 and config.competes)


def _under_each(
    model: PreTrainedModel,
    tokenizer: Any,
    config: Config,
    selectors: Mapping[str, SelectorSpec],
    run: Callable[[Config, dict[int, Beginning], bool], Result],
    score: Callable[[Result], float | None],
) -> tuple[list[Result], bool]:
    """Run a search under each of several selectors in turn; of searches with a descent only the best one evolves.

    Prompts are prefilled once for all of them. Each search records to a study of its own, named ``STUDY/SELECTOR``.
    KeyboardInterrupt ends the search that runs, and those after it do not begin. So does a time limit that leaves too
    little for the next one.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        config: the settings of the searches.
        selectors: by the names that their studies get.
        run: runs the search under one selector; see `Run` for what else it takes.
        score: by which results are compared.

    Returns:
        The results, in the order of the selectors, and whether some selector's search did not come to its end.
    """
    backend = SharedBackend(lambda: make_backend(model, tokenizer, config), [*map(get_selector, selectors.values())])
    contest = config.competes
    begun: dict[str, dict[int, Beginning]] = {name: {} for name in selectors}
    results: dict[str, Result] = {}

    def search(name: str, evolves: bool) -> Result:
        own = replace(
            config,
            selector=selectors[name],
            study=f"{config.study}/{name}",
            backend=config.backend if config.engine == "naive" else lambda: backend,
            on_progress=lambda step: config.report(replace(step, selector=name)),
        )
        return run(own, begun[name], evolves)

    try:
        for name in selectors:
            results[name] = search(name, not contest)
            if results[name].interrupted:
                return [*results.values()], True
        if contest:
            winner = max(results, key=lambda name: score(results[name]) or 0.0)
            first, evolved = results[winner], search(winner, True)
            # The descent and the evolution are two parts of one search.
            took = first.seconds + evolved.seconds
            results[winner] = replace(first.followed_by(evolved), seconds=took)
            return [*results.values()], evolved.interrupted
    except OutOfTimeError:
        # The results of the selectors before stand; the same command goes on with the others.
        if not results:
            raise
        return [result.out_of_time() for result in results.values()], False
    except KeyboardInterrupt:
        if not results:
            raise
        return [*results.values()], True
    finally:
        backend.end()
    return [*results.values()], False


def best_of(results: list[SearchResult], interrupted: bool) -> SearchResult:
    """Return the result with the highest validation score, told of its rivals; see `whole_search`."""
    rivals = [
        {
            "selector": result.profile.selector,
            "chosen": result.chosen,
            "score": score_of(result),
            "evaluations": result.evaluations,
            "seconds": result.seconds,
        }
        for result in results
    ]
    complete = [result for result in results if result.validation] or results[:1]
    # On a tie, prefer the allocation that needed no search, as within a search.
    winner = max(complete, key=lambda it: (score_of(it) or 0.0, not it.improved))
    # Without times, which no two runs have in common: a search that goes on comes to the same profile.
    known: dict[str, Any] = {"rivals": [{key: row[key] for key in row if key != "seconds"} for row in rivals]}
    known["interrupted"] = interrupted
    return replace(
        winner,
        profile=replace(winner.profile, search={**winner.profile.search, **known}),
        settings={**winner.settings, **known},
        rivals=rivals,
        seconds=sum(result.seconds for result in results),
        interrupted=interrupted,
        stopped=next((result.stopped for result in results if result.stopped), None),
    )


def score_of(result: SearchResult) -> float | None:
    """Return a result's validation score as it compares with other selectors'; None after an interruption."""
    if not result.validation:
        return None
    chosen = result.validation[0]
    return float(chosen.get("retained", chosen["score"]))
