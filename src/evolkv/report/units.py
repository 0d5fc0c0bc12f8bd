"""Quantities as people read them, in the terminal and on a page."""

from __future__ import annotations

from collections.abc import Sequence


def duration(seconds: float) -> str:
    """A time span: 42 s, 3 min 05 s, 1 h 02 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"


def mebibytes(count: float) -> str:
    """A number of bytes in MiB, without the unit."""
    size = count / 2**20
    return f"{size:,.2f}" if size < 10 else f"{size:,.1f}"


def gibibytes(count: float) -> str:
    """A number of bytes in GiB, without the unit."""
    return f"{count / 2**30:,.2f}"


def with_interval(score: float, interval: Sequence[float]) -> str:
    """A score with its 95 % interval."""
    return f"{score:.3f} ({interval[0]:.2f}–{interval[1]:.2f})"
