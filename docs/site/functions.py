"""What the Python reference cannot read from the sources alone: functions made on import, comments on constants."""

from __future__ import annotations

import ast
import inspect
from itertools import takewhile
from pathlib import Path
from typing import Any

import griffe

#: The functions, which `evolkv.evolution.keywords` makes, and what each calls.
_MADE = {"search": "one_budget.run_search", "search_curve": "curve.run_curve"}


class Made(griffe.Function):
    """A function that is made on import, with the source of the function that it calls."""

    calls: griffe.Function

    @property
    def filepath(self) -> Path | list[Path]:
        """The file of that source."""
        return self.calls.filepath


class MadeFunctions(griffe.Extension):
    """Puts `search` and `search_curve`, whose parameters are fields of a dataclass, where the sources assign them."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Replace two attributes of `evolkv.evolution.keywords`."""
        if pkg.name != "evolkv":
            return
        from evolkv.evolution import keywords

        module = pkg["evolution.keywords"]
        for name, called in _MADE.items():
            function, calls = getattr(keywords, name), pkg["evolution"][called]
            made = Made(
                name,
                lineno=calls.lineno,
                endlineno=calls.endlineno,
                parameters=_parameters(function),
                returns=calls.returns,
                docstring=griffe.Docstring(inspect.getdoc(function) or "", parser=griffe.Parser.google),
            )
            made.calls = calls
            module.set_member(name, made)


class CommentedConstants(griffe.Extension):
    """Takes the comment above a constant (``#: …``) for its docstring."""

    def on_attribute_instance(
        self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **kwargs: Any
    ) -> None:
        """Give a constant the comment that ends on the line before it."""
        if attr.docstring is not None or attr.lineno is None:
            return
        above = reversed(attr.lines_collection[attr.filepath][: attr.lineno - 1])
        comment = [line.strip() for line in takewhile(lambda line: line.strip().startswith("#:"), above)]
        if comment:
            text = "\n".join(line.removeprefix("#:").strip() for line in reversed(comment))
            attr.docstring = griffe.Docstring(text, parser=griffe.Parser.google, parent=attr)


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
