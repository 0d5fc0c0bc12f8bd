"""Paired differences: what one method scores above others on the same examples, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evolkv.report.comparisons import Comparison, Entry
from evolkv.report.schemas import Row, Search

if TYPE_CHECKING:
    from evolkv.evaluation.records import Records
    from evolkv.significance import PairedComparison


@dataclass(frozen=True)
class Difference:
    """The score of `name` minus that of `other`, on the same examples; `note` says at which budget."""

    name: str
    other: str
    note: str
    result: PairedComparison


def held_out(group: Comparison, records: Sequence[Records]) -> list[Difference]:
    """Return the differences between the best evolved budgets and what they compare to, at each budget.

    Where a comparison has one budget, the others are all methods in the same memory and the full cache; where it has
    several, the strongest method in the same memory at each.

    Args:
        group: methods on the same examples.
        records: of every example; without those of a comparison there are no differences.
    """
    found = []
    for entry in _best_of_each_budget(group.evolved):
        ours = _scores(records, entry.row)
        rivals = sorted(group.rivals(entry), key=lambda rival: -rival.row.score)
        others = [*rivals, group.full] if group.single else rivals[:1]
        for other in others:
            theirs = _scores(records, other.row) if other is not None else {}
            if other is not None and (both := [name for name in ours if name in theirs]):
                result = _compared([ours[name] for name in both], [theirs[name] for name in both])
                note = "" if group.single else f"budget {_budget(entry)}"
                found.append(Difference(entry.name, other.name, note, result))
    return found


def in_validation(search: Search) -> list[Difference]:
    """Return the differences between the allocation that a search chose and the others, where it recorded scores."""
    first = search.result
    if first is None or not first.scores:
        return []
    others = [entry for entry in search.allocations if entry.budgets != first.budgets]
    return [
        Difference(first.name, other.name, "", _compared(first.scores, other.scores))
        for other in others
        if len(other.scores) == len(first.scores)
    ]


def _best_of_each_budget(entries: Iterable[Entry]) -> list[Entry]:
    best: dict[str, Entry] = {}
    for entry in entries:
        known = best.setdefault(_budget(entry), entry)
        # Of equals the later holds more, as its rivals do.
        if entry.row.score >= known.row.score:
            best[_budget(entry)] = entry
    return list(best.values())


def _budget(entry: Entry) -> str:
    """Return the budget that was asked for. What is held may be less, where heads have more room than a prompt."""
    return str(entry.row.budget or round(entry.row.mean_budget))


def _scores(records: Sequence[Records], row: Row) -> dict[str, float]:
    """Return the score of each example that a row is the mean of, as far as it is on record."""
    found: dict[str, float] = {}
    ours = (row.model, row.dtype, row.protocol, row.haystack, row.prefill_chunk, row.block_size, row.seed)
    for each in records:
        settings = each.settings
        haystack = settings.tasks[row.task].haystack or "" if row.task in settings.tasks else None
        how = (settings.protocol, haystack, settings.prefill_chunk, settings.block_size, settings.seed)
        if ours != (settings.model.name, settings.model.dtype, *how):
            continue
        for by_method in each.examples.values():
            for record in by_method.values():
                same = (record.task, record.method, record.budget) == (row.task, row.method, row.budget)
                # Where examples have several metrics, a row names them all.
                if same and record.metric in row.metric.split("+"):
                    found[record.example] = record.score
    return found


def _compared(ours: Sequence[float], theirs: Sequence[float]) -> PairedComparison:
    # NumPy takes its time, and reports without paired scores do without it.
    from evolkv.significance import paired_comparison

    return paired_comparison(ours, theirs)
