"""`evolkv report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from evolkv.cli import console
from evolkv.errors import UsageError


def report(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY_OR_RESULTS...",
            help="Searches, results, profiles, curves and records, folders of them, studies (file or storage URL).",
        ),
    ],
    out: Annotated[str, typer.Option("--out", metavar="REPORT.html", help="Where the page goes.")] = "report.html",
    study: Annotated[
        str | None, typer.Option("--study", help="Which study, if the storage holds those of several searches.")
    ] = None,
) -> None:
    """Make one page of charts that shows a search, its budgets and how they compare; it needs no network."""
    from evolkv.report.files import check_writable, write_text

    check_writable(out)
    if any(os.path.realpath(out) == os.path.realpath(path) for path in inputs):
        raise UsageError(f"--out is {out}, which is also read; give the page another name, such as report.html")
    from evolkv.report.page import render
    from evolkv.report.sources import read_sources

    page = render(read_sources(inputs, study))
    write_text(out, page)
    console.OUT.print(f"report written to {Path(out)} ({len(page.encode()) / 1000:,.0f} kB)", soft_wrap=True)
