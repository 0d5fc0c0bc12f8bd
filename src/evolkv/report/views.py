"""Sections of a report: charts with their findings in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from evolkv.profile_file import unit_of
from evolkv.report.axes import Table
from evolkv.report.charts import CourseChart, ScoreChart, course_chart, score_chart
from evolkv.report.comparisons import FULL, Comparison, Entry, is_evolved
from evolkv.report.differences import Difference, held_out, in_validation
from evolkv.report.heatmaps import Bars, HeatMap, budget_charts, kept_chart
from evolkv.report.schemas import Candidate, Search, Validated, mean_of
from evolkv.report.sources import Sources
from evolkv.report.tables import NO_WIDTH, p_value
from evolkv.report.words import (
    candidates,
    counted,
    duration,
    in_chunks,
    interval,
    mebibytes,
    number,
    percent,
    score,
    short,
)

if TYPE_CHECKING:
    from evolkv.evaluation.records import Records
    from evolkv.significance import PairedComparison

_PLAIN_STYLE, _EVOLVED_STYLE = 0, 1
_MOST_HEADS = 10
_SMALL_P = 0.05


@dataclass(frozen=True)
class Line:
    """A number with its interval, on a line of its own: in words, and as places in percent of the picture's width."""

    name: str
    note: str
    style: int
    strong: bool
    at: float
    left: float
    right: float
    value: str
    interval: str

    @classmethod
    def of_score(cls, name: str, note: str, style: int, strong: bool, value: float, bounds: Sequence[float]) -> Line:
        """A score, from 0 to 1."""
        at, left, right = (round(100 * place, 2) for place in (value, *bounds))
        return cls(name, note, style, strong, at, left, right, score(value), interval(bounds))

    @classmethod
    def of_difference(cls, found: Difference, most: float) -> Line:
        """A difference, from −most to most; the interval is coloured where it leaves out 0 and p is small."""
        result = found.result
        low, high = result.ci95
        at, left, right = (round(50 + 50 * place / most, 2) for place in (result.difference, low, high))
        note = ", ".join(filter(None, [found.note, f"n = {result.n}", f"p {p_value(result.p)}"]))
        style = _EVOLVED_STYLE if result.p < _SMALL_P and _leaves_out_0(result) else _PLAIN_STYLE
        name = f"{short(found.name, 60)} − {'full cache' if found.other == FULL else short(found.other, 60)}"
        value, bounds = (text.replace("-", "−") for text in (f"{result.difference:+.3f}", f"{low:+.2f} to {high:+.2f}"))
        return cls(name, note, style, False, at, left, right, value, bounds)


def _leaves_out_0(result: PairedComparison) -> bool:
    low, high = result.ci95
    return low > 0 or high < 0


@dataclass(frozen=True)
class Differences:
    """Paired differences, a line each, on an axis with three labels."""

    lines: Sequence[Line]
    scale: tuple[str, str, str]
    note: str

    @classmethod
    def of(cls, found: Sequence[Difference]) -> Differences | None:
        """Lay out differences, if there are any, on the shortest round axis that holds their intervals."""
        if not found:
            return None
        reach = max(abs(end) for each in found for end in (*each.result.ci95, each.result.difference))
        most = next((step for step in (0.05, 0.1, 0.2, 0.5) if reach <= step), 1.0)
        note = (
            "Differences on the same examples, pair by pair. p: sign-flip test. Blue: the interval leaves out 0, and p "
            f"is below {_SMALL_P}."
        )
        if any(_leaves_out_0(each.result) and each.result.p >= _SMALL_P for each in found):
            note += " Where the two disagree there are too few examples for the interval: go by p."
        if any(each.result.ci95[0] == each.result.ci95[1] for each in found):
            note += f" {NO_WIDTH}"
        return cls([Line.of_difference(each, most) for each in found], (f"−{most:g}", "0", f"+{most:g}"), note)


@dataclass(frozen=True)
class Panel:
    """An item of a section, as the section's macro draws it.

    Args:
        title: shown where a section has several.
        finding: what there is to see, in words.
        chart: the picture.
        lines: scores, a line each.
        differences: between the scores.
        table: the numbers.
        bars: above the chart.
        by_head: whether budgets differ among the heads of a layer.
        unit: what budgets count.
        largest: the heads with the largest budgets: name, entries, share of all, and percent of the largest.
    """

    title: str
    finding: str
    chart: ScoreChart | CourseChart | HeatMap | None = None
    lines: Sequence[Line] = ()
    differences: Differences | None = None
    table: Table | None = None
    bars: Bars | None = None
    by_head: bool = False
    unit: str = ""
    largest: Sequence[tuple[str, str, str, float]] = ()


def methods(group: Comparison, records: Sequence[Records]) -> Panel:
    """The methods of a comparison, with paired differences where the records of its examples are there."""
    first, styles = group.first, group.styles()
    finding = f"Task {short(first.task)}, metric {short(first.metric)}, {group.examples}"
    finding += " that the choice of budgets was made on" if group.of_curve else ""
    finding += f", protocol {short(first.protocol)}" if first.protocol else ""
    finding += f", haystack {short(first.haystack)}" if first.haystack else ""
    finding += f", prompts read {read}" if (read := in_chunks(first.prefill_chunk)) else ""
    differences = Differences.of(held_out(group, records))
    if not group.single:
        hollow = " Hollow: another budget scores as high in less memory." * (not all(e.on_front for e in group.entries))
        finding += f".{hollow}"
        return Panel(_title(group), finding, score_chart(group), differences=differences, table=group.table())
    if group.budgets:
        finding += f"; mean budget {number(group.budgets[0])} entries per KV head"
    lines = [
        Line.of_score(
            "full cache" if entry is group.full else entry.name,
            _memory_note(group, entry),
            styles[entry.name],
            is_evolved(entry.row.method),
            entry.row.score,
            entry.row.ci95,
        )
        for entry in sorted(group.entries, key=lambda entry: (-entry.row.score, entry.row.kv_bytes))
    ]
    return Panel(_title(group), finding + ".", lines=lines, differences=differences, table=group.table())


def course(search: Search) -> Panel:
    """The scores of a search: steps of its gradient start and candidates, at least one of them."""
    finding = [_descent(search)] if search.descent else []
    finding += [_evolution(search)] if search.history else []
    return Panel(search_title(search), " ".join(finding), course_chart(search))


def _descent(search: Search) -> str:
    few, of = _in_turn(search.descent)
    then = " and the last step is where evolution begins" if search.history else ""
    return (
        f"The gradient start takes {counted(len(search.descent), 'step')} along the slope of the loss, each on {few} "
        f"of {counted(of, 'training example')}. Its cuts are soft at first and nearly hard in the end, so its scores "
        f"cannot be compared with those of candidates{then}."
    )


def _evolution(search: Search) -> str:
    steps = search.course()
    (_, first), (last, final) = steps[0], steps[-1]
    changes = sum(a.generation != b.generation for a, b in pairwise(search.history))
    took = f" in {duration(search.seconds)}" if search.seconds else ""
    tried = candidates(search.evaluations, search.settings)
    said = f"Evolution tries {counted(len(search.history), 'candidate')} in {counted(1 + changes, 'generation')}"
    if search.rotating:
        few, of = _in_turn(search.history)
        said += (
            f", each on {few} of {counted(of, 'training example')} in turn, so scores rise and fall with the examples. "
            f"With each example as last seen, the mean of the distribution goes from {first:.3f} to {final:.3f}."
        )
    else:
        said += (
            f". The first scores {first:.3f}, the fittest {final:.3f}: candidate {last:,}, on the training examples."
        )
    if tried != len(search.history):
        said += f" All selectors together took {counted(tried, 'candidate')}{took}."
    elif took:
        said += f" The search took {duration(search.seconds)}."
    return said


def _in_turn(entries: Sequence[Candidate]) -> tuple[int, int]:
    """Return the number of examples that each candidate was scored on, and of all that were in turn."""
    scores = entries[0].scores or []
    return sum(score is not None for score in scores), len(scores)


def validation(search: Search) -> Panel:
    """The allocations that a search chose from, each once, best first."""
    shown = search.allocations
    lines = [
        Line.of_score(
            f"evolved, {entry.name}" if entry.evolved else entry.name,
            _also(search, entry),
            _EVOLVED_STYLE if entry.evolved else _PLAIN_STYLE,
            entry.name == search.chosen,
            entry.score,
            entry.ci95,
        )
        for entry in shown
    ]
    finding = f"{counted(shown[0].n, 'validation example')} decided which allocation the search returned."
    if isinstance(metric := search.settings.get("metric"), str):
        finding += f" Metric {short(metric)}."
    return Panel(search_title(search), finding, lines=lines, differences=Differences.of(in_validation(search)))


def _also(search: Search, entry: Validated) -> str:
    """Return what there is to say of an allocation: that it was chosen, and its other names."""
    others = [each.name for each in search.validation if each.budgets == entry.budgets and each.name != entry.name]
    same = [f"also {short(' and '.join(others))}"] if others else []
    return ", ".join(["chosen"] * (entry.name == search.chosen) + same)


def positions(search: Search) -> Panel:
    """Return the positions that the layers keep of one example, with its answers marked."""
    kept = search.kept
    assert kept is not None
    width = len(kept.share[0])
    # The last bin may be narrower than the others.
    sizes = [min(kept.bin, kept.tokens - i * kept.bin) for i in range(width)]
    held = sum(share * size for row in kept.share for share, size in zip(row, sizes, strict=True))
    finding = f"Example {short(kept.example)}: of its {kept.tokens:,} tokens, the layers keep "
    finding += f"{percent(held / (kept.tokens * len(kept.share)))} on average."
    for answer in kept.answers[:1]:
        bins = range(answer.start // kept.bin, (answer.end - 1) // kept.bin + 1)
        there = sum(row[i] for row in kept.share for i in bins) / (len(bins) * len(kept.share))
        finding += f" Around the answer, at tokens {answer.start:,} to {answer.end - 1:,}, they keep {percent(there)}"
        finding += f": “{short(answer.text, 160)}”." if answer.text else "."
    return Panel(search_title(search), finding, kept_chart(kept, "Share of the tokens kept"))


def allocations(sources: Sources) -> list[Panel]:
    """Each allocation once: of the profiles, and of searches whose profile was not given."""
    found: list[tuple[list[list[int]], str, str]] = []
    for profile in sources.profiles:
        if (entry := (profile.budgets, profile.model.name, unit_of(profile.selector))) not in found:
            found.append(entry)
    for search in sources.searches:
        chosen = search.profile or search.result or search.leader
        if chosen is not None and all(chosen.budgets != budgets for budgets, *_ in found):
            what = search.chosen if search.result else "so far"
            selector = search.profile.selector if search.profile else search.settings.get("selector")
            unit = unit_of(selector if isinstance(selector, dict) else {})
            found.append((chosen.budgets, f"{what}, {search.rival}" if search.rival else what, unit))
    return [_allocation(entry[0], short(entry[1]), entry[2]) for entry in sorted(found, key=lambda it: mean_of(it[0]))]


def _allocation(budgets: list[list[int]], what: str, unit: str) -> Panel:
    mean = mean_of(budgets)
    bars, heat = budget_charts(budgets, f"Budgets ({unit})")
    by_head = heat.rows > 1
    cells = [(value, layer, head) for layer, row in enumerate(budgets) for head, value in enumerate(row)]
    most, layer, head = max(cells, key=lambda cell: cell[0])
    least = min(cells)[0]
    finding = f"{counted(len(budgets), 'layer')} × {counted(len(budgets[0]), 'KV head')}, "
    if most == least:
        finding += f"{most:,} {unit} for each."
    else:
        place = f"head {head} of layer {layer}" if by_head else f"the heads of layer {layer}"
        finding += f"{number(round(mean, 1))} {unit} per head on average, from {least:,} to {most:,} in {place}. "
        finding += f"Half of all belong to {percent(_holders_of_half(cells))} of the heads."
    title = f"Mean budget {number(round(mean, 1))} ({what})"
    total = sum(value for value, _, _ in cells)
    largest = sorted(cells, key=lambda cell: (-cell[0], cell[1:]))[:_MOST_HEADS] if by_head else []
    return Panel(
        title,
        finding,
        heat,
        bars=bars,
        by_head=by_head,
        unit=unit,
        largest=[
            (f"layer {layer}, head {head}", number(value), percent(value / total), round(100 * value / most, 1))
            for value, layer, head in largest
        ],
    )


def _holders_of_half(cells: list[tuple[int, int, int]]) -> float:
    """Share of the heads that hold half of the cache between them, largest first."""
    count, held, total = 0, 0, sum(value for value, _, _ in cells)
    for value, _, _ in sorted(cells, reverse=True):
        if 2 * held >= total:
            break
        count, held = count + 1, held + value
    return count / len(cells)


def _memory_note(group: Comparison, entry: Entry) -> str:
    share = group.share(entry)
    note = f"{mebibytes(entry.row.kv_bytes)} MiB"
    return note if share is None or entry is group.full else f"{note}, {percent(share)} of full"


def _title(group: Comparison) -> str:
    first = group.first
    return f"{short(first.model)}, {short(first.task)}, n = {first.n}{group.asked}"


def search_title(search: Search) -> str:
    """Return a title that tells a search from the others."""
    chosen = search.profile or search.result or search.leader
    title = f"Budget {number(round(mean_of(chosen.budgets), 1))}" if chosen else "Search"
    if search.stage:
        title = search.stage[:1].upper() + search.stage[1:]
    return short(f"{title}, {search.rival}" if search.rival else title)
