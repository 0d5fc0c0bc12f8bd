"""The geometry of a report's charts: where marks, lines and labels stand. The template draws them.

Places along an axis are percentages of the plot's width or height, so that a chart fits a phone as well as paper while
its text and strokes keep their size. Places within a path count from 0 to `UNIT` in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from evolkv.report.axes import Axis, Scale, Table, Tick, linear_ticks, log_ticks
from evolkv.report.schemas import Search
from evolkv.report.words import number, score

UNIT = 1000
_DODGE_PX = 7


@dataclass(frozen=True)
class FitnessChart:
    """Every candidate's fitness, the best so far (or what stands for it), each generation's mean; paths in `UNIT`."""

    x: Axis
    y: Axis
    dots: str
    dot_label: str
    best: str
    best_label: str
    mean: str
    table: Table


@dataclass(frozen=True)
class Mark:
    """A score with the top and bottom of its interval, and its row in the table."""

    x: float
    y: float
    top: float
    bottom: float
    row: int
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """The marks of one method and the line through them; `shift` moves both sideways by pixels, off others' marks."""

    name: str
    style: int
    marks: list[Mark]
    line: str
    shift: float


@dataclass(frozen=True)
class ScoreChart:
    """Scores against a budget or memory; `band` is the full cache's (score, top, bottom) as a reference."""

    x: Axis
    y: Axis
    series: list[Series]
    band: tuple[float, float, float] | None
    table: Table


@dataclass(frozen=True)
class Scored:
    """One score to draw.

    Args:
        series: name of the method.
        x: budget or MiB.
        score: mean metric.
        interval: 95 % interval.
        row: its row in the table.
        hollow: whether another point has a higher score in no more memory.
    """

    series: str
    x: float
    score: float
    interval: Sequence[float]
    row: int
    hollow: bool = False


def fitness_chart(search: Search) -> FitnessChart:
    """Fitness over evaluations.

    Args:
        search: with at least one candidate.
    """
    rows = [
        [str(i), number(e.generation), f"{e.fitness:.4f}", score(e.score), f"{e.cache_score:.3f}"]
        for i, e in enumerate(search.history, 1)
    ]
    table = Table("Candidates", ["candidate", "generation", "fitness", "score", "cache score"], rows)
    leader = "mean of the distribution, all examples as last seen" if search.rotating else "best so far"
    return _course_chart(search, "candidates evaluated", "fitness", "candidate", leader, table)


def descent_chart(search: Search) -> FitnessChart:
    """Scores under soft cuts over the steps of a descent.

    Args:
        search: with at least one step.
    """
    steps = search.model_copy(update={"history": search.descent})
    rows = [[str(i), score(e.score)] for i, e in enumerate(search.descent, 1)]
    table = Table("Steps", ["step", "score under soft cuts"], rows)
    return _course_chart(steps, "steps", "score under soft cuts", "step", "all examples as last seen", table)


def _course_chart(search: Search, x_title: str, y_title: str, dot: str, leader: str, table: Table) -> FitnessChart:
    history, course = search.history, search.course()
    values = [*(entry.fitness for entry in history), *(fitness for _, fitness, _ in course)]
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or max(abs(high) * 0.05, 0.01)
    y = Scale(low - room, high + room)
    x = Scale(0, len(history))

    def place(i: float, value: float) -> str:
        return f"{_unit(x(i))} {_unit(y.down(value))}"

    best = f"M{place(course[0][0] - 0.5, course[0][1])}"
    for done, fitness, _ in course[1:]:
        best += f"H{_unit(x(done - 0.5))}V{_unit(y.down(fitness))}"
    means, start = [], 0
    for _, members in groupby(history, key=lambda entry: entry.generation):
        generation = [entry.fitness for entry in members]
        means.append(place(start + len(generation) / 2, _mean(generation)))
        start += len(generation)
    # Generations of one candidate are their own mean.
    several = len(history) > len(means) > 1
    return FitnessChart(
        Axis(x_title, linear_ticks(x, least_step=1)),
        Axis.upwards(y_title, linear_ticks(y)),
        "".join(f"M{place(i + 0.5, entry.fitness)}h0" for i, entry in enumerate(history)),
        dot,
        f"{best}H{UNIT}",
        leader,
        "M" + "L".join(means) if several else "",
        table,
    )


def score_chart(
    points: Sequence[Scored],
    styles: dict[str, int],
    title: str,
    table: Table,
    *,
    full: Scored | None = None,
    ticks_at: Iterable[float] = (),
    side_by_side: bool = False,
) -> ScoreChart:
    """Scores, from 0 to 1, against budget or memory on a logarithmic axis.

    Args:
        points: what to draw.
        styles: colour and shape of each series.
        title: of the horizontal axis.
        table: the numbers.
        full: the full cache's score, to be drawn as a reference over the whole width.
        ticks_at: where the axis is labelled, if these are few and far between; else at round numbers.
        side_by_side: move marks of several series at one place apart; then read them by the labels of the axis.
    """
    values = [point.x for point in points]
    room = max((max(values) / min(values)) ** 0.08, 1.15)
    x, y = Scale(min(values) / room, max(values) * room, log=True), Scale(0, 1)
    ticks = [Tick(x(value), f"{value:,.6g}") for value in sorted(set(ticks_at))]
    if not ticks or len(ticks) > 8 or any(b.at - a.at < 9 for a, b in pairwise(ticks)):
        ticks = log_ticks(x)
    shifts = _shifts(points) if side_by_side else {}
    series = []
    for name in dict.fromkeys(point.series for point in points):
        members = sorted((point for point in points if point.series == name), key=lambda point: point.x)
        marks = [
            Mark(x(p.x), y.down(p.score), y.down(p.interval[1]), y.down(p.interval[0]), p.row, p.hollow)
            for p in members
        ]
        line = "M" + "L".join(f"{_unit(m.x)} {_unit(m.y)}" for m in marks)
        series.append(Series(name, styles[name], marks, line if len(marks) > 1 else "", shifts.get(name, 0)))
    band = None if full is None else (y.down(full.score), y.down(full.interval[1]), y.down(full.interval[0]))
    return ScoreChart(Axis(title, ticks), Axis.upwards("score", linear_ticks(y)), series, band, table)


def _shifts(points: Sequence[Scored]) -> dict[str, float]:
    """Pixels to move each series by, so that marks at one place stand side by side."""
    crowded = [p.series for p in points if any(q.series != p.series and abs(q.x / p.x - 1) < 0.03 for q in points)]
    names = list(dict.fromkeys(crowded))
    return {name: (i - (len(names) - 1) / 2) * _DODGE_PX for i, name in enumerate(names)}


def _unit(percent: float) -> str:
    return f"{percent * UNIT / 100:.4g}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
