"""Several selectors, each with a search of its own: what does best on the validation examples is returned.

How far budgets can go depends on the selector whose ranking they cut (docs/results.md), and which selector suits a task
is seldom known beforehand. All are validated on the same examples, so their scores compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedModel

from evolkv.evolution.backends import SharedBackend, make_backend
from evolkv.evolution.config import SearchConfig
from evolkv.evolution.progress import OnProgress, SearchProgress
from evolkv.evolution.result import SearchResult
from evolkv.selectors import SelectorSpec, get_selector


class _Result(Protocol):
    @property
    def interrupted(self) -> bool: ...


Config = TypeVar("Config", bound=SearchConfig)
Result = TypeVar("Result", bound=_Result)


def under_each_selector(
    model: PreTrainedModel,
    tokenizer: Any,
    config: Config,
    selectors: Mapping[str, SelectorSpec],
    run: Callable[[Config], Result],
) -> tuple[list[Result], bool]:
    """Run a search under each of several selectors in turn.

    Prompts are prefilled once for all of them. Each search records to a study of its own, named ``STUDY/SELECTOR``.
    KeyboardInterrupt ends the search that runs, and those after it do not begin.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        config: the settings of the searches.
        selectors: by the names that their studies get.
        run: runs the search under one selector.

    Returns:
        The results, in the order of the selectors, and whether some selector's search did not come to its end.
    """
    backend = SharedBackend(lambda: make_backend(model, tokenizer, config), [*map(get_selector, selectors.values())])
    results: list[Result] = []
    try:
        for name, selector in selectors.items():
            study, report = f"{config.study}/{name}", _naming(name, config.on_progress)
            own = replace(config, selector=selector, study=study, on_progress=report)
            try:
                results.append(run(own if config.engine == "naive" else replace(own, backend=lambda: backend)))
            except KeyboardInterrupt:
                if not results:
                    raise
                break
            if results[-1].interrupted:
                break
    finally:
        backend.end()
    return results, len(results) < len(selectors) or results[-1].interrupted


def best_of(results: list[SearchResult], interrupted: bool) -> SearchResult:
    """Return the result with the highest validation score, told of its rivals; see `under_each_selector`."""
    rivals = [
        {
            "selector": result.profile.selector,
            "chosen": result.chosen,
            "score": _comparable(result),
            "evaluations": result.evaluations,
            "seconds": result.seconds,
        }
        for result in results
    ]
    complete = [result for result in results if result.validation] or results[:1]
    # On a tie, prefer the allocation that needed no search, as within a search.
    winner = max(complete, key=lambda it: (_comparable(it) or 0.0, not it.improved))
    settings = {**winner.settings, "rivals": rivals}
    return replace(
        winner,
        profile=replace(winner.profile, search={**winner.profile.search, "rivals": rivals}),
        settings=settings,
        rivals=rivals,
        seconds=sum(result.seconds for result in results),
        interrupted=interrupted,
        stopped=next((result.stopped for result in results if result.stopped), None),
    )


def _comparable(result: SearchResult) -> float | None:
    """Return a result's validation score as it compares with other selectors'; None after an interruption."""
    if not result.validation:
        return None
    chosen = result.validation[0]
    return float(chosen.get("retained", chosen["score"]))


def _naming(name: str, report: OnProgress | None) -> OnProgress | None:
    if report is None:
        return None

    def named(step: SearchProgress) -> None:
        report(replace(step, selector=name))

    return named
