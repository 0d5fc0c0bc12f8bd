"""The options of `evolkv search`; what it does is in `evolkv.cli.search_command`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from evolkv.cli.options import (
    Attention,
    Companion,
    Device,
    Dtype,
    Model,
    PrefillChunk,
    Protocol,
    Seed,
    Trust,
    json_option,
    one_of,
    to_read,
    to_write,
)

_STRATEGY, _OBJECTIVE, _WHERE, _STUDY = "Strategy", "Objective", "Where it runs", "Study"
#: What the defaults serve nearly always.
_ADVANCED = "Advanced"


def search(
    context: typer.Context,
    model: Model,
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            "-t",
            metavar="TASK...",
            help="What to evolve for, such as niah:context=1600; several take turns.",
        ),
    ],
    budget: Annotated[
        list[str],
        typer.Option(
            "--budget",
            "-b",
            metavar="C[,C...]",
            help="Mean cache entries per KV head, or a share of each prompt (10%); several make a curve; auto: the "
            "smallest that is safe.",
        ),
    ],
    selector: Annotated[
        list[str] | None,
        typer.Option(
            "--selector",
            "-s",
            metavar="S...",
            help="Ranks the tokens: snapkv, or snapkv:window=16. Of several, the best on validation examples is taken. "
            "(default: three compete; without a slope snapkv; that of a profile to start from)",
        ),
    ] = None,
    companion: Companion = None,
    preset: Annotated[
        str,
        typer.Option(
            "--preset",
            metavar="best|paper",
            help="best: the defaults. paper: the paper's Algorithm 1. Options that you give come first.",
        ),
    ] = "best",
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy", metavar="NAME", help="Who proposes the candidates: joint, gradient, start, evolkv or random."
        ),
    ] = "joint",
    granularity: Annotated[
        str | None,
        typer.Option(
            "--granularity",
            metavar="layer|head",
            callback=one_of("granularity", ("layer", "head")),
            help="One budget per layer, or per KV head. (default: head; of strategy evolkv layer)",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="What to maximise. (default: logprob; fidelity where the task has no answers)",
            rich_help_panel=_OBJECTIVE,
        ),
    ] = None,
    protocol: Protocol = "aware",
    train: Annotated[
        int | None,
        typer.Option(
            "--train",
            help="Examples that candidates are scored on. (default: 24)",
            rich_help_panel=_OBJECTIVE,
        ),
    ] = None,
    val: Annotated[
        int, typer.Option("--val", help="Other examples, on which the result is chosen.", rich_help_panel=_OBJECTIVE)
    ] = 24,
    max_evals: Annotated[
        int | None,
        typer.Option(
            "--max-evals",
            help="Candidates to evaluate at most. (default: 16 per variable, up to 1,200)",
            rich_help_panel=_STRATEGY,
        ),
    ] = None,
    minibatch: Annotated[
        int | None,
        typer.Option(
            "--minibatch",
            help="Examples per generation of joint, in turn. (default: 2 with logprob or fidelity, else all)",
            rich_help_panel=_ADVANCED,
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            metavar="NAME",
            callback=to_read,
            help="What joint starts from: gradient, lukv, uniform, pyramid or a profile's file. (default: gradient "
            "where the metric has a slope, else uniform)",
            rich_help_panel=_STRATEGY,
        ),
    ] = None,
    gradient_steps: Annotated[
        int,
        typer.Option(
            "--gradient-steps",
            help="Steps of the gradient start, of two examples each.",
            rich_help_panel=_ADVANCED,
        ),
    ] = 48,
    first: Annotated[
        str,
        typer.Option(
            "--first",
            metavar="smallest|largest",
            callback=one_of("order", ("smallest", "largest")),
            help="The budget that a curve begins with.",
            rich_help_panel=_STRATEGY,
        ),
    ] = "smallest",
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            metavar="SECONDS",
            help="End in about this time, the choice on validation examples included. (default: none)",
            rich_help_panel=_STRATEGY,
        ),
    ] = None,
    population: Annotated[
        int | None,
        typer.Option(
            "--population",
            help="Candidates per generation. (default: 4 + 3 ln n, for n variables)",
            rich_help_panel=_ADVANCED,
        ),
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(
            "--sigma", help="Initial step. (default: joint 0.5, by head 0.7; evolkv 0.3)", rich_help_panel=_ADVANCED
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size", help="Layers per group of strategy evolkv. (default: 8)", rich_help_panel=_ADVANCED
        ),
    ] = None,
    lam: Annotated[
        float, typer.Option("--lam", help="Weight of the cache score in the fitness.", rich_help_panel=_ADVANCED)
    ] = 0.3,
    gamma: Annotated[
        float, typer.Option("--gamma", help="Discount for budgets below the target.", rich_help_panel=_ADVANCED)
    ] = 0.2,
    floor: Annotated[
        int | None,
        typer.Option(
            "--floor",
            help="The least a head may get. (default: one more than the selector always keeps)",
            rich_help_panel=_ADVANCED,
        ),
    ] = None,
    ceiling: Annotated[
        int | None,
        typer.Option(
            "--ceiling",
            help="The most a head may get. (default: the longest training prompt)",
            rich_help_panel=_ADVANCED,
        ),
    ] = None,
    loss: Annotated[
        float,
        typer.Option(
            "--loss",
            help="With --budget auto: how much score may be lost against the full cache.",
            rich_help_panel=_OBJECTIVE,
        ),
    ] = 0.05,
    confidence: Annotated[
        float, typer.Option("--confidence", help="With --budget auto: how sure that is.", rich_help_panel=_OBJECTIVE)
    ] = 0.95,
    certify: Annotated[
        int | None,
        typer.Option(
            "--certify",
            metavar="N",
            help="With --budget auto: examples to certify on. (default: enough for a quarter of --loss)",
            rich_help_panel=_OBJECTIVE,
        ),
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
    json_out: Annotated[str | None, json_option("RESULT.json", "every evaluation goes")] = None,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
) -> int:
    """Evolve a profile for a task. To go on after a stop or a kill, repeat the command."""
    from evolkv.cli.search_command import run

    return run(with_preset(context))


def with_preset(context: typer.Context) -> dict[str, Any]:
    """Return the options of a search, those that were not given as the preset has them."""
    from evolkv.evolution.config import preset_settings

    options = context.params
    for name, value in preset_settings(options.pop("preset")).items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "DEFAULT":
            options[name] = [value] if name == "selector" and isinstance(value, str) else value
    return options
