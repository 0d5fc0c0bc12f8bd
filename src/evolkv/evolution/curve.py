"""Searches at several budgets as one: each starts from its neighbour, and all are chosen from together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from evolkv.evolution.config import COMPUTED, START_ONLY, SeveralBudgets
from evolkv.evolution.evolve import Evolved
from evolkv.evolution.result import SearchResult
from evolkv.evolution.rivals import best_of, score_of, whole_search
from evolkv.evolution.run import Run
from evolkv.evolution.space import NOT_EVOLVED
from evolkv.evolution.strategies import STRATEGIES
from evolkv.models import model_facts
from evolkv.tasks.prompts import prompt_lengths

FORMAT = "evolkv.curve/1"
# A neighbour's budgets are near: the step from them is smaller than from uniform ones.
_STEP = 0.6


@dataclass(frozen=True)
class CurveResult:
    """The result of searches at several budgets.

    Args:
        results: one per budget, smallest first. After an interruption: of the budgets that were searched.
        points: for each of them ``budget, score, ci95, n, metric, kv_bytes, mean_budget, source, evaluations, selector,
            on_front``; `kv_bytes`, and at shares `mean_budget`, are means over the validation examples; `source` is
            "search", a heuristic or "expanded from …"; `on_front` says that no smaller budget does as well.
        seconds: wall-clock time of everything, of earlier runs as far as the study knows it.
        interrupted: whether it was stopped before its end.
    """

    results: list[SearchResult]
    points: list[dict[str, Any]]
    seconds: float
    interrupted: bool

    @property
    def stopped(self) -> str | None:
        """Return the reason that ended at least one of the searches early: "time limit", or None."""
        return next((result.stopped for result in self.results if result.stopped), None)

    def out_of_time(self) -> CurveResult:
        """Return the result as one of searches that the time limit ended."""
        return replace(self, results=[result.out_of_time() for result in self.results])

    def followed_by(self, later: CurveResult) -> CurveResult:
        """Return the result of searches in two parts; see `SearchResult.followed_by`."""
        ends = {point["budget"]: (result, point) for result, point in zip(later.results, later.points, strict=True)}
        results, points = [], []
        for result, point in zip(self.results, self.points, strict=True):
            end, its_point = ends.get(point["budget"], (result, point))
            results.append(result.followed_by(end))
            points.append(its_point if end.validation else {**point, "evaluations": end.evaluations})
        return replace(self, results=results, points=_with_front(points))

    def to_dict(self, profiles: Sequence[str] = ()) -> dict[str, Any]:
        """Return the content of a ``--json`` file.

        Args:
            profiles: the paths that the profiles were written to, in the order of the points.
        """
        points = [dict(point) for point in self.points]
        for point, path in zip(points, profiles, strict=False):
            point["profile"] = path
        return {
            "format": FORMAT,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "stopped": self.stopped,
            "points": points,
            "searches": [result.to_dict() for result in self.results],
        }


def run_curve(model: PreTrainedModel, tokenizer: Any, config: SeveralBudgets) -> CurveResult:
    """Evolve a profile for each of several budgets, as one search.

    The prompts are prefilled once for all budgets. After the first budget each search starts from its neighbour's
    distribution. On the validation examples each budget then chooses among its own evolved budgets, the heuristics, and
    its neighbours' evolved budgets expanded to it (the paper's section 4 finds these hard to beat at low budgets).

    Args:
        model: a transformers decoder-only model.
        tokenizer: its tokenizer.
        config: the settings, checked; `search_curve` takes them by keyword.

    Returns:
        A result for each budget, smallest first. KeyboardInterrupt ends the searches early, as in `evolkv.search`.

    Raises:
        UsageError: for settings that cannot be used.
        RunError: if memory does not suffice, or what was found cannot be recorded.
        KeyboardInterrupt: if interrupted before the first step or generation was scored.
    """
    return whole_search(model, tokenizer, config, _under_one_selector, _mean_score, _best_of_each)


def _mean_score(curve: CurveResult) -> float:
    return float(np.mean([score_of(result) or 0.0 for result in curve.results]))


def _best_of_each(curves: list[CurveResult], interrupted: bool) -> CurveResult:
    """Return for each budget the best of several selectors' results."""
    complete = [curve for curve in curves if not curve.interrupted] or curves[:1]
    results, points = [], []
    for number, row in enumerate(zip(*(curve.results for curve in complete), strict=True)):
        best = best_of(list(row), interrupted)
        winner = next(i for i, result in enumerate(row) if result.profile.selector == best.profile.selector)
        results.append(best)
        points.append(dict(complete[winner].points[number]))
    return CurveResult(results, _with_front(points), sum(curve.seconds for curve in curves), interrupted)


def _under_one_selector(run: Run, config: SeveralBudgets) -> CurveResult:
    targets = config.targets if config.first == "smallest" else config.targets[::-1]
    order = run.open_study(targets)
    ascending = sorted(order)
    evolutions: dict[int, Evolved] = {}
    seconds: dict[int, float] = {}
    # All budgets after the first share as many candidates as that one had.
    rest = len(order) - 1
    near: np.ndarray | None = None
    try:
        for budget in order:
            began = time.perf_counter()
            if not evolutions:
                evolved = run.evolve(budget, config.begins_at)
            elif config.begins_at in COMPUTED or config.strategy == START_ONLY:
                # A descent costs little, and does better than a neighbour's budgets.
                evolved = run.evolve(budget, config.begins_at, rest)
            else:
                near = None if near is None else run.start_at(budget, near)
                evolved = run.evolve(budget, near, rest, 1.0 if near is None else _STEP)
            evolutions[budget] = evolved
            seconds[budget] = time.perf_counter() - began + evolved.recorded_seconds
            if evolved.interrupted:
                break
            near = _evolved(evolved) if STRATEGIES[config.strategy].starts_anywhere else None
    except KeyboardInterrupt:
        if not evolutions:
            raise
    choices = {budget: _choices(run, budget, evolutions, ascending) for budget in ascending if budget in evolutions}
    stopped = len(evolutions) < len(order) or evolved.interrupted
    validation = run.choose({str(budget): part for budget, part in choices.items()}, stopped)
    results = [
        run.result(budget, evolutions[budget], part, validation.get(str(budget), []), seconds[budget])
        for budget, part in choices.items()
    ]
    results = [replace(each, settings={**each.settings, "first": config.first}) for each in results]
    interrupted = any(each.interrupted for each in results)
    took = run.seconds + sum(each.recorded_seconds for each in evolutions.values())
    return CurveResult(results, _points(run, results), took, interrupted)


def _evolved(evolved: Evolved) -> np.ndarray:
    return evolved.mean if evolved.mean is not None else np.array(evolved.best.budgets)


def _choices(run: Run, budget: int, evolutions: dict[int, Evolved], ascending: list[int]) -> dict[str, np.ndarray]:
    """Return what a budget chooses from: its own search, the heuristics, its neighbours' budgets expanded to it."""
    choices = run.choices(budget, evolutions[budget])
    if run.config.strategy == START_ONLY:
        return choices
    at = ascending.index(budget)
    for near in ascending[max(0, at - 1) : at] + ascending[at + 1 : at + 2]:
        if near in evolutions:
            choices[f"expanded from {run.space.shares.get(near, near)}"] = run.space.completed(
                _evolved(evolutions[near]), budget
            )
    return choices


def _points(run: Run, results: list[SearchResult]) -> list[dict[str, Any]]:
    facts = model_facts(run.model)
    entry_bytes = 2 * facts.head_dim * run.model.dtype.itemsize
    prompts = [(tokens, facts.most_held(tokens)) for tokens in prompt_lengths(run.tokenizer, run.held_out)]
    points: list[dict[str, Any]] = []
    for result in results:
        # Of each validation example, as the scores are.
        held = [np.minimum(result.profile.budgets_at(tokens, most), most[:, None]) for tokens, most in prompts]
        row = result.validation[0] if result.validation else None
        point = {
            "budget": result.profile.target,
            "score": row["score"] if row else None,
            "ci95": list(row["ci95"]) if row else None,
            "n": row["n"] if row else 0,
            "metric": run.config.metric,
            "kv_bytes": float(np.mean([each.sum() for each in held])) * entry_bytes,
            "mean_budget": float(np.mean(held)) if run.space.shares else result.profile.mean_budget,
            "source": result.chosen if result.chosen in NOT_EVOLVED or " " in result.chosen else "search",
            "evaluations": result.evaluations,
            "selector": run.selector.spec,
        }
        points.append(point)
    return _with_front(points)


def _with_front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Have points, smallest budget first, say whether no smaller budget does as well."""
    for number, point in enumerate(points):
        smaller = [other["score"] for other in points[:number] if other["score"] is not None]
        point["on_front"] = point["score"] is not None and all(point["score"] > score for score in smaller)
    return points
