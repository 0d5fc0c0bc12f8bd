"""The geometry of a report's heat maps: budgets by layer and head, and prompt positions that are kept.

The places of cells count cells; those of ticks and bars are percentages of the plot's width or height.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from evolkv.report.axes import Axis, Scale, Table, Tick, index_ticks, linear_ticks
from evolkv.report.schemas import Kept
from evolkv.report.words import number

#: Steps of the colour scale.
LEVELS = 16
_MOST_BINS = 160


@dataclass(frozen=True)
class HeatMap:
    """Coloured cells.

    Args:
        paths: (level of the colour scale, path in cells) pairs; a cell without a level is left empty.
        columns: number of columns.
        rows: number of rows.
        x: axis along the columns.
        y: axis along the rows.
        key: labelled places on the colour scale.
        table: the numbers.
        marks: labelled places above the cells.
    """

    paths: list[tuple[int, str]]
    columns: int
    rows: int
    x: Axis
    y: Axis
    key: list[Tick]
    table: Table
    marks: Sequence[Tick] = ()


@dataclass(frozen=True)
class Bars:
    """A mean budget per layer, above the heat map of its heads; (left, top, width, height) in percent."""

    y: Axis
    bars: list[tuple[float, float, float, float]]
    mean: float
    mean_label: str


def budget_charts(budgets: Sequence[Sequence[int]], caption: str) -> tuple[Bars, HeatMap]:
    """A bar per layer on a linear scale, whose area is memory, and a cell per layer and head in log colours."""
    layers, heads = len(budgets), len(budgets[0])
    by_head = any(value != row[0] for row in budgets for value in row)
    shown = list(zip(*budgets, strict=True)) if by_head else [[row[0] for row in budgets]]
    means = [math.fsum(row) / heads for row in budgets]
    mean = math.fsum(means) / layers
    y = Scale(0, max(max(means), 1) * 1.04)
    wide = 100 / layers
    bars = [
        (round(wide * (i + 0.1), 3), y.down(value), round(wide * 0.8, 3), round(y(value), 3))
        for i, value in enumerate(means)
    ]
    lowest, highest = max(1, min(map(min, budgets))), max(1, max(map(max, budgets)))
    colour = Scale(lowest, highest, log=True)
    levels = [[round(colour(max(1, v)) / 100 * (LEVELS - 1)) for v in row] for row in shown]
    columns = ["layer", *(f"head {head}" for head in range(heads)), "mean"] if by_head else ["layer", "each head"]
    rows = [
        [str(layer), *(map(number, row) if by_head else [number(row[0])]), *([f"{means[layer]:,.1f}"] * by_head)]
        for layer, row in enumerate(budgets)
    ]
    key = [Tick(colour(v), number(v)) for v in dict.fromkeys((lowest, round(math.sqrt(lowest * highest)), highest))]
    if lowest == highest:
        key = [Tick(50, number(lowest))]
    heat = HeatMap(
        heat_paths(levels),
        layers,
        len(shown),
        Axis("layer", index_ticks(layers)),
        Axis("KV head" if by_head else "", index_ticks(heads, 6) if by_head else []),
        key,
        Table(caption, columns, rows),
    )
    return Bars(Axis.upwards("entries", linear_ticks(y, 4)), bars, y.down(mean), number(round(mean, 1))), heat


def kept_chart(kept: Kept, caption: str) -> HeatMap:
    """Layers × positions of the prompt; darker where a larger share of the tokens is kept."""
    merge = math.ceil(len(kept.share[0]) / _MOST_BINS)
    width = kept.bin * merge
    shares = [[_mean(row[i : i + merge]) for i in range(0, len(row), merge)] for row in kept.share]
    bins = len(shares[0])
    # A share that is not zero is seen, however small.
    levels = [[max(1, round(share * (LEVELS - 1))) if share else None for share in row] for row in shares]
    spans = [f"tokens {i * width}–{min(kept.tokens, (i + 1) * width) - 1}" for i in range(bins)]
    x = Scale(0, bins * width)
    ticks = [tick for tick in linear_ticks(x) if tick.at <= x(kept.tokens)]
    rows = [[str(layer), *(f"{share:.2f}".removeprefix("0") for share in row)] for layer, row in enumerate(shares)]
    return HeatMap(
        heat_paths(levels),
        bins,
        len(shares),
        Axis("position in the prompt (tokens)", ticks),
        Axis("layer", index_ticks(len(shares))),
        [Tick(0, "none"), Tick(50, "half"), Tick(100, "all")],
        Table(caption, ["layer", *spans], rows),
        [Tick(x((answer.start + answer.end) / 2), "answer") for answer in kept.answers],
    )


def heat_paths(levels: Sequence[Sequence[int | None]]) -> list[tuple[int, str]]:
    """One path per colour, neighbours of the same colour in one piece; a pair per level that occurs."""
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(levels):
        x = 0
        for level, run in groupby(row):
            wide = sum(1 for _ in run)
            if level is not None:
                paths.setdefault(level, []).append(f"M{x} {y}h{wide}v1h-{wide}z")
            x += wide
    return [(level, "".join(paths[level])) for level in sorted(paths)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
