"""`evolkv report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evolkv.cli import console
from evolkv.cli.options import to_read, to_write


def report(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY_OR_RESULTS...",
            callback=to_read,
            help="Searches, results, profiles, curves and records, folders of them, studies (file or storage URL).",
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="REPORT.html", callback=to_write, help="Where the page goes.")
    ] = "report.html",
    study: Annotated[
        str | None, typer.Option("--study", help="Which study, if the storage holds those of several searches.")
    ] = None,
) -> None:
    """Make one page of charts that shows a search, its budgets and how they compare; it needs no network."""
    from evolkv.whole_files import check_outputs, write_text

    check_outputs([out])
    from evolkv.report.page import render
    from evolkv.report.sources import read_sources

    sources = read_sources(inputs, study)
    check_outputs([out], sources.files)
    page = render(sources)
    write_text(out, page)
    console.OUT.print(f"report written to {Path(out)} ({len(page.encode()) / 1000:,.0f} kB)", soft_wrap=True)
