"""Functions that take the fields of a configuration as keyword arguments."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

from transformers import PreTrainedModel

from evolkv.evolution.config import OneBudget, SearchConfig, SeveralBudgets, preset_settings
from evolkv.evolution.curve import run_curve
from evolkv.evolution.one_budget import run_search

P = ParamSpec("P")
Config = TypeVar("Config", bound=SearchConfig)
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class SearchFunction(Protocol[P, Result_co]):
    """A function that takes a model, its tokenizer, and settings by keyword."""

    def __call__(self, model: PreTrainedModel, tokenizer: Any, *args: P.args, **settings: P.kwargs) -> Result_co: ...


def by_keyword(
    name: str, config: Callable[P, Config], run: Callable[[PreTrainedModel, Any, Config], Result]
) -> SearchFunction[P, Result]:
    """Return a function that takes the fields of a configuration as keyword arguments.

    Type checkers, editors and ``help`` see these arguments with their types and defaults, which so are written once.

    Args:
        name: of the function.
        config: the class of the configuration.
        run: called with the model, its tokenizer and the configuration.
    """

    @functools.wraps(run)
    def search(model: PreTrainedModel, tokenizer: Any, *args: P.args, **settings: P.kwargs) -> Result:
        preset = preset_settings(str(settings.get("preset", "best")))
        given: dict[str, Any] = {**preset, **settings, "preset": "best"}
        try:
            checked = config(*args, **given)
        except TypeError as error:
            raise TypeError(str(error).replace(f"{config.__name__}.__init__()", f"{name}()")) from None
        return run(model, tokenizer, checked)

    of_run = inspect.signature(run)
    settings = sorted(
        inspect.signature(config).parameters.values(), key=lambda setting: setting.default is not setting.empty
    )
    parameters = [*of_run.parameters.values()][:2] + settings
    search.__signature__ = of_run.replace(parameters=parameters)  # type: ignore[attr-defined]
    search.__name__ = search.__qualname__ = name
    # The package has it under this name, where pickle looks.
    search.__module__ = __package__
    search.__doc__ = _docstring(run, *inspect.getmro(config)[:-1])  # type: ignore[arg-type]
    return search


def _docstring(run: Callable[..., Any], *configs: type) -> str:
    """Return the docstring of a function whose settings are the fields of some classes, with one list of arguments."""
    text, arguments, *after = _sections(run)
    arguments = re.sub(r"^    config: .*\n(?: {5,}.*\n)*", "", arguments, flags=re.M)
    for config in configs:
        about, fields, *_ = _sections(config)
        # The first line says what the class is.
        text += about.partition("\n\n")[2]
        arguments += fields
    return f"{text}Args:\n{arguments}\n{''.join(after)}".rstrip()


def _sections(documented: Callable[..., Any]) -> list[str]:
    """Return a docstring in three parts, each with a line break at its end: the text, the arguments, what follows."""
    text, _, rest = f"{inspect.cleandoc(documented.__doc__ or '')}\n".partition("Args:\n")
    arguments, end, after = rest.partition("\n\n")
    return [text, f"{arguments.rstrip()}\n", after if end else ""]


search = by_keyword("search", OneBudget, run_search)
search_curve = by_keyword("search_curve", SeveralBudgets, run_curve)
