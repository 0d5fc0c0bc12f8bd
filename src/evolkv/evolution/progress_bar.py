"""Bars that show how far a search or an evaluation is, in a notebook or on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from evolkv.evaluation.evaluation import EvaluationProgress
from evolkv.evolution.progress import SearchProgress


def progress_bar() -> Callable[[SearchProgress | EvaluationProgress], None]:
    """Return what draws progress: ``evolkv.search(..., on_progress=evolkv.progress_bar())``.

    `evolkv.search`, `search_curve` and `evaluate` take it. Each stage of a search gets a bar, with the best score so
    far. A notebook shows widgets where ipywidgets is installed; else the bars are text, on standard error.
    """
    return _Bars()


class _Bars:
    def __init__(self) -> None:
        self._what: str | None = None
        self._bar: Any = None

    def __call__(self, step: SearchProgress | EvaluationProgress) -> None:
        what = "evaluation"
        if isinstance(step, SearchProgress):
            budget = f", budget {step.budget}" if step.budget is not None else ""
            what = f"{step.stage}{budget}" + (f", under {step.selector}" if step.selector is not None else "")
        if what != self._what or step.done < self._bar.n:
            self._begin(what, step.total)
        self._bar.total = step.total
        if isinstance(step, SearchProgress) and step.score is not None:
            self._bar.set_postfix_str(f"score {step.score:.4f}", refresh=False)
        self._bar.update(step.done - self._bar.n)
        if step.done == step.total:
            self._bar.close()

    def _begin(self, what: str, total: int) -> None:
        if self._bar is not None:
            self._bar.close()
        self._what, self._bar = what, tqdm(total=total, desc=what)
