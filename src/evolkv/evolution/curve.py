"""Searches at several budgets as one: each starts from its neighbour, and all are chosen from together."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from evolkv.errors import UsageError
from evolkv.evolution.evolve import Evolution
from evolkv.evolution.plan import NOT_EVOLVED
from evolkv.evolution.result import SearchResult
from evolkv.evolution.rivals import best_of, under_each_selector
from evolkv.evolution.session import Session, search, session
from evolkv.models import describe_model
from evolkv.profile import BudgetProfile
from evolkv.registry import unknown_name
from evolkv.selectors import Selector, SelectorSpec, get_selector

FORMAT = "evolkv.curve/1"
Order = Literal["smallest", "largest"]
# A neighbour's budgets are near: the step from them is smaller than from uniform ones.
_STEP = 0.6

# Of the settings that one search and several have in common.
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(search).parameters.items()
    if parameter.default is not parameter.empty and name not in ("start", "storage", "study")
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CurveResult:
    """What searches at several budgets found.

    Args:
        results: one per budget, smallest first. After an interruption: of the budgets that were searched.
        points: for each of them ``budget, score, ci95, n, metric, kv_bytes, mean_budget, source, evaluations, selector,
            on_front``; `source` is "search", a heuristic or "expanded from …"; `on_front` says that no smaller budget
            does as well.
        seconds: wall-clock time of everything, of earlier runs as far as the study knows it.
        interrupted: whether it was stopped before its end.
    """

    results: list[SearchResult]
    points: list[dict[str, Any]]
    seconds: float
    interrupted: bool

    def to_dict(self, profiles: Sequence[str] = ()) -> dict[str, Any]:
        """The content of a ``--json`` file; `profiles` are the paths that the profiles were written to."""
        points = [dict(point) for point in self.points]
        for point, path in zip(points, profiles, strict=False):
            point["profile"] = path
        return {
            "format": FORMAT,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "points": points,
            "searches": [result.to_dict() for result in self.results],
        }


def _best_of_each(found: list[CurveResult], interrupted: bool) -> CurveResult:
    """For each budget the best of several selectors' results; see `under_each_selector`."""
    complete = [curve for curve in found if not curve.interrupted] or found[:1]
    results, points = [], []
    for number, row in enumerate(zip(*(curve.results for curve in complete), strict=True)):
        best = best_of(list(row), interrupted)
        winner = next(i for i, result in enumerate(row) if result.profile.selector == best.profile.selector)
        results.append(best)
        points.append(dict(complete[winner].points[number]))
    return CurveResult(results, _with_front(points), sum(curve.seconds for curve in found), interrupted)


def _fit(selector: SelectorSpec, settings: Mapping[str, Any]) -> SelectorSpec:
    """A selector given by name with a window that leaves the smallest budget something to choose."""
    if not isinstance(selector, str) or ":" in selector:
        return selector
    return _fitting(get_selector(selector), min(settings["budgets"]))


@under_each_selector(_best_of_each, _fit)
def search_curve(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    budgets: Sequence[int],
    selector: SelectorSpec | Sequence[SelectorSpec] = "snapkv",
    first: Order = "smallest",
    max_evals: int | None = None,
    start: str | BudgetProfile | None = None,
    storage: str | None = None,
    study: str = "search",
    **settings: Any,
) -> CurveResult:
    """Evolves a profile for each of several budgets, as one search.

    The prompts are prefilled once for all budgets. After the first budget each search starts from its neighbour's
    distribution. On the validation examples each budget then chooses among its own evolved budgets, the heuristics, and
    its neighbours' evolved budgets expanded to it (the paper's section 4 finds these hard to beat at low budgets).

    Args:
        model: a transformers decoder-only model.
        tokenizer: its tokenizer.
        budgets: the targets, at least two.
        selector: as for `evolkv.search`. Given by name, a window that would leave the smallest budget nothing to choose
            is halved until it does not.
        first: whether to begin with the "smallest" or the "largest" budget.
        max_evals: candidates for the first budget; all others together get as many again. Default: as for a single
            search.
        start: what the first search starts from.
        storage: as for `evolkv.search`, as all other settings.
        study: name of the study in the storage.
        **settings: see `evolkv.search`.

    Raises:
        UsageError: for settings that cannot be used.
        RunError: if memory does not suffice, or what was found cannot be recorded.
        KeyboardInterrupt: if interrupted before the first generation was scored.
    """
    started = time.perf_counter()
    if first not in ("smallest", "largest"):
        raise unknown_name("order", first, ("smallest", "largest"))
    if unknown := sorted(set(settings) - {"task", *_DEFAULTS}):
        raise TypeError(f"search_curve() got an unexpected keyword argument {unknown[0]!r}")
    if len(set(budgets)) < 2:
        raise UsageError(f"a curve needs at least two budgets, got {list(budgets)}; use evolkv.search for one")
    # Of several, `under_each_selector` passes one.
    assert isinstance(selector, (str, Mapping, Selector))
    ascending = sorted(set(budgets))
    chosen = get_selector(_fit(selector, {"budgets": ascending}))
    given = {**_DEFAULTS, **settings, "selector": chosen, "max_evals": max_evals}
    with session(model, tokenizer, **given) as running:
        ascending = [running.plan.check(budget) for budget in ascending]
        order = ascending if first == "smallest" else ascending[::-1]
        running.open_study(storage, study, order, start)
        evolutions: dict[int, Evolution] = {}
        seconds: dict[int, float] = {}
        # All budgets after the first share as many candidates as that one had.
        rest = len(order) - 1
        near: np.ndarray | None = None
        try:
            for budget in order:
                began = time.perf_counter()
                if not evolutions:
                    evolution = running.evolve(budget, start)
                else:
                    evolution = running.evolve(budget, near, rest, 1.0 if near is None else _STEP)
                evolutions[budget] = evolution
                seconds[budget] = time.perf_counter() - began + evolution.recorded_seconds
                if evolution.interrupted:
                    break
                near = _evolved(evolution) if running.settings.name == "joint" else None
        except KeyboardInterrupt:
            if not evolutions:
                raise
        choices = {
            budget: _choices(running, budget, evolutions, ascending) for budget in ascending if budget in evolutions
        }
        validation = {}
        if len(evolutions) == len(order) and not evolution.interrupted:
            validation = running.choose({str(budget): part for budget, part in choices.items()})
        results = [
            running.result(budget, evolutions[budget], part, validation.get(str(budget), []), seconds[budget])
            for budget, part in choices.items()
        ]
        results = [replace(each, settings={**each.settings, "first": first}) for each in results]
        interrupted = any(each.interrupted for each in results)
        took = time.perf_counter() - started + sum(each.recorded_seconds for each in evolutions.values())
        return CurveResult(results, _points(running, results), took, interrupted)


def _fitting(selector: Selector, smallest: int) -> Selector:
    window = selector.window
    if not window or selector.min_budget < smallest:
        return selector
    while window > 1 and window >= smallest:
        window //= 2
    log.warning(
        "budget %d needs a smaller window: %s now uses window=%d at all budgets", smallest, selector.name, window
    )
    return get_selector({**selector.to_dict(), "window": window})


def _evolved(evolution: Evolution) -> np.ndarray:
    return evolution.mean if evolution.mean is not None else np.array(evolution.best.budgets)


def _choices(
    running: Session, budget: int, evolutions: dict[int, Evolution], ascending: list[int]
) -> dict[str, np.ndarray]:
    """What a budget chooses from: its own search, the heuristics, and its neighbours' budgets expanded to it."""
    plan = running.plan
    choices = running.choices(budget, evolutions[budget])
    at = ascending.index(budget)
    for near in ascending[max(0, at - 1) : at] + ascending[at + 1 : at + 2]:
        if near in evolutions:
            choices[f"expanded from {near}"] = plan.completed(_evolved(evolutions[near]), budget)
    return choices


def _points(running: Session, results: list[SearchResult]) -> list[dict[str, Any]]:
    plan = running.plan
    info = describe_model(plan.model)
    entry_bytes = 2 * info.head_dim * plan.model.dtype.itemsize
    points: list[dict[str, Any]] = []
    for result in results:
        row = result.validation[0] if result.validation else None
        point = {
            "budget": result.profile.budget,
            "score": row["score"] if row else None,
            "ci95": list(row["ci95"]) if row else None,
            "n": row["n"] if row else 0,
            "metric": plan.metric,
            "kv_bytes": int(np.minimum(result.profile.budgets, plan.longest).sum()) * entry_bytes,
            "mean_budget": result.profile.mean_budget,
            "source": result.chosen if result.chosen in NOT_EVOLVED or " " in result.chosen else "search",
            "evaluations": result.evaluations,
            "selector": plan.selector.spec,
        }
        points.append(point)
    return _with_front(points)


def _with_front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points, smallest budget first, that say whether no smaller budget does as well."""
    for number, point in enumerate(points):
        smaller = [other["score"] for other in points[:number] if other["score"] is not None]
        point["on_front"] = point["score"] is not None and all(point["score"] > score for score in smaller)
    return points
