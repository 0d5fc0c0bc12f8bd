"""`evolkv demo`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from evolkv.cli import console
from evolkv.cli.next_steps import as_command, suggest
from evolkv.cli.options import Attention, Device, Dtype, Granularity, ModelOptions, Seed, Trust, to_write
from evolkv.cli.tables import print_table

if TYPE_CHECKING:
    from evolkv.demo import DemoResult

_MODEL, _CONTEXT = "smollm2-135m", 1600


def demo(
    out: Annotated[
        str,
        typer.Option("--out", "-o", metavar="DIR", callback=to_write, help="Folder for profile, results and picture."),
    ] = "demo",
    context: Annotated[int, typer.Option("--context", help="Length of the prompts in tokens.")] = _CONTEXT,
    budget: Annotated[int, typer.Option("--budget", "-b", help="Mean cache entries per KV head.")] = 40,
    granularity: Granularity = "head",
    seed: Seed = 0,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Held-out examples of the comparison.")] = 24,
    train: Annotated[
        int | None, typer.Option("--train", help="Examples that candidates are scored on. (default: 24)")
    ] = None,
    val: Annotated[
        int | None, typer.Option("--val", help="Examples that the result is chosen on. (default: 12)")
    ] = None,
    max_evals: Annotated[
        int | None, typer.Option("--max-evals", help="Candidates to evaluate. (default: 68; by layer 112)")
    ] = None,
    model: Annotated[str, typer.Option("--model", help="The model, as for other commands.")] = _MODEL,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
) -> int:
    """Evolve a profile on an embedded model, compare it on held-out examples, and write it all down."""
    from evolkv.demo import check_demo, run_demo
    from evolkv.report.tables import results_table
    from evolkv.tasks import get_task
    from evolkv.tasks.check import check_examples

    task = get_task(f"niah:context={context}")
    check_demo(out, budget, samples)
    check = partial(
        check_examples,
        [task],
        {"train": train, "validation": val, "report": samples},
        metric=None,
        protocol="aware",
        seed=seed,
    )
    load = ModelOptions(dtype, device, attn_implementation, trust_remote_code)
    loaded, tokenizer = load.load(model, check)
    with console.Progress() as progress:
        result = run_demo(
            loaded,
            tokenizer,
            out=out,
            context=context,
            budget=budget,
            granularity=granularity,  # type: ignore[arg-type]
            seed=seed,
            samples=samples,
            train=train,
            val=val,
            max_evals=max_evals,
            on_search=progress.of_search,
            on_evaluation=lambda step: progress("comparison", step.done, step.total),
        )
    files = result.files
    if result.interrupted:
        what = "the budgets so far are" if result.search.interrupted else "the profile is"
        console.say(f"evolkv: interrupted; {what} in {files.profile}")
        return 130
    print_table(results_table(result.rows))
    console.OUT.print(f"\n{_summary(result)}\n", soft_wrap=True)
    names = (files.report, files.profile, files.results, files.records, files.picture, files.search, files.prompt)
    console.OUT.print(f"Written to {files.folder}: {', '.join(path.name for path in names)}", soft_wrap=True)
    suggest(_next_commands(result, model, budget, context, load))
    return 0


def _summary(result: DemoResult) -> str:
    """Return the outcome of the comparison in one line."""
    rows = {row["method"]: row for row in result.rows}
    evolved, full = rows["evolkv"], rows["full"]
    share = evolved["kv_bytes"] / full["kv_bytes"]
    if result.search.improved:
        subject = "the evolved budgets find"
    else:
        subject = f"no evolved budgets beat {result.search.chosen!r} in validation, so the profile is that, and finds"
    return (
        f"With {share:.1%} of the KV cache {subject} {evolved['score']:.0%} of {evolved['n']} hidden numbers "
        f"(SnapKV {rows['snapkv']['score']:.0%}, PyramidKV {rows['pyramidkv']['score']:.0%}, "
        f"full cache {full['score']:.0%})."
    )


def _next_commands(
    result: DemoResult, model: str, budget: int, context: int, load: ModelOptions
) -> list[tuple[str, str]]:
    """Return (purpose, command) pairs; each command works when pasted."""
    from evolkv.demo import LEAST_BUDGET

    folder, profile = result.files.folder, result.files.profile
    # Of "." and "/" no other name can be made.
    beside = folder if folder.name.strip(".") else folder / "demo"
    paper = beside.with_name(f"{beside.name}-paper.json")
    half = beside.with_name(f"{beside.name}-half")
    methods = ["full", "tova", profile]
    commands: list[tuple[str, list[object]]] = [
        (
            f"a held-out prompt under the profile; the hidden number is {result.answer}",
            ["generate", model, "--profile", profile, "--prompt-file", result.files.prompt, "--raw"],
        ),
        (
            "other methods beside it",
            ["eval", model, "--task", result.task, "--samples", 20, "--budget", budget, "--method", *methods],
        ),
        (
            "the paper's own search strategy",
            ["search", model, "--task", result.task, "--budget", budget, "--strategy", "evolkv", "--out", paper],
        ),
    ]
    if budget // 2 >= LEAST_BUDGET:
        words = ["demo", "--granularity", "head", "--budget", budget // 2]
        words += ["--context", context] if context != _CONTEXT else []
        words += ["--model", model] if model != _MODEL else []
        commands.append(("the same in half the memory", [*words, "--out", half]))
    return [(comment, as_command([*words, *load.given()])) for comment, words in commands]
