"""The geometry of a report's charts: where marks, lines and labels stand. The template draws them.

Places along an axis are percentages of the plot's width or height, so that a chart fits a phone as well as paper while
its text and strokes keep their size. Places within a path count from 0 to `UNIT` in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evolkv.report.axes import Axis, Scale, Table, Tick, linear_ticks, log_ticks
from evolkv.report.comparisons import Comparison
from evolkv.report.schemas import Candidate, Row, Search, course_in_turn
from evolkv.report.words import mebibytes, number, score

UNIT = 1000
#: Labels of budgets: how many, and how far apart in percent.
_MOST_TICKS, _LEAST_GAP = 8, 9


@dataclass(frozen=True)
class Stage:
    """A part of a search: where it begins and ends along the axis, its scores and the score that it has come to."""

    name: str
    style: int
    begin: float
    end: float
    dots: str
    dot_label: str
    line: str
    line_label: str


@dataclass(frozen=True)
class CourseChart:
    """The scores of a search, stage after stage; paths in `UNIT`."""

    x: Axis
    y: Axis
    stages: list[Stage]
    table: Table


@dataclass(frozen=True)
class Mark:
    """A score with the top and bottom of its interval, and its row in the table.

    It is hollow if another point has a higher score in no more memory.
    """

    x: float
    y: float
    top: float
    bottom: float
    row: int
    hollow: bool


@dataclass(frozen=True)
class Series:
    """The marks of one method and the line through them."""

    name: str
    style: int
    marks: list[Mark]
    line: str


@dataclass(frozen=True)
class ScoreChart:
    """Scores against budget; `band` is the full cache's (score, top, bottom) as a reference."""

    x: Axis
    y: Axis
    series: list[Series]
    band: tuple[float, float, float] | None


def course_chart(search: Search) -> CourseChart:
    """Scores of the steps of a gradient start, if there was one, and of the candidates after it, on one axis.

    Args:
        search: with at least one step or candidate.
    """
    steps, history = search.descent, search.history
    values = [entry.score for entry in [*steps, *history]]
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or 0.05
    x, y = Scale(0, len(values)), Scale(max(0, low - room), min(1, high + room))
    stages = []
    if steps:
        label = "all training examples, each as last seen"
        stages.append(_stage("gradient start", steps, course_in_turn(steps), 0, x, y, ("step", label)))
    if history:
        label = "mean of the distribution, each example as last seen" if search.rotating else "fittest so far"
        stages.append(_stage("evolution", history, search.course(), len(steps), x, y, ("candidate", label)))
    what = " and ".join(["gradient steps"] * bool(steps) + ["candidates"] * bool(history))
    return CourseChart(
        Axis(what, linear_ticks(x, least_step=1)), Axis.upwards("score", linear_ticks(y)), stages, _course_table(search)
    )


def _stage(
    name: str,
    entries: Sequence[Candidate],
    course: Sequence[tuple[int, float]],
    before: int,
    x: Scale,
    y: Scale,
    labels: tuple[str, str],
) -> Stage:
    def place(i: float, value: float) -> str:
        return f"{_unit(x(before + i))} {_unit(y.down(value))}"

    line = f"M{place(course[0][0] - 0.5, course[0][1])}"
    for done, value in course[1:]:
        line += f"H{_unit(x(before + done - 0.5))}V{_unit(y.down(value))}"
    end = x(before + len(entries))
    dots = "".join(f"M{place(i + 0.5, entry.score)}h0" for i, entry in enumerate(entries))
    return Stage(
        name, 1 if name == "evolution" else 2, x(before), end, dots, labels[0], f"{line}H{_unit(end)}", labels[1]
    )


def _course_table(search: Search) -> Table:
    """All scores; fitness only where it is not the score times a constant."""
    weighed = any(entry.cache_score != 1 for entry in search.history)
    several = bool(search.descent)
    columns = ["evaluated" if several else "candidate", "generation", "score", *["cache score", "fitness"] * weighed]
    steps = [[f"step {i}", "", score(e.score), *["", ""] * weighed] for i, e in enumerate(search.descent, 1)]
    rows = [
        [f"candidate {i}" if several else str(i), number(e.generation), score(e.score)]
        + [f"{e.cache_score:.3f}", f"{e.fitness:.4f}"] * weighed
        for i, e in enumerate(search.history, 1)
    ]
    return Table("Steps and candidates of the search", columns, steps + rows)


def score_chart(group: Comparison) -> ScoreChart:
    """Scores, from 0 to 1, against the mean budget on a logarithmic axis, whose labels say the memory, too.

    Args:
        group: methods at several budgets; the full cache's score is a line across.
    """
    full, styles = group.full, group.styles()
    drawn = [(i, entry) for i, entry in enumerate(group.entries) if entry is not full]
    budgets = [entry.row.mean_budget for _, entry in drawn]
    room = max((max(budgets) / min(budgets)) ** 0.08, 1.15)
    x, y = Scale(min(budgets) / room, max(budgets) * room, log=True), Scale(0, 1)

    def heights(row: Row) -> tuple[float, float, float]:
        return y.down(row.score), y.down(row.ci95[1]), y.down(row.ci95[0])

    memory = {round(entry.row.mean_budget, 1): f"{mebibytes(entry.row.kv_bytes)} MiB" for entry in group.entries}
    ticks: list[Tick] = []
    for budget in reversed(group.budgets):
        # Of neighbours that would write over each other the larger is labelled.
        if not ticks or ticks[-1].at - x(budget) >= _LEAST_GAP:
            ticks.append(Tick(x(budget), f"{budget:,.6g}", memory[budget]))
    if len(ticks) > _MOST_TICKS:
        ticks = log_ticks(x)
    series = []
    for name in dict.fromkeys(entry.name for _, entry in drawn):
        members = sorted((each for each in drawn if each[1].name == name), key=lambda each: each[1].row.mean_budget)
        marks = [Mark(x(e.row.mean_budget), *heights(e.row), row=i, hollow=not e.on_front) for i, e in members]
        line = "M" + "L".join(f"{_unit(m.x)} {_unit(m.y)}" for m in marks)
        series.append(Series(name, styles[name], marks, line if len(marks) > 1 else ""))
    return ScoreChart(
        Axis("mean budget (cache entries per KV head), and the cache's size", ticks),
        Axis.upwards("score", linear_ticks(y)),
        series,
        None if full is None else heights(full.row),
    )


def _unit(percent: float) -> str:
    return f"{percent * UNIT / 100:.4g}"
