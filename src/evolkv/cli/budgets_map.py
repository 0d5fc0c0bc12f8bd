"""Budgets as a picture that fits: layers from left to right, heads from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby, product

import numpy as np
from rich.segment import Segment

from evolkv.cli.glyphs import ACCENT, DIM, Glyphs, Line, colours, fitted, shades

_LEAST_COLUMNS, _LEAST_ROWS = 8, 3
_MOST_BAR_ROWS = 8
#: Where there are fewer columns, none are spent on labels at the side.
_LABELLED_COLUMNS = 30


@lru_cache(maxsize=2)
def budgets_map(budgets: tuple[tuple[int, ...], ...], columns: int, rows: int, glyphs: Glyphs) -> list[Line]:
    """Budgets as a heat map with a cell per head, or, where the heads of a layer are alike, with a bar per layer.

    Layers that are too many for one band go on in another below. What still does not fit is averaged over neighbours,
    and the first line says so.

    Args:
        budgets: L rows of H ints.
        columns: most columns of a line.
        rows: most lines.
        glyphs: what the terminal can show.

    Returns:
        The lines; none if there is no room for a picture.
    """
    table = np.array(budgets, dtype=float).T
    if rows < _LEAST_ROWS or columns < _LEAST_COLUMNS:
        return []
    by_head = bool((table != table[0]).any())
    return (_heat_map if by_head else _bars)(table, columns, rows, glyphs)


def _heat_map(table: np.ndarray, columns: int, rows: int, glyphs: Glyphs) -> list[Line]:
    """A row per head, or half a row."""
    heads, layers = table.shape
    gutter = len(str(heads - 1)) + 1 if columns >= _LABELLED_COLUMNS else 0
    room = columns - gutter
    shapes = [(2, 1), (1, 1), *([(2, 2), (1, 2)] if glyphs.half else [])]
    # As little averaging as will do, over heads rather than layers; cells as large as will fit.
    averages = sorted(product(range(1, heads + 1), range(1, layers + 1)), key=lambda of: (of[0] * of[1], of[1]))
    for (of_heads, of_layers), (width, per_row) in ((counts, shape) for counts in averages for shape in shapes):
        across, down = math.ceil(layers / of_layers), math.ceil(math.ceil(heads / of_heads) / per_row)
        bands = math.ceil(across * width / (room - room % width))
        if bands * (down + 1) < rows:
            break
    lowest, highest = table.min(), table.max()
    means = _means(_means(table, of_heads).T, of_layers).T
    places = np.log(np.maximum(means, 1) / max(lowest, 1)) / math.log(max(highest, 2) / max(lowest, 1))
    ramp = _cells(np.linspace(0, 1, len(glyphs.levels))[None], 1, 1, glyphs)[0]
    scale = [Segment(f"{lowest:.0f} ", DIM), *ramp, Segment(f" {highest:.0f}", DIM)]
    lines = [_title(scale, {"head": of_heads, "layer": of_layers}, columns)]
    size = math.ceil(across / bands)
    for first in range(0, across, size):
        for row, cells in enumerate(_cells(places[:, first : first + size], width, per_row, glyphs)):
            lines.append(_labelled(str(row * per_row * of_heads), gutter, cells))
        lines.append(_axis(first, min(size, across - first), of_layers, width, gutter))
    return lines


def _bars(table: np.ndarray, columns: int, rows: int, glyphs: Glyphs) -> list[Line]:
    """A bar per layer."""
    lowest, highest = table.min(), table.max()
    gutter = len(f"{highest:.0f}") + 1 if columns >= _LABELLED_COLUMNS else 0
    room, layers = columns - gutter, table.shape[1]
    for of_layers in range(1, layers + 1):
        across = math.ceil(layers / of_layers)
        bands = math.ceil(across / room)
        height = min(_MOST_BAR_ROWS, (rows - 1) // bands - 1)
        if height >= min(2, rows - 2):
            break
    size = math.ceil(across / bands)
    width = next(width for width in (3, 2, 1) if size * width <= room)
    bar = max(1, width - 1)
    means = _means(table[:1].T, of_layers).T[0]
    eighths = np.maximum(1, np.round(8 * height * means / max(highest, 1))).astype(int).tolist()
    span = f"{highest:.0f}" if lowest == highest else f"{lowest:.0f} to {highest:.0f}"
    lines = [_title([Segment(span, DIM)], {"layer": of_layers}, columns)]
    for first in range(0, across, size):
        shown = range(first, min(first + size, across))
        for below in reversed(range(height)):
            levels = [min(8, max(0, eighths[index] - 8 * below)) for index in shown]
            marks = [glyphs.full if level == 8 else f" {glyphs.levels}"[level] for level in levels]
            cells = "".join((mark * bar).ljust(width) for mark in marks)
            lines.append(_labelled(f"{highest:.0f}" if below == height - 1 else "", gutter, [Segment(cells, ACCENT)]))
        lines.append(_axis(first, len(shown), of_layers, width, gutter))
    return lines


def _cells(places: np.ndarray, width: int, per_row: int, glyphs: Glyphs) -> list[Line]:
    """Cells for places from 0 to 1, shape [heads, layers].

    Args:
        places: what to show.
        width: columns of a cell.
        per_row: heads that share a row: one, or two in half a row each.
        glyphs: what to draw with.
    """
    rows = shades(places)
    lines = []
    for first in range(0, len(rows), per_row):
        cells: Iterable[tuple[str, int | None, int | None]]
        if not glyphs.half:
            cells = ((glyphs.level(place), None, None) for place in places[first].tolist())
        elif per_row == 1:
            cells = ((glyphs.full, upper, None) for upper in rows[first])
        else:
            below = rows[first + 1] if first + 1 < len(rows) else [None] * len(rows[first])
            cells = ((glyphs.half, upper, lower) for upper, lower in zip(rows[first], below, strict=True))
        # Drawing takes time for every change of colour, so neighbours that look the same are one.
        runs = ((cell, len([*run])) for cell, run in groupby(cells))
        lines.append([Segment(mark * width * length, colours(*pair)) for (mark, *pair), length in runs])
    return lines


def _title(scale: Line, averaged: dict[str, int], columns: int) -> Line:
    sizes = " and ".join(f"{count} {name}s" for name, count in averaged.items() if count > 1)
    what = f"mean of {sizes}" if sizes else "layers across, heads down" if "head" in averaged else "layers across"
    return fitted([[Segment("budgets ", DIM), *scale], [Segment(f"  {what}", DIM)]], columns)


def _axis(first: int, count: int, of_layers: int, width: int, gutter: int) -> Line:
    """Numbers of layers below their cells."""
    last = (first + count) * of_layers
    # A label and a gap.
    least = (len(str(last)) + 1) / width * of_layers
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if step >= least)
    text = ""
    for layer in range(-(-first * of_layers // step) * step, last, step):
        text = text.ljust((layer // of_layers - first) * width) + str(layer)
    return _labelled("", gutter, [Segment(text[: count * width], DIM)])


def _labelled(label: str, gutter: int, line: Line) -> Line:
    return [Segment(f"{label:>{gutter - 1}} ", DIM), *line] if gutter else line


def _means(values: np.ndarray, size: int) -> np.ndarray:
    """Means of `size` rows each; the last of what is left."""
    starts = np.arange(0, len(values), size)
    counts = np.diff(starts, append=len(values))
    return np.add.reduceat(values, starts, axis=0) / counts[:, None]
