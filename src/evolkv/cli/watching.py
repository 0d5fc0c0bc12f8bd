"""Pictures of long work on a terminal: progress, and the best that a search has so far."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.segment import Segment

from evolkv.cli.budgets_map import budgets_map
from evolkv.cli.glyphs import ACCENT, BOLD, DIM, PLAIN, Glyphs, Line, fitted
from evolkv.cli.standing import Standing, speed
from evolkv.report.words import duration

_MOST_BAR_COLUMNS, _LEAST_BAR_COLUMNS = 40, 6
#: Where there are fewer columns, none are spent on the ends of the scale.
_LABELLED_COLUMNS = 30


def busy_picture(what: str, elapsed: float, columns: int, glyphs: Glyphs) -> list[Line]:
    """Return a line for work that cannot be measured, which began `elapsed` seconds ago; see `progress_picture`."""
    return [glyphs.facts([(what, PLAIN), (duration(elapsed), DIM)], columns)]


def progress_picture(
    step: Standing | None, now: float, elapsed: float, columns: int, rows: int, glyphs: Glyphs
) -> list[Line]:
    """Work in stages; of a search also the best so far, fitness over generations and the fittest budgets.

    Args:
        step: where the work stands, or None before the first step.
        now: seconds of `time.monotonic`.
        elapsed: seconds since the work began.
        columns: most columns of a line.
        rows: most lines, at least 1. What matters least is left out if they do not suffice.
        glyphs: what the terminal can show.
    """
    if step is None:
        return busy_picture("starting", elapsed, columns, glyphs)
    lines = [_bar(step, columns, glyphs)]
    if rows > 2:
        left = step.seconds_left(now)
        pace = [(speed(step.rate), PLAIN)] if step.rate is not None else []
        pace += [(f"{duration(left)} left", PLAIN)] if left else []
        lines.append(glyphs.facts([*pace, (f"{duration(elapsed)} so far", DIM)], columns))
    if step.best_score is not None and rows > 1:
        best = [(f"score {step.best_score:.4f}", BOLD)]
        best += [(f"fitness {step.best_fitness:.4f}", PLAIN)] if step.best_fitness is not None else []
        best += [(f"generation {step.generation}", DIM)] if step.generation is not None else []
        best += [(f"budget {step.budget}", DIM)] if step.budget is not None else []
        best += [(f"under {step.selector}", DIM)] if step.selector is not None else []
        lines.append(glyphs.facts(best, columns))
    if step.fitnesses and rows > 3:
        lines.append(_sparkline(step.fitnesses, columns, glyphs))
    return lines + (budgets_map(step.budgets, columns, rows - len(lines), glyphs) if step.budgets else [])


def _bar(step: Standing, columns: int, glyphs: Glyphs) -> Line:
    share = min(1.0, step.done / step.total) if step.total else 1.0
    stage, percent, count = f"{step.stage} ", f" {math.floor(100 * share):>3}%", f"{step.done:,}/{step.total:,}"
    room = min(_MOST_BAR_COLUMNS, columns - len(f"{stage}{percent} {count}"))
    if room < _LEAST_BAR_COLUMNS:
        return fitted([[Segment(stage, BOLD)], [Segment(count, PLAIN)]], columns)
    done = round(room * share)
    bar = [Segment(glyphs.done * done, ACCENT), Segment(glyphs.rest * (room - done), DIM)]
    return [Segment(stage, BOLD), *bar, Segment(percent, BOLD), Segment(f" {count}", PLAIN)]


def _sparkline(fitnesses: Sequence[float], columns: int, glyphs: Glyphs) -> Line:
    """The highest fitness of each generation, or of several where they do not fit."""
    lowest, highest = min(fitnesses), max(fitnesses)
    before, after = "fitness ", ""
    if columns >= _LABELLED_COLUMNS:
        before, after = f"{before}{lowest:.4g} ", f" {highest:.4g}"
    size = math.ceil(len(fitnesses) / max(1, columns - len(before + after)))
    peaks = [max(fitnesses[first : first + size]) for first in range(0, len(fitnesses), size)]
    marks = "".join(glyphs.level((peak - lowest) / (highest - lowest) if highest > lowest else 0.5) for peak in peaks)
    return fitted([[Segment(before, DIM)], [Segment(marks, ACCENT)], [Segment(after, DIM)]], columns)
