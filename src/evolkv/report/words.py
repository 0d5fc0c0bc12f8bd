"""Numbers, quantities and other short texts as people read them, in the terminal and on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def number(value: float | str) -> str:
    """A number with its thousands apart; a share as it is."""
    if isinstance(value, str):
        return value
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"


def score(value: float) -> str:
    """A score to three decimals."""
    return f"{value:.3f}"


def interval(bounds: Sequence[float]) -> str:
    """A 95 % interval."""
    return f"{bounds[0]:.2f}–{bounds[1]:.2f}"


def with_interval(value: float, bounds: Sequence[float]) -> str:
    """A score with its 95 % interval."""
    return f"{score(value)} ({interval(bounds)})"


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


def in_chunks(tokens: int | None) -> str:
    """Return how prompts were read, if it was not at once."""
    return "" if tokens is None else f"in chunks of {number(tokens)}"


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f}\u202f%"


def listing(words: Sequence[str]) -> str:
    """Words as a sentence lists them: a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def counted(count: int, what: str) -> str:
    """A count with its noun: 1 candidate, 2 candidates."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def short(text: str, most: int = 400) -> str:
    """A text that came from outside, cut to what there is room for."""
    return text if len(text) <= most else text[: most - 1] + "…"


def candidates(evaluations: int, settings: Mapping[str, Any]) -> int:
    """Return the number of candidates that a search evaluated, under all of its selectors."""
    rows = rows if isinstance(rows := settings.get("rivals"), list) else []
    counts = [row.get("evaluations") for row in rows if isinstance(row, Mapping)]
    return sum(count for count in counts if isinstance(count, int)) or evaluations
