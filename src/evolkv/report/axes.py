"""Scales and axes of charts: where a number stands, and which numbers are labelled."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from evolkv.report.words import number


@dataclass(frozen=True)
class Scale:
    """From numbers to percentages of an axis."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a number: 0 at the low end, 100 at the high one."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(100 * (at - low) / (high - low), 3) if high > low else 50.0

    def down(self, value: float) -> float:
        """The same from the top, as vertical places count."""
        return round(100 - self(value), 3)


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, with a second line below its label."""

    at: float
    label: str
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """An axis with its title."""

    title: str
    ticks: list[Tick]

    @classmethod
    def upwards(cls, title: str, ticks: Iterable[Tick]) -> Axis:
        """A vertical axis, whose places count from the top while its numbers grow upwards."""
        return cls(title, [Tick(round(100 - tick.at, 3), tick.label) for tick in ticks])


@dataclass(frozen=True)
class Table:
    """A chart's numbers as text.

    Args:
        caption: what they are.
        columns: headings.
        rows: cells, the first of each row being its heading.
    """

    caption: str
    columns: list[str]
    rows: list[list[str]]


def linear_ticks(scale: Scale, most: int = 6, least_step: float = 0.0) -> list[Tick]:
    """Round numbers within a linear scale."""
    return [Tick(scale(value), f"{value:,.6g}") for value in _round_numbers(scale.low, scale.high, most, least_step)]


def log_ticks(scale: Scale, most: int = 6) -> list[Tick]:
    """Round numbers within a logarithmic scale: 50, 100, 200, 500, …"""
    if scale.high < 4 * scale.low:
        return [Tick(scale(value), f"{value:,.6g}") for value in _round_numbers(scale.low, scale.high, most)]
    decades = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    for steps in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        values = [k * 10.0**d for d in decades for k in steps if scale.low <= k * 10.0**d <= scale.high]
        if len(values) <= most:
            break
    return [Tick(scale(value), f"{value:,.4g}") for value in values[:: math.ceil(len(values) / most)]]


def index_ticks(count: int, most: int = 8) -> list[Tick]:
    """Round positions among `count` cells, at their centres."""
    step = next(k * 10**d for d in range(10) for k in (1, 2, 5) if count / (k * 10**d) <= most)
    return [Tick(round(100 * (i + 0.5) / count, 3), number(i)) for i in range(0, count, step)]


def _round_numbers(low: float, high: float, most: int, least_step: float = 0.0) -> list[float]:
    if high <= low:
        return [low]
    decade = math.floor(math.log10(high - low)) - 1
    for step in (k * 10.0**d for d in range(decade, decade + 4) for k in (1, 2, 2.5, 5)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most and step >= least_step:
            break
    return [i * step for i in range(first, last + 1)]
