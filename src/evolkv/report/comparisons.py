"""Scores that may stand side by side: all but the method and its budget is the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from evolkv.budgets import size_of
from evolkv.profile_file import ProfileFile
from evolkv.report.axes import Table
from evolkv.report.schemas import Curve, Row
from evolkv.report.words import counted, in_chunks, interval, mebibytes, number, percent, score

FULL, EVOLVED = "full", "evolkv"
_FULL_STYLE, _EVOLVED_STYLE, _OTHER_STYLES = 0, 1, 6


@dataclass(frozen=True)
class Entry:
    """A method at a budget; `source` and `on_front` are a curve's."""

    row: Row
    name: str
    source: str = ""
    on_front: bool = True


@dataclass
class Comparison:
    """Methods on the same examples.

    Args:
        entries: by budget, those of one budget from the highest score down; the full cache last.
        of_curve: they are a curve's points: scores on the examples that the choice of budgets was made on.
    """

    entries: list[Entry] = field(default_factory=list)
    of_curve: bool = False

    @property
    def first(self) -> Row:
        """A row, for what all have in common."""
        return self.entries[0].row

    @property
    def asked(self) -> str:
        """The protocol and how prompts were read, to stand behind other words; empty where nothing is to be said."""
        first = self.first
        return "".join(f", {said}" for said in (first.protocol, in_chunks(first.prefill_chunk)) if said)

    @property
    def examples(self) -> str:
        """The number of examples and their kind: those that a choice was made on are not held out."""
        if self.of_curve:
            return counted(self.first.n, "validation example")
        if seen := max(entry.row.seen for entry in self.entries):
            return f"{counted(self.first.n, 'example')}, {number(seen)} of which a search saw"
        return counted(self.first.n, "held-out example")

    @property
    def full(self) -> Entry | None:
        """The full cache."""
        return next((entry for entry in self.entries if entry.row.method == FULL), None)

    @property
    def evolved(self) -> list[Entry]:
        """Entries that came from a search."""
        return [entry for entry in self.entries if is_evolved(entry.row.method)]

    @property
    def budgets(self) -> list[float]:
        """The mean budgets that were compared, without the full cache's."""
        return sorted({round(e.row.mean_budget, 1) for e in self.entries if e.row.method != FULL})

    @property
    def single(self) -> bool:
        """True if all but the full cache have the same memory, apart from rounding."""
        return not self.budgets or self.budgets[-1] <= 1.02 * self.budgets[0]

    def rivals(self, entry: Entry) -> list[Entry]:
        """Return the entries that need no search and have the memory of this one."""
        return [
            other
            for other in self.entries
            if not is_evolved(other.row.method)
            and other.row.method != FULL
            and math.isclose(other.row.mean_budget, entry.row.mean_budget, rel_tol=0.02)
        ]

    def share(self, entry: Entry) -> float | None:
        """An entry's memory beside the full cache's."""
        return entry.row.kv_bytes / self.full.row.kv_bytes if self.full else None

    def styles(self) -> dict[str, int]:
        """Number of each method's colour and shape."""
        others = [e.name for e in self.entries if e.row.method != FULL and e not in self.evolved[:1]]
        names = [name for name in dict.fromkeys(others) if not self.evolved or name != self.evolved[0].name]
        styles = {name: 2 + i % _OTHER_STYLES for i, name in enumerate(names)}
        return {
            **styles,
            **({self.full.name: _FULL_STYLE} if self.full else {}),
            **({self.evolved[0].name: _EVOLVED_STYLE} if self.evolved else {}),
        }

    def table(self) -> Table:
        """All numbers."""
        columns = ["method", "budget", "mean budget", "n", "score", "95 % interval", "KV MiB"]
        # What all methods read, they hold.
        reads = any(entry.row.read_bytes not in (None, entry.row.kv_bytes) for entry in self.entries)
        accompanied = any(entry.row.companion_bytes for entry in self.entries)
        columns += ["of full"] * bool(self.full) + ["resident MiB", "companion MiB"] * accompanied
        columns += ["read MiB"] * reads + ["from", "on the front"] * self.of_curve
        rows = []
        for entry in self.entries:
            row = entry.row
            cells = [row.method, "–" if row.budget is None else number(row.budget), f"{row.mean_budget:,.1f}"]
            cells += [number(row.n), score(row.score), interval(row.ci95), mebibytes(row.kv_bytes)]
            if (share := self.share(entry)) is not None:
                cells.append(percent(share))
            if accompanied:
                cells += [mebibytes(row.resident_bytes or row.kv_bytes), mebibytes(row.companion_bytes)]
            cells += [mebibytes(row.read_bytes or row.kv_bytes)] * reads
            cells += [entry.source, ("yes" if entry.on_front else "no") if entry.source else ""] * self.of_curve
            rows.append(cells)
        return Table(f"{self.first.task}: {self.first.metric} by method{self.asked}", columns, rows)


def is_evolved(method: str) -> bool:
    """Return True if a method's name is that of a profile: the demo's, or a path."""
    return method == EVOLVED or is_path(method)


def is_path(method: str) -> bool:
    """Return True if a method's name is the path of a profile."""
    return method.lower().endswith(".json") or "/" in method or "\\" in method


def comparisons(rows: Sequence[Row], curves: Sequence[Curve], profiles: Sequence[ProfileFile]) -> list[Comparison]:
    """Group rows by what they were measured on. Curves come last, because their scores are not on held-out examples."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        how = (row.protocol, row.haystack, row.prefill_chunk, row.block_size, row.dtype, row.seed)
        shared = (row.model, row.task, row.metric, row.n, *how)
        groups.setdefault(shared, []).append(row)
    held_out = [Comparison(_ordered([Entry(row, name) for row, name in _named(group)])) for group in groups.values()]
    return held_out + [_from_curve(curve, profiles) for curve in curves]


def _named(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """Each row with the name of its series: profiles of one budget each are the points of one."""
    of_path = [row for row in rows if is_path(row.method)]
    methods = {row.method for row in of_path}
    if len(of_path) == len(methods) == len({row.budget for row in of_path}) > 1:
        return [(row, "profiles" if is_path(row.method) else row.method) for row in rows]
    bases = Counter(PurePath(method).name for method in methods)
    short = {method: base if bases[base := PurePath(method).name] == 1 else method for method in methods}
    return [(row, short.get(row.method, row.method)) for row in rows]


def _ordered(entries: Sequence[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda e: (e.row.method == FULL, round(e.row.mean_budget), -e.row.score))


def _from_curve(curve: Curve, profiles: Sequence[ProfileFile]) -> Comparison:
    """A curve's points, beside the heuristics that its searches had to beat on the same examples."""
    settings: dict[str, Any] = curve.searches[0].settings if curve.searches else {}
    task, haystack = settings.get("task"), settings.get("haystack")
    common: dict[str, Any] = {
        "model": model_name(settings, [*(s.profile for s in curve.searches if s.profile), *profiles]) or "model",
        "task": task if isinstance(task, str) else "task",
        "haystack": haystack if isinstance(haystack, str) else "",
    }
    # A curve has a search for each point, in their order.
    searches = curve.searches if len(curve.searches) == len(curve.points) else [None] * len(curve.points)
    entries = []
    for point, search in sorted(zip(curve.points, searches, strict=True), key=lambda pair: size_of(pair[0].budget)):
        row = Row(
            **common,
            **point.model_dump(include={"score", "ci95", "n", "metric", "budget", "kv_bytes", "mean_budget"}),
            method=EVOLVED,
        )
        entries.append(Entry(row, EVOLVED, point.source, point.on_front))
        for other in search.validation if search is not None else ():
            if other.evolved or other.n != point.n:
                continue
            scores = {"score": other.score, "ci95": other.ci95, "method": other.name}
            entries.append(Entry(row.model_copy(update=scores), other.name))
    return Comparison(_ordered(entries), of_curve=True)


def model_name(settings: Mapping[str, Any], profiles: Sequence[ProfileFile] = ()) -> str | None:
    """The model that a search's settings name, or else the one that all profiles are for."""
    model = settings.get("model")
    if isinstance(model, dict):
        model = model.get("name")
    if isinstance(model, str) and model:
        return model
    names = {profile.model.name for profile in profiles}
    return names.pop() if len(names) == 1 else None
