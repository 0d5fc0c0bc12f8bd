"""`evolkv eval`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import typer

from evolkv.cli import console
from evolkv.cli.arguments import sibling
from evolkv.cli.options import (
    Attention,
    Companion,
    Device,
    Dtype,
    Markdown,
    Model,
    ModelOptions,
    PrefillChunk,
    Protocol,
    Seed,
    Trust,
    accompanied,
    files,
    json_option,
    to_read,
    to_write,
)
from evolkv.cli.tables import print_table

if TYPE_CHECKING:
    from evolkv.evaluation import EvaluationProgress, Method
    from evolkv.selectors import Selector


def evaluate(
    model: Model,
    task: Annotated[list[str], typer.Option("--task", "-t", metavar="TASK...", help="What to answer.")],
    method: Annotated[
        list[str],
        typer.Option(
            "--method",
            "-m",
            metavar="METHOD...",
            callback=to_read,
            help="full, a selector (snapkv, snapkv:gqa=max), ALLOCATOR+SELECTOR, pyramidkv, or the path of a "
            "profile (profile-{}.json: one for each budget).",
        ),
    ],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            "-b",
            metavar="C...",
            help="Mean cache entries per KV head, or a share of each prompt (10%); profiles have their own.",
        ),
    ] = None,
    companion: Companion = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Examples per task.")] = 50,
    sample_ids: Annotated[
        list[str] | None,
        typer.Option("--sample-ids", metavar="ID...", help="Only these of the examples that --samples draws."),
    ] = None,
    seed: Seed = 0,
    metric: Annotated[str | None, typer.Option("--metric", help="What to score. (default: the task's own)")] = None,
    protocol: Protocol = "aware",
    prefill_chunk: PrefillChunk = None,
    block_size: Annotated[
        int | None,
        typer.Option("--block-size", metavar="N", help="Round budgets as a server with blocks of N tokens does."),
    ] = None,
    json_out: Annotated[str | None, json_option("RESULTS.json", "the rows go")] = None,
    records: Annotated[
        str | None,
        typer.Option(
            "--records",
            metavar="FILE.jsonl",
            callback=to_write,
            help="Where every example goes, or none. (default: RESULTS.records.jsonl beside --json)",
        ),
    ] = None,
    markdown: Markdown = None,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
) -> int:
    """Compare methods on the same held-out examples. Options with ... take several values.

    To go on after a stop or a kill, repeat the command, if it keeps --records.
    """
    from evolkv.budgets import read_budgets
    from evolkv.whole_files import check_outputs

    console.keep_stdout_for_json(json_out)
    beside = None if json_out in (None, "-") else sibling(json_out, ".records.jsonl")
    kept = None if records == "none" else beside if records is None else records
    budgets = read_budgets(budget or [], "--budget")
    from evolkv.evaluation import EvaluationInterrupted, get_method
    from evolkv.evaluation import evaluate as run_evaluation
    from evolkv.evaluation.evaluation import check_request
    from evolkv.tasks import get_tasks
    from evolkv.tasks.check import check_examples

    tasks, methods = get_tasks(task), [get_method(name) for name in method]
    selectors = accompanied([each.selector for each in methods], companion)
    methods = [_with_selector(each, selector) for each, selector in zip(methods, selectors, strict=True)]
    read = [*(each.files() for each in tasks), *(each.files(budgets) for each in methods)]
    check_outputs(files(json_out, kept, markdown), chain.from_iterable(read))
    check_request(methods, budgets, samples, metric)
    for every in tasks:
        every.check_files()
    check = partial(check_examples, tasks, {"report": samples}, metric=metric, protocol=protocol, seed=seed)
    profiles = [each.profile for method in methods for each in (method, *map(method.at, budgets))]
    load = ModelOptions(dtype, device, attn_implementation, trust_remote_code).load
    loaded, tokenizer = load(model, check, profiles)
    stopped: EvaluationInterrupted | None = None
    with console.Progress() as progress:
        try:
            rows = run_evaluation(
                loaded,
                tokenizer,
                task=tasks,
                methods=methods,
                budgets=budgets,
                samples=samples,
                seed=seed,
                metric=metric,
                protocol=protocol,
                prefill_chunk=prefill_chunk,
                block_size=block_size,
                sample_ids=sample_ids,
                records=kept,
                on_progress=lambda step: _show(progress, step, kept),
            )
        except EvaluationInterrupted as interruption:
            stopped, rows = interruption, interruption.rows
    so_far = "" if stopped is None else f"after {stopped.finished} of {stopped.total} examples"
    if rows:
        from evolkv.report.tables import results_note, results_table
        from evolkv.schemas import RESULTS_FORMAT

        unfinished = {"interrupted": True} if stopped else {}
        try:
            console.write_json(json_out, {"format": RESULTS_FORMAT, **unfinished, "rows": rows})
        finally:
            # A file that cannot be written must not take the numbers with it.
            note = " ".join(filter(None, [f"Interrupted {so_far}." if stopped else "", results_note(rows)]))
            print_table(results_table(rows), markdown, note)
    if stopped is not None:
        again = "" if kept is None or not rows else f"; they are in {kept}, and the same command goes on from there"
        console.say(f"evolkv: interrupted {so_far}{again}")
        return 130
    return 0


def _with_selector(method: Method, selector: Selector | None) -> Method:
    """Return a method with its companion, which its name says, so that a report's command needs nothing else."""
    if selector is None or selector == method.selector:
        return method
    return replace(method, selector=selector, name=method.name if method.profile else selector.spec)


def _show(progress: console.Progress, step: EvaluationProgress, records: str | None) -> None:
    if step.recorded and step.done == step.recorded:
        console.note(f"evolkv: {step.recorded} of {step.total} examples are on record in {records}; they are kept")
    progress("examples", step.done, step.total)
