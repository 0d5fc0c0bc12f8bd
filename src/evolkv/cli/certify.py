"""`evolkv certify`."""

from __future__ import annotations

from typing import Annotated

import typer

from evolkv.cli import console
from evolkv.cli.options import Markdown, files, json_option, to_read
from evolkv.cli.tables import print_result


def certify(
    records: Annotated[
        str,
        typer.Argument(
            metavar="RECORDS",
            callback=to_read,
            help="Records of full and other methods at several budgets, as eval writes them (--records).",
        ),
    ],
    loss: Annotated[
        float, typer.Option("--loss", help="How much score may be lost against the full cache, per example on average.")
    ] = 0.05,
    confidence: Annotated[float, typer.Option("--confidence", help="How sure each certificate is, by itself.")] = 0.95,
    json_out: Annotated[str | None, json_option("CERTIFICATES.json", "the numbers go")] = None,
    markdown: Markdown = None,
) -> None:
    """Find the smallest budget of each method that is safe: its expected loss is below a bound, with confidence."""
    from evolkv.whole_files import check_outputs

    console.keep_stdout_for_json(json_out)
    check_outputs(files(json_out, markdown), [records])
    with console.busy("certifying"):
        console.quiet_libraries()
        from evolkv.evaluation.certify import certify_records
        from evolkv.report.tables import certificates_note, certificates_table

        found = certify_records(records, loss, confidence)
    print_result(found.to_dict(), certificates_table(found), certificates_note(found), json_out, markdown)
