"""`evolkv plan`: what a search will take."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from evolkv.cli import console
from evolkv.cli.search import search, with_preset
from evolkv.report.words import counted, duration, gibibytes

if TYPE_CHECKING:
    from evolkv.evolution.plan import Plan


# The options are those of the search that it plans.
@functools.wraps(search)
def plan(**options: Any) -> int:
    from evolkv.cli.search_command import prepare
    from evolkv.evolution import OneBudget, SeveralBudgets
    from evolkv.evolution.auto import several
    from evolkv.evolution.plan import make_plan

    given = with_preset(options["context"])
    config, _, model, tokenizer = prepare(given)
    planned: OneBudget | SeveralBudgets
    if isinstance(config, (OneBudget, SeveralBudgets)):
        planned = config
    else:
        planned = several(model, tokenizer, config, given["first"])
    with console.busy("measuring on one or two examples"):
        found = make_plan(model, tokenizer, planned)
    try:
        console.write_json(given["json_out"], found.to_dict())
    finally:
        # A file that cannot be written must not take the numbers with it.
        for line in lines(found):
            console.OUT.print(line, soft_wrap=True)
        if planned is not config:
            console.OUT.print("The certificate takes more time: each budget answers fresh examples.", soft_wrap=True)
    return 0


plan.__name__ = "plan"
plan.__doc__ = "Say how long a search will take, and how much memory. The options are those of evolkv search."


def lines(found: Plan) -> list[str]:
    """Say what a plan holds, for a terminal."""
    memory, seconds = found.memory, {name: took for name, took in found.seconds.items() if took}
    parts = {
        "the program and the weights": memory.process,
        "prompts that are held": memory.recordings,
        "reading prompts": memory.reading,
        "the gradient": memory.gradient,
        "a batch of candidates": memory.candidates,
    }
    timed = ", ".join(f"{name} {duration(took)}" for name, took in seconds.items())
    described = ", ".join(f"{name} {gibibytes(size)}" for name, size in parts.items() if size)
    verdict = "it fits" if found.fits else "it does not fit"
    if found.advice:
        verdict += f"; it would with {', or '.join(found.advice)}"
    return [
        f"Time, once the model is loaded: about {duration(sum(seconds.values()))} for "
        f"{counted(found.candidates, 'candidate')} ({timed}).",
        f"Memory: about {gibibytes(memory.peak)} GiB at the peak ({described}; the last three come one after another).",
        f"{gibibytes(memory.free)} GiB are free beside the model: {verdict}.",
    ]
