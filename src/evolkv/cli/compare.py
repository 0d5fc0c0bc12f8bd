"""`evolkv compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from evolkv.cli import console
from evolkv.cli.options import Markdown, files, json_option, to_read, valid_seed
from evolkv.cli.tables import print_result


def compare(
    records: Annotated[
        list[str],
        typer.Argument(
            metavar="RECORDS...", callback=to_read, help="Records of one model, as eval writes them (--records)."
        ),
    ],
    a: Annotated[
        str | None, typer.Option("--a", metavar="METHOD[@C]", callback=to_read, help="A method that is on record.")
    ] = None,
    b: Annotated[
        str | None, typer.Option("--b", metavar="METHOD[@C]", callback=to_read, help="The one to compare it with.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", "-b", metavar="C", help="Which budget, where the records have several."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", callback=valid_seed, help="Draws other resamples.")] = 0,
    json_out: Annotated[str | None, json_option("COMPARISON.json", "the numbers go")] = None,
    markdown: Markdown = None,
) -> None:
    """Compare two methods on the same examples: mean difference, 95 % interval, p-value."""
    from evolkv.whole_files import check_outputs

    console.keep_stdout_for_json(json_out)
    check_outputs(files(json_out, markdown), records)
    with console.busy("comparing"):
        from evolkv.evaluation.compare import compare_records
        from evolkv.report.tables import comparison_note, comparison_table

        found = compare_records(records, a, b, budget, seed)
    print_result(found.to_dict(), comparison_table(found), comparison_note(found), json_out, markdown)
