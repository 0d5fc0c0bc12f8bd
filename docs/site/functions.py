"""Functions that EvolKV makes when it is imported, for the Python reference, which else only reads the sources."""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

#: Where they are, and what makes their result.
_MADE = {"search": "SearchResult", "search_curve": "CurveResult"}


class MadeFunctions(griffe.Extension):
    """Puts `search` and `search_curve`, whose parameters are fields of a dataclass, where the sources assign them."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Replace two attributes of `evolkv.evolution`."""
        if pkg.name != "evolkv":
            return
        from evolkv import evolution

        module = pkg["evolution"]
        for name, result in _MADE.items():
            assigned = module[name]
            made = griffe.Function(
                name,
                lineno=assigned.lineno,
                endlineno=assigned.endlineno,
                parameters=_parameters(getattr(evolution, name)),
                returns=result,
                docstring=griffe.Docstring(_docstring(getattr(evolution, name)), parser=griffe.Parser.google),
            )
            module.set_member(name, made)


def _parameters(function: Any) -> griffe.Parameters:
    return griffe.Parameters(
        *(
            griffe.Parameter(
                each.name,
                annotation=str(each.annotation),
                kind=griffe.ParameterKind.keyword_only
                if each.kind is each.KEYWORD_ONLY
                else griffe.ParameterKind.positional_or_keyword,
                default=None if each.default is each.empty else repr(each.default),
            )
            for each in inspect.signature(function).parameters.values()
        )
    )


def _docstring(function: Any) -> str:
    """Return the docstring without the configuration, which takes the place of keywords inside of EvolKV."""
    return re.sub(r"^    config: .*\n(?: {5,}.*\n)*", "", inspect.getdoc(function) or "", flags=re.M)
