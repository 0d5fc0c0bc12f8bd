"""The characters and colours that a terminal can show, and lines made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from rich.console import Console
from rich.segment import Segment
from rich.style import Style

#: From dark to bright on any 256-colour terminal, each with a text colour that can be read on it.
RAMP = [
    ("#440154", "white"),
    ("#414487", "white"),
    ("#2a788e", "white"),
    ("#22a884", "black"),
    ("#7ad151", "black"),
    ("#fde725", "black"),
]
Line = list[Segment]
PLAIN, BOLD, DIM, ACCENT = Style(), Style(bold=True), Style(dim=True), Style(color="cyan")


@dataclass(frozen=True)
class Glyphs:
    """Characters to draw with.

    Args:
        done: a column of a progress bar that is done.
        rest: one that is not.
        levels: from low to high.
        full: a whole cell.
        half: the upper half of a cell; empty where colours cannot tell its halves apart.
        separator: between two facts.
    """

    done: str
    rest: str
    levels: str
    full: str
    half: str
    separator: str

    def level(self, place: float) -> str:
        """Return the character for a place from 0 to 1."""
        return self.levels[round(place * (len(self.levels) - 1))]

    def facts(self, facts: Sequence[tuple[str, Style]], columns: int) -> Line:
        """Return as many of the first facts as fit into a line of so many columns."""
        parts = [
            [Segment(text if index == 0 else self.separator + text, style)] for index, (text, style) in enumerate(facts)
        ]
        return fitted(parts, columns)


def glyphs_for(console: Console) -> Glyphs:
    """Return the characters that a terminal can show."""
    if console.options.ascii_only:
        return Glyphs("#", "-", "._-=+*%@", "#", "", ", ")
    colours = not console.no_color and console.color_system in ("256", "truecolor")
    return Glyphs("━", "─", "▁▂▃▄▅▆▇█", "█", "▀" if colours else "", " · ")


def fitted(parts: Sequence[Line], columns: int) -> Line:
    """Return as many of the first parts as fit into a line of so many columns; the first is cut if need be."""
    line: Line = []
    for part in parts:
        if line and Segment.get_line_length(line + part) > columns:
            break
        line = line + part
    return Segment.adjust_line_length(line, columns, pad=False)


@cache
def colours(upper: int | None, lower: int | None = None) -> Style:
    """Return the colours of a cell.

    Args:
        upper: colour of the character, from 0 to the last of the ramp; None for the terminal's own.
        lower: colour behind it, likewise.
    """
    above, below = (None if index is None else RAMP[index][0] for index in (upper, lower))
    return Style(color=above, bgcolor=below)


def shades(places: np.ndarray) -> list[list[int]]:
    """Return the colours for places from 0 to 1, shape [rows, columns]."""
    return np.rint(places * (len(RAMP) - 1)).astype(int).tolist()
