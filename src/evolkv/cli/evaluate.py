"""`evolkv eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from evolkv.cli import console
from evolkv.cli.arguments import whole_numbers
from evolkv.cli.options import Attention, Device, Dtype, Model, ModelOptions, Seed, Trust
from evolkv.cli.tables import results_table


def evaluate(
    model: Model,
    task: Annotated[list[str], typer.Option("--task", metavar="TASK...", help="What to answer.")],
    method: Annotated[
        list[str],
        typer.Option(
            "--method",
            metavar="METHOD...",
            help="full, a selector, ALLOCATOR+SELECTOR, pyramidkv, or the path of a profile.",
        ),
    ],
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", metavar="C...", help="Mean cache entries per KV head; profiles have their own."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Examples per task.")] = 50,
    seed: Seed = 0,
    metric: Annotated[str | None, typer.Option("--metric", help="Default: the task's own.")] = None,
    json_out: Annotated[str | None, typer.Option("--json", metavar="RESULTS.json", help="Where the rows go.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
) -> int:
    """Compare methods on the same held-out examples. Options with ... take several values."""
    from evolkv.report.files import check_writable, write_json

    if json_out is not None:
        check_writable(json_out)
    budgets = whole_numbers("--budget", budget or [])
    from evolkv.evaluate import evaluate as run_evaluation
    from evolkv.evaluate import get_method
    from evolkv.tasks import get_task
    from evolkv.tasks.metrics import check_metric

    tasks, methods = [get_task(spec) for spec in task], [get_method(name) for name in method]
    if metric is not None:
        check_metric(metric)
    loaded, tokenizer = ModelOptions(dtype, device, attn_implementation, trust_remote_code).load(model)
    with console.Progress() as progress:
        rows = run_evaluation(
            loaded,
            tokenizer,
            task=tasks,
            methods=methods,
            budgets=budgets,
            samples=samples,
            seed=seed,
            metric=metric,
            on_progress=lambda step: progress("examples", step.done, step.total),
        )
    if json_out is not None:
        write_json(json_out, {"format": "evolkv.results/1", "rows": rows})
    console.OUT.print(results_table(rows))
    return 0
