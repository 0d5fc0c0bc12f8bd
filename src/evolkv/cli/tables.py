"""Tables and pictures of results for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from evolkv.cli import console
from evolkv.cli.glyphs import RAMP
from evolkv.report.words import mebibytes, with_interval

if TYPE_CHECKING:
    from evolkv.report.axes import Table as TextTable

_BAR_WIDTH = 48
#: Names may be broken into lines of so many columns, where a terminal is narrow; numbers may not.
_LEAST_NAME = 12
#: Columns between two cells.
_GAP = 2
#: Columns that may become a heading, and how it says them.
_SHARED = {"task": "{}", "metric": "metric {}", "n": "n = {}"}
_SHADES = "·░▒▓█"


def print_table(table: TextTable, markdown: str | None = None, note: str = "") -> None:
    """Print a table, or put it where Markdown is wanted: ``-`` is the terminal, else a file, once it is printed.

    A note goes below it.
    """
    text = ""
    if markdown is not None:
        from evolkv.report.markdown import markdown as as_markdown

        text = as_markdown(table) + (f"\n{note}\n" if note else "")
    if markdown == "-":
        console.OUT.print(text, end="", soft_wrap=True)
        return
    for number, (heading, part) in enumerate(_fitting(table)):
        if number:
            console.OUT.print()
        if heading:
            console.OUT.print(Text(heading, style="dim"), soft_wrap=True)
        print_whole(part)
    if note:
        console.OUT.print(f"\n{note}", soft_wrap=True)
    if markdown is not None:
        from evolkv.whole_files import write_text

        write_text(markdown, text)


def print_result(
    data: Mapping[str, Any], table: TextTable, note: str, json_out: str | None, markdown: str | None
) -> None:
    """Write the numbers of a result as JSON where that is wanted, and print its table under the table's caption."""
    try:
        console.write_json(json_out, data)
    finally:
        # A file that cannot be written must not take the numbers with it.
        if markdown != "-":
            console.OUT.print(f"{table.caption}\n", soft_wrap=True)
        print_table(table, markdown, note)


def print_whole(table: Table) -> None:
    """Print a table with every number whole, on a terminal that is too narrow with lines that run on below."""
    least = 0
    for column in table.columns:
        cells = [column.header, *column.cells]
        words = [word for cell in cells for word in str(cell).split()]
        numbers = [word for word in words if any(map(str.isdigit, word)) and not any(map(str.isalpha, word))]
        longest = max(map(len, words), default=0)
        column.min_width = max([min(longest, _LEAST_NAME), *map(len, numbers)])
        column.no_wrap = column.justify == "right"
        least += column.min_width + _GAP
    if least > console.OUT.width:
        table.width = least
    console.OUT.print(table, crop=False)


def _fitting(table: TextTable) -> list[tuple[str, Table]]:
    """Cut a table down to the width of the terminal: tasks, and values that all rows share, become headings."""
    whole = shown(table)
    unbounded = console.OUT.options.update(width=10_000)
    if not table.rows or console.OUT.measure(whole, options=unbounded).maximum <= console.OUT.width:
        return [("", whole)]
    if table.columns[0] == "task" and len(tasks := list(dict.fromkeys(row[0] for row in table.rows))) > 1:
        parts = [replace(table, rows=[row for row in table.rows if row[0] == task]) for task in tasks]
        return [each for part in parts for each in _fitting(part)]
    shared = [
        at for at, name in enumerate(table.columns) if name in _SHARED and len({row[at] for row in table.rows}) == 1
    ]
    heading = ", ".join(_SHARED[table.columns[at]].format(table.rows[0][at]) for at in shared)
    columns, *rows = (
        [cell for at, cell in enumerate(cells) if at not in shared] for cells in (table.columns, *table.rows)
    )
    return [(heading, shown(replace(table, columns=columns, rows=rows)))]


def shown(found: TextTable) -> Table:
    """Return a table of text, its numbers right-aligned."""
    from evolkv.report.tables import NUMERIC

    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for column in found.columns:
        table.add_column(column, justify="right" if column in NUMERIC else "left", overflow="fold")
    for row in found.rows:
        table.add_row(*row)
    return table


def validation_table(rows: Sequence[dict[str, Any]], chosen: str) -> Table:
    """Return the allocations that a search chose from.

    Args:
        rows: the `validation` of a search result.
        chosen: name of the one chosen.
    """
    cells, seen = [], []
    for row in sorted(rows, key=lambda row: (-row["score"], row["name"] != chosen)):
        # A descent that nothing evolved from is the best candidate too.
        if row["budgets"] in seen:
            continue
        seen.append(row["budgets"])
        name = f"evolved, {row['name']}" if row["evolved"] else row["name"]
        mark = "← chosen" if row["name"] == chosen else ""
        cells.append([name, str(row["n"]), with_interval(row["score"], row["ci95"]), mark])
    return _of_cells(["allocation", "n", "score (95 % interval)", ""], cells)


def curve_table(points: Sequence[dict[str, Any]]) -> Table:
    """Return the points of a curve, smallest budget first.

    Args:
        points: as `evolkv.evolution.search_curve` returns them.
    """
    several = len({point["selector"] for point in points}) > 1
    columns = ["budget", "n", "score (95 % interval)", "KV MiB", "from", *(["under"] if several else []), ""]
    cells = []
    for point in points:
        mark = "" if point["on_front"] else "a smaller budget does as well"
        under = [point["selector"]] if several else []
        numbers = [str(point["budget"]), str(point["n"]), with_interval(point["score"], point["ci95"])]
        cells.append([*numbers, mebibytes(point["kv_bytes"]), point["source"], *under, mark])
    return _of_cells(columns, cells)


def list_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return rows of plain values under their keys."""
    return _of_cells(list(rows[0]), [[str(value) for value in row.values()] for row in rows])


def _of_cells(columns: list[str], rows: list[list[str]]) -> Table:
    from evolkv.report.axes import Table as TextTable

    return shown(TextTable("", columns, rows))


def budgets_picture(budgets: Sequence[Sequence[int]], by_head: bool, width: int, unit: str = "cache entries") -> Text:
    """Budgets for a terminal: a bar per layer, or a heat map with a row per layer and a cell per head.

    Args:
        budgets: L rows of H ints.
        by_head: whether heads differ.
        width: columns of the terminal.
        unit: what budgets count.
    """
    highest, lowest = max(map(max, budgets)), min(map(min, budgets))
    cell = len(str(highest)) + 2
    numbers = cell * len(budgets[0]) + 10 <= width
    picture = Text(f"layer  {unit}{' per head' * by_head}\n", style="dim")
    for layer, row in enumerate(budgets):
        picture.append(f"{layer:>5}  ", style="dim")
        if not by_head:
            room = min(_BAR_WIDTH, width - cell - 7)
            bar = "█" * max(1, round(room * row[0] / highest))
            picture.append(f"{row[0]:>{cell - 2}} ")
            picture.append(bar, style=_colours(row[0], lowest, highest)[0])
        elif numbers:
            for budget in row:
                ground, ink = _colours(budget, lowest, highest)
                picture.append(f"{budget:>{cell - 1}} ", style=f"{ink} on {ground}")
        else:
            for budget in row:
                shade = _SHADES[round(_place(budget, lowest, highest) * (len(_SHADES) - 1))]
                picture.append(shade, style=_colours(budget, lowest, highest)[0])
        picture.append("\n")
    picture.rstrip()
    return picture


def _place(value: int, lowest: int, highest: int) -> float:
    """Return the place of a value between two others on a logarithmic scale, from 0 to 1."""
    return math.log(value / lowest) / math.log(highest / lowest) if highest > lowest else 0.5


def _colours(value: int, lowest: int, highest: int) -> tuple[str, str]:
    return RAMP[round(_place(value, lowest, highest) * (len(RAMP) - 1))]
