"""`evolkv search`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evolkv.cli import console
from evolkv.cli.arguments import selector_spec
from evolkv.cli.options import Attention, Device, Dtype, Granularity, Model, ModelOptions, Seed, Trust, one_of
from evolkv.cli.tables import validation_table
from evolkv.errors import UsageError

if TYPE_CHECKING:
    from evolkv.search import SearchProgress, SearchResult

_STRATEGY, _OBJECTIVE = "Strategy", "Objective"


def search(
    model: Model,
    task: Annotated[str, typer.Option("--task", help="What to evolve for, such as niah:context=1600.")],
    budget: Annotated[int, typer.Option("--budget", help="Mean cache entries per KV head.")],
    selector: Annotated[
        str, typer.Option("--selector", help="Which tokens are kept: snapkv, or snapkv:window=16.")
    ] = "snapkv",
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="joint|evolkv|random", help="Who proposes the candidates.")
    ] = "joint",
    granularity: Granularity = "layer",
    metric: Annotated[str, typer.Option("--metric", help="What to maximise.", rich_help_panel=_OBJECTIVE)] = "logprob",
    train: Annotated[
        int, typer.Option("--train", help="Examples that candidates are scored on.", rich_help_panel=_OBJECTIVE)
    ] = 12,
    val: Annotated[
        int, typer.Option("--val", help="Unseen examples that the result is chosen on.", rich_help_panel=_OBJECTIVE)
    ] = 24,
    max_evals: Annotated[
        int | None,
        typer.Option("--max-evals", help="Candidates to evaluate at most.", rich_help_panel=_STRATEGY),
    ] = None,
    population: Annotated[
        int | None, typer.Option("--population", help="Candidates per generation.", rich_help_panel=_STRATEGY)
    ] = None,
    sigma: Annotated[float | None, typer.Option("--sigma", help="Initial step.", rich_help_panel=_STRATEGY)] = None,
    group_size: Annotated[
        int, typer.Option("--group-size", help="Layers per group of strategy evolkv.", rich_help_panel=_STRATEGY)
    ] = 8,
    lam: Annotated[
        float, typer.Option("--lam", help="Weight of the cache score in the fitness.", rich_help_panel=_OBJECTIVE)
    ] = 0.3,
    gamma: Annotated[
        float, typer.Option("--gamma", help="Discount for budgets below the target.", rich_help_panel=_OBJECTIVE)
    ] = 0.2,
    floor: Annotated[
        int | None, typer.Option("--floor", help="The least a head may get.", rich_help_panel=_STRATEGY)
    ] = None,
    ceiling: Annotated[
        int | None, typer.Option("--ceiling", help="The most a head may get.", rich_help_panel=_STRATEGY)
    ] = None,
    seed: Seed = 0,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="replay|naive",
            callback=one_of("engine", ("replay", "naive")),
            help="Prefill once per example, or once per candidate and example.",
        ),
    ] = "replay",
    out: Annotated[str, typer.Option("--out", metavar="PROFILE.json", help="Where the profile goes.")] = "profile.json",
    json_out: Annotated[
        str | None, typer.Option("--json", metavar="RESULT.json", help="Where every evaluation goes.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
) -> int:
    """Evolve a profile for a task. Ctrl-C ends the search early and keeps what it has found."""
    from evolkv.report.files import check_writable, write_json

    check_writable(out)
    if json_out is not None:
        check_writable(json_out)
        if os.path.realpath(json_out) == os.path.realpath(out):
            raise UsageError(f"--out and --json are both {out}; give two files")
    from evolkv.search import STRATEGIES
    from evolkv.search import search as run_search
    from evolkv.selectors import get_selector
    from evolkv.tasks import get_task
    from evolkv.tasks.metrics import check_metric

    # What can be judged without the model is, before it is loaded.
    chosen_task, chosen_selector = get_task(task), get_selector(selector_spec(selector))
    check_metric(metric)
    STRATEGIES[strategy]
    loaded, tokenizer = ModelOptions(dtype, device, attn_implementation, trust_remote_code).load(model)
    with console.Progress() as progress:
        result = run_search(
            loaded,
            tokenizer,
            task=chosen_task,
            budget=budget,
            selector=chosen_selector,
            strategy=strategy,
            granularity=granularity,  # type: ignore[arg-type]
            metric=metric,
            train=train,
            val=val,
            max_evals=max_evals,
            population=population,
            sigma=sigma,
            group_size=group_size,
            lam=lam,
            gamma=gamma,
            floor=floor,
            ceiling=ceiling,
            seed=seed,
            engine=engine,  # type: ignore[arg-type]
            on_progress=lambda step: show_search(progress, step),
        )
    result.profile.save(out)
    if json_out is not None:
        write_json(json_out, result.to_dict())
    if result.interrupted:
        console.say(f"evolkv: interrupted after {result.evaluations} candidates; the fittest so far is in {Path(out)}")
        return 130
    console.OUT.print(validation_table(result.validation, result.chosen))
    console.OUT.print(f"\n{_verdict(result)}", soft_wrap=True)
    took = console.duration(result.seconds)
    console.OUT.print(f"{result.evaluations} candidates in {took}; profile written to {Path(out)}", soft_wrap=True)
    return 0


def show_search(progress: console.Progress, step: SearchProgress) -> None:
    """Show where a search stands."""
    detail = "" if step.score is None else f"best score {step.score:.4f}"
    progress(step.stage, step.done, step.total, detail)


def _verdict(result: SearchResult) -> str:
    """Whether evolution paid, in one line."""
    evolved = next((row for row in result.validation if row["evolved"]), None)
    heuristics = [row for row in result.validation if not row["evolved"]]
    others = " and ".join(f"{row['name']} ({row['score']:.3f})" for row in heuristics)
    if result.improved and evolved is not None:
        return f"The evolved budgets ({evolved['score']:.3f}) beat {others} on {evolved['n']} unseen examples."
    score = f" ({evolved['score']:.3f})" if evolved is not None else ""
    return (
        f"No evolved budgets{score} beat {others} on {heuristics[0]['n']} unseen examples: the profile holds "
        f"{result.chosen!r}. More --max-evals, --train or another --budget may help."
    )
