"""Several selectors, each with a search of its own: what does best on the validation examples is returned.

How far budgets can go depends on the ranking that they cut (docs/results.md), and which ranking suits a task is seldom
known beforehand. All are validated on the same examples, so their scores compare.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedModel

from evolkv.errors import UsageError
from evolkv.evolution.backends import SharedBackend, backend_maker
from evolkv.evolution.progress import OnProgress, SearchProgress
from evolkv.evolution.result import SearchResult
from evolkv.selectors import Selector, SelectorSpec, get_selector


class _Result(Protocol):
    @property
    def interrupted(self) -> bool: ...


Found = TypeVar("Found", bound=_Result)
Run = Callable[..., Found]


def under_each_selector(
    best: Callable[[list[Found], bool], Found],
    fit: Callable[[SelectorSpec, Mapping[str, Any]], SelectorSpec] = lambda each, settings: each,
) -> Callable[[Run[Found]], Run[Found]]:
    """Lets a search's `selector` be a list: each gets a search in turn, and `best` makes one result of all.

    Prompts are prefilled once for all of them. Each search records to a study of its own, named ``STUDY/SELECTOR``.
    KeyboardInterrupt ends the search that runs, and those after it do not begin.

    Args:
        best: of the results, in the order of the selectors; and whether some selector's search did not come to its end.
        fit: what becomes of a selector under a search's settings.
    """

    def decorate(run: Run[Found]) -> Run[Found]:
        @functools.wraps(run)
        def several(model: PreTrainedModel, tokenizer: Any, **settings: Any) -> Found:
            selectors = settings.get("selector")
            if not isinstance(selectors, (list, tuple)):
                return run(model, tokenizer, **settings)
            rivals = {name: fit(each, settings) for name, each in _distinct(selectors).items()}
            if len(rivals) == 1:
                return run(model, tokenizer, **{**settings, "selector": next(iter(rivals.values()))})
            study, report = settings.get("study", "search"), settings.get("on_progress")
            found: list[Found] = []
            with _shared(model, tokenizer, settings, [get_selector(each) for each in rivals.values()]) as own:
                for name, selector in rivals.items():
                    own |= {"selector": selector, "study": f"{study}/{name}", "on_progress": _naming(name, report)}
                    try:
                        found.append(run(model, tokenizer, **{**settings, **own}))
                    except KeyboardInterrupt:
                        if not found:
                            raise
                        break
                    if found[-1].interrupted:
                        break
            return best(found, len(found) < len(rivals) or found[-1].interrupted)

        return several

    return decorate


def best_of(found: list[SearchResult], interrupted: bool) -> SearchResult:
    """The result with the highest validation score, told of its rivals; see `under_each_selector`."""
    rivals = [
        {
            "selector": result.profile.selector,
            "chosen": result.chosen,
            "score": result.validation[0]["score"] if result.validation else None,
            "evaluations": result.evaluations,
            "seconds": result.seconds,
        }
        for result in found
    ]
    complete = [result for result in found if result.validation] or found[:1]
    # Of equals the one that did not have to be evolved, as within a search.
    winner = max(complete, key=lambda it: (it.validation[0]["score"] if it.validation else 0.0, not it.improved))
    settings = {**winner.settings, "rivals": rivals}
    return replace(
        winner,
        profile=replace(winner.profile, search={**winner.profile.search, "rivals": rivals}),
        settings=settings,
        rivals=rivals,
        seconds=sum(result.seconds for result in found),
        interrupted=interrupted,
    )


@contextmanager
def _shared(
    model: PreTrainedModel, tokenizer: Any, settings: Mapping[str, Any], selectors: list[Selector]
) -> Iterator[dict[str, Any]]:
    """The settings with which the searches share one backend, and with it the prefill of their prompts."""
    engine, workers = settings.get("engine", "replay"), settings.get("workers")
    if engine != "replay":
        yield {}
        return
    make = backend_maker(model, tokenizer, settings.get("backend", "local"), workers, engine)
    backend = SharedBackend(make, selectors)
    try:
        yield {"backend": backend.lend}
    finally:
        backend.close()


def _distinct(selectors: Sequence[SelectorSpec]) -> dict[str, SelectorSpec]:
    """Selectors by their spec, each once."""
    if not selectors:
        raise UsageError("no selector is given; give at least one, such as snapkv")
    return {get_selector(each).spec: each for each in selectors}


def _naming(name: str, report: OnProgress | None) -> OnProgress | None:
    if report is None:
        return None

    def named(step: SearchProgress) -> None:
        report(replace(step, selector=name))

    return named
