"""`evolkv search`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evolkv.cli import console
from evolkv.cli.arguments import sibling
from evolkv.cli.options import (
    Attention,
    Device,
    Dtype,
    Granularity,
    Model,
    ModelOptions,
    PrefillChunk,
    Protocol,
    Seed,
    Trust,
    files,
    one_of,
    to_read,
    to_write,
    to_write_or_print,
)
from evolkv.cli.tables import curve_table, print_whole, validation_table
from evolkv.errors import UsageError
from evolkv.report.units import duration
from evolkv.report.words import candidates

if TYPE_CHECKING:
    from evolkv.evaluation.shards import Backend
    from evolkv.evolution import CurveResult, SearchProgress, SearchResult

_STRATEGY, _OBJECTIVE, _WHERE, _STUDY = "Strategy", "Objective", "Where it runs", "Study"


def search(
    model: Model,
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            metavar="TASK...",
            help="What to evolve for, such as niah:context=1600; several take turns.",
        ),
    ],
    budget: Annotated[
        list[str],
        typer.Option("--budget", metavar="C[,C...]", help="Mean cache entries per KV head; several make a curve."),
    ],
    selector: Annotated[
        list[str],
        typer.Option(
            "--selector",
            metavar="S...",
            help="Which tokens are kept: snapkv, or snapkv:window=16; of several the best on unseen examples.",
        ),
    ] = ["snapkv"],  # noqa: B006
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="joint|evolkv|random", help="Who proposes the candidates.")
    ] = "joint",
    granularity: Granularity = "layer",
    metric: Annotated[str, typer.Option("--metric", help="What to maximise.", rich_help_panel=_OBJECTIVE)] = "logprob",
    protocol: Protocol = "aware",
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
    minibatch: Annotated[
        int | None,
        typer.Option(
            "--minibatch",
            help="Examples that a generation of joint is scored on, in turn. (default: 2 with logprob, else all)",
            rich_help_panel=_STRATEGY,
        ),
    ] = None,
    start: Annotated[
        str,
        typer.Option(
            "--start",
            metavar="uniform|pyramid|PROFILE.json",
            callback=to_read,
            help="What joint starts from.",
            rich_help_panel=_STRATEGY,
        ),
    ] = "uniform",
    first: Annotated[
        str,
        typer.Option(
            "--first",
            metavar="smallest|largest",
            callback=one_of("order", ("smallest", "largest")),
            help="Where a curve begins.",
            rich_help_panel=_STRATEGY,
        ),
    ] = "smallest",
    population: Annotated[
        int | None, typer.Option("--population", help="Candidates per generation.", rich_help_panel=_STRATEGY)
    ] = None,
    sigma: Annotated[float | None, typer.Option("--sigma", help="Initial step.", rich_help_panel=_STRATEGY)] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size", help="Layers per group of strategy evolkv. (default: 8)", rich_help_panel=_STRATEGY
        ),
    ] = None,
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
    prefill_chunk: PrefillChunk = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            metavar="local|ray",
            callback=one_of("backend", ("local", "ray")),
            help="Threads of this process, or Ray workers.",
            rich_help_panel=_WHERE,
        ),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", help="Threads or Ray workers. (default: one per core or GPU)", rich_help_panel=_WHERE
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", help="A running Ray cluster, or auto.", rich_help_panel=_WHERE),
    ] = None,
    worker_cpus: Annotated[
        float, typer.Option("--worker-cpus", help="Cores per Ray worker.", rich_help_panel=_WHERE)
    ] = 1,
    worker_gpus: Annotated[
        float | None,
        typer.Option(
            "--worker-gpus",
            help="GPUs per Ray worker, or a fraction. (default: 1 if there are any)",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="URL",
            callback=to_read,
            help="Optuna storage, or a file, or none. (default: PROFILE.study.db beside --out)",
            rich_help_panel=_STUDY,
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            "--study", metavar="NAME", help="Name in the storage. (default: that of --out)", rich_help_panel=_STUDY
        ),
    ] = None,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="PROFILE.json",
            callback=to_write,
            help="Where the profile goes; of a curve, PROFILE-C.json for each budget.",
        ),
    ] = "profile.json",
    json_out: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="RESULT.json",
            callback=to_write_or_print,
            help="Where every evaluation goes; - is standard output.",
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
) -> int:
    """Evolve a profile for a task. Stopped, or killed, it goes on when the same command is given again."""
    from evolkv.budgets import read_budgets
    from evolkv.whole_files import check_outputs

    budgets = read_budgets(budget, "--budget")
    json_ending = ".json" if out.endswith(".json") else ""
    outs = [out] if len(budgets) == 1 else [sibling(out, f"-{c}{json_ending}") for c in budgets]
    targets = [*outs, *files(json_out)]
    console.keep_stdout_for_json(json_out)
    if backend == "local" and (ray_address is not None or worker_gpus is not None or worker_cpus != 1):
        raise UsageError("--ray-address, --worker-cpus and --worker-gpus are for --backend ray")
    if first != "smallest" and len(budgets) == 1:
        raise UsageError(
            f"--first says where a curve begins; give --budget several, such as {budgets[0] // 2},{budgets[0]}"
        )
    if group_size is not None and strategy != "evolkv":
        raise UsageError("--group-size is for --strategy evolkv")
    if storage == "none" and study is not None:
        raise UsageError("--study names a study, but --storage none keeps none; leave one of them out")
    where = storage if storage is not None else sibling(out, ".study.db")
    from evolkv.evolution import STRATEGIES, SearchResult, search_curve
    from evolkv.evolution import search as run_search
    from evolkv.evolution.plan import HEURISTICS
    from evolkv.evolution.storage import locate
    from evolkv.profile import BudgetProfile
    from evolkv.selectors import get_selector
    from evolkv.tasks import get_task
    from evolkv.tasks.check import check_examples
    from evolkv.tasks.metrics import check_metric

    # What can be judged without the model is, before it is loaded.
    chosen_task = get_task(task)
    check_outputs(targets, [*chosen_task.files(), *([] if start in HEURISTICS else [start])])
    for spec in selector:
        get_selector(spec)
    check_metric(metric)
    STRATEGIES[strategy]
    file = None if where == "none" else locate(where).path
    if file is not None and os.path.realpath(file) in map(os.path.realpath, targets):
        raise UsageError(f"--storage is {where}, which the result would overwrite; give the study a file of its own")
    chosen_task.check_files()
    begun = start if start in HEURISTICS else BudgetProfile.load(start)
    check = partial(check_examples, [chosen_task], ["train", "validation"], metric=metric, protocol=protocol, seed=seed)
    loaded, tokenizer = ModelOptions(dtype, device, attn_implementation, trust_remote_code).load(model, check)
    settings: dict[str, Any] = {
        "task": chosen_task,
        # A bare name leaves its window to the smallest budget of a curve.
        "selector": selector,
        "strategy": strategy,
        "granularity": granularity,
        "metric": metric,
        "protocol": protocol,
        "train": train,
        "val": val,
        "max_evals": max_evals,
        "minibatch": minibatch,
        "population": population,
        "sigma": sigma,
        "lam": lam,
        "gamma": gamma,
        "floor": floor,
        "ceiling": ceiling,
        "start": begun,
        "seed": seed,
        "engine": engine,
        "prefill_chunk": prefill_chunk,
        "backend": backend
        if backend == "local"
        else _ray(loaded, tokenizer, workers, ray_address, worker_cpus, worker_gpus),
        "workers": workers,
        "storage": None if where == "none" else where,
        "study": study or os.path.basename(sibling(out, "")),
    }
    if group_size is not None:
        settings["group_size"] = group_size
    with console.Progress() as progress:
        settings["on_progress"] = lambda step: show_search(progress, step)
        if len(budgets) == 1:
            result: SearchResult | CurveResult = run_search(loaded, tokenizer, budget=budgets[0], **settings)
        else:
            result = search_curve(loaded, tokenizer, budgets=budgets, **settings, first=first)
    kept = "" if where == "none" else f", every generation to {where}"
    again = "" if where == "none" else "; the same command goes on from there"
    if isinstance(result, SearchResult):
        try:
            result.profile.save(outs[0])
            console.write_json(json_out, result.to_dict())
        finally:
            # A file that cannot be written must not take the numbers with it.
            if not result.interrupted:
                print_whole(validation_table(result.validation, result.chosen))
                console.OUT.print(f"\n{_verdict(result)}{_among_rivals(result)}", soft_wrap=True)
        if result.interrupted:
            console.say(
                f"evolkv: interrupted after {result.evaluations} candidates; the best so far is in {out}{again}"
            )
            return 130
        took = duration(result.seconds)
        console.OUT.print(
            f"{_candidates(result)} candidates in {took}; profile written to {outs[0]}{kept}", soft_wrap=True
        )
        return 0
    by_budget = dict(zip(budgets, outs, strict=True))
    found = [by_budget[each.profile.budget] for each in result.results]
    try:
        for each, path in zip(result.results, found, strict=True):
            each.profile.save(path)
        console.write_json(json_out, result.to_dict([str(path) for path in found]))
    finally:
        if not result.interrupted:
            print_whole(curve_table(result.points))
    names = ", ".join(map(str, found))
    if result.interrupted:
        console.say(f"evolkv: interrupted; the best so far is in {names}{again}")
        return 130
    console.OUT.print(
        f"\n{sum(map(_candidates, result.results))} candidates in {duration(result.seconds)}; "
        f"profiles written to {names}{kept}",
        soft_wrap=True,
    )
    return 0


def _ray(
    model: Any, tokenizer: Any, workers: int | None, address: str | None, cpus: float, gpus: float | None
) -> Callable[[], Backend]:
    def start() -> Backend:
        from evolkv.evaluation.on_ray import RayBackend

        with console.busy("starting Ray workers"):
            return RayBackend(model, tokenizer, workers, address, cpus, gpus)

    return start


def show_search(progress: console.Progress, step: SearchProgress) -> None:
    """Show where a search stands."""
    progress(
        step.stage,
        step.done,
        step.total,
        best_fitness=step.best,
        best_score=step.score,
        budgets=step.budgets,
        fitness=step.fitness,
        generation=step.generation,
        budget=step.budget,
        selector=step.selector,
    )


def _candidates(result: SearchResult) -> int:
    """How many were evaluated, under all selectors."""
    return candidates(result.evaluations, result.settings)


def _among_rivals(result: SearchResult) -> str:
    """How the other selectors did, where there were several."""
    if not result.rivals:
        return ""
    from evolkv.selectors import get_selector

    scores = sorted(((row["score"] or 0.0, get_selector(row["selector"]).spec) for row in result.rivals), reverse=True)
    listed = ", ".join(f"{name} {score:.3f}" for score, name in scores)
    return f" By selector: {listed}; the profile is under {get_selector(result.profile.selector).spec}."


def _verdict(result: SearchResult) -> str:
    """Whether evolution paid, in one line."""
    evolved = next((row for row in result.validation if row["evolved"]), None)
    heuristics = [row for row in result.validation if not row["evolved"]]
    *first, last = [f"{row['name']} ({row['score']:.3f})" for row in heuristics]
    others = f"{', '.join(first)} and {last}" if first else last
    if result.improved and evolved is not None:
        return f"The evolved budgets ({evolved['score']:.3f}) beat {others} on {evolved['n']} unseen examples."
    score = f" ({evolved['score']:.3f})" if evolved is not None else ""
    return (
        f"No evolved budgets{score} beat {others} on {heuristics[0]['n']} unseen examples: the profile holds "
        f"{result.chosen!r}. More --max-evals, --train or another --budget may help."
    )
