"""Commands as Typer makes them, with usage lines as in the docs and answers to the option names of other programs."""

from __future__ import annotations

from typing import Any

import typer.core

#: Options that other programs have, without dashes, and what does it here; the first that the command has all of.
_ELSEWHERE = {
    "limit": ("--samples", "--train and --val"),
    "samples": ("--train and --val",),
    "n-samples": ("--samples", "--train and --val"),
    "num-samples": ("--samples", "--train and --val"),
    "n-trials": ("--max-evals",),
    "trials": ("--max-evals",),
    "timeout": ("--time-limit",),
    "output-path": ("--json", "--out"),
    "output": ("--out", "--json"),
    "output-dir": ("--out", "--json"),
    "tasks": ("--task",),
    "method": ("--selector",),
    "methods": ("--method", "--selector"),
    "selector": ("--method",),
    "selectors": ("--selector", "--method"),
    "n-jobs": ("--workers",),
    "jobs": ("--workers",),
    "num-workers": ("--workers",),
    "num-processes": ("--workers",),
    "log-samples": ("--records",),
    "budgets": ("--budget",),
    "max-tokens": ("--max-new-tokens",),
    "max-gen-toks": ("--max-new-tokens",),
    "storage-url": ("--storage",),
    "study-name": ("--study",),
    "torch-dtype": ("--dtype",),
    "compression-ratio": ("--budget",),
}
#: Options of other programs that nothing stands for in a command that reads a model.
_INSTEAD = {
    "batch-size": "none is needed here",
    "max-batch-size": "none is needed here",
    "num-fewshot": "examples before the question are a setting of the task, such as --task gsm8k:shots=5",
    "model-args": "the model is the first argument, and --dtype, --device and --trust-remote-code are options",
}
_MODEL = ("model", "model-name", "model-id", "pretrained", "model-name-or-path")


def instead_of(option: str, command: Any) -> str:
    """Return what a command offers in place of an option that it does not have, as the end of a sentence, or nothing.

    Args:
        option: as it was given, such as ``--n_trials``.
        command: the command, as Typer makes it.
    """
    options = {name for param in command.params for name in param.opts}
    name = option.lstrip("-").partition("=")[0].replace("_", "-").lower()
    for offered in (f"--{name}", *_ELSEWHERE.get(name, ())):
        if options.issuperset(offered.split(" and ")):
            return f"; here it is {offered}"
    if any(param.name == "model" and "--model" not in param.opts for param in command.params):
        if name in _MODEL:
            return f"; the model is the first argument: evolkv {command.name} MODEL"
        if name in _INSTEAD:
            return f"; {_INSTEAD[name]}"
    return ""


class Command(typer.core.TyperCommand):
    """A command of the program."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Name the arguments as users write them: MODEL, not {MODEL}."""
        arguments = [param for param in self.params if param.param_type_name == "argument"]
        return [self.options_metavar or "", *(param.metavar or str(param.name).upper() for param in arguments)]

    def get_params(self, ctx: Any) -> list[Any]:
        """Return arguments and options."""
        return _without_types_of_flags(super().get_params(ctx))


class Group(typer.core.TyperGroup):
    """Commands under one name."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return options."""
        return _without_types_of_flags(super().get_params(ctx))


def _without_types_of_flags(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params
