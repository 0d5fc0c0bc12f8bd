"""Sections of a report: charts with their findings in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from evolkv.report.axes import Table
from evolkv.report.charts import FitnessChart, ScoreChart, descent_chart, fitness_chart
from evolkv.report.comparisons import FULL, Comparison, Entry, is_evolved
from evolkv.report.heatmaps import Bars, HeatMap, budget_charts, kept_chart
from evolkv.report.schemas import Search, mean_of
from evolkv.report.sources import Sources
from evolkv.report.units import mebibytes
from evolkv.report.words import counted, in_chunks, number, percent, short

_PLAIN_STYLE, _EVOLVED_STYLE = 0, 1


@dataclass(frozen=True)
class Line:
    """A score with its interval, on a line of its own."""

    name: str
    note: str
    style: int
    strong: bool
    score: float
    ci95: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """An item of a section, as the section's macro draws it.

    Args:
        title: shown where a section has several.
        finding: what there is to see, in words.
        chart: the picture.
        lines: scores, a line each.
        table: the numbers, or the id of the table that has them.
        bars: above the chart.
        by_head: whether budgets differ among the heads of a layer.
    """

    title: str
    finding: str
    chart: ScoreChart | FitnessChart | HeatMap | None = None
    lines: Sequence[Line] = ()
    table: Table | str = ""
    bars: Bars | None = None
    by_head: bool = False


def methods(group: Comparison) -> Panel:
    """The methods of a comparison."""
    first, styles = group.first, group.styles()
    finding = f"Task {short(first.task)}, metric {short(first.metric)}, {group.examples}"
    finding += " that the choice of budgets was made on" if group.of_curve else ""
    finding += f", protocol {short(first.protocol)}" if first.protocol else ""
    finding += f", prompts read {read}" if (read := in_chunks(first.prefill_chunk)) else ""
    if not group.single:
        hollow = " Hollow: another budget scores as high in less memory." * (not all(e.on_front for e in group.entries))
        return Panel(_title(group), f"{finding}.{hollow}", group.by_budget(), table=group.table())
    if group.budgets:
        finding += f"; mean budget {number(group.budgets[0])} entries per KV head"
    lines = [
        Line(
            "full cache" if entry is group.full else entry.name,
            _memory_note(group, entry),
            styles[entry.name],
            is_evolved(entry.row.method),
            entry.row.score,
            entry.row.ci95,
        )
        for entry in sorted(group.entries, key=lambda entry: entry.row.method == FULL)
    ]
    return Panel(_title(group), finding + ".", lines=lines, table=group.table())


def memory(group: Comparison, table: str) -> Panel | None:
    """Return a comparison's scores against memory, if it has several budgets; `table` is the id of its table."""
    if group.single:
        return None
    finding = "What the cache holds after the prompt, averaged over examples."
    if group.full and (evolved := max(group.evolved, key=lambda entry: entry.row.score, default=None)):
        share = group.share(evolved)
        assert share is not None
        finding += (
            f" The best evolved budgets score {evolved.row.score:.2f} in {mebibytes(evolved.row.kv_bytes)} MiB, "
            f"{percent(share)} of the full cache's {mebibytes(group.full.row.kv_bytes)}."
        )
    return Panel(_title(group), finding, group.by_memory(), table=table)


def evolution(search: Search) -> Panel:
    """A search's candidates, at least one."""
    course = search.course()
    (_, first, _), (last, fitness, score) = course[0], course[-1]
    changes = sum(a.generation != b.generation for a, b in pairwise(search.history))
    finding = f"{counted(len(search.history), 'candidate')} in {counted(1 + changes, 'generation')}"
    if search.rotating:
        few = sum(score is not None for score in search.history[0].scores or [])
        finding += (
            f", each scored on {few} of {counted(len(search.history[0].scores or []), 'training example')} in turn, so "
            "that fitness rises and falls with the examples. With each example as last seen, the mean of the "
            f"distribution goes from fitness {first:.3f} to {fitness:.3f}, a score of {score:.3f}."
        )
    else:
        finding += (
            f". The first has fitness {first:.3f}, the fittest {fitness:.3f}: candidate {last:,}, with a score of "
            f"{score:.3f} on the training examples."
        )
    lam = search.settings.get("lam")
    if isinstance(lam, (int, float)) and all(entry.cache_score == 1 for entry in search.history):
        finding += f" All have exactly the target memory, so fitness is {1 + lam:.4g}\u00a0×\u00a0score."
    return Panel(search_title(search), finding, fitness_chart(search))


def descent(search: Search) -> Panel:
    """The steps of a search's gradient start, at least one."""
    first = search.descent[0]
    few = sum(score is not None for score in first.scores or [])
    finding = (
        f"{counted(len(search.descent), 'step')} along the slope of the loss, each on {few} of "
        f"{counted(len(first.scores or []), 'training example')} in turn. Cuts are soft at first and nearly hard in "
        "the end, and the budgets of each step carry noise, so scores rise and fall."
    )
    if search.history:
        finding += " Evolution goes on from the last step."
    return Panel(search_title(search), finding, descent_chart(search))


def validation(search: Search) -> Panel:
    """The allocations that a search chose from, best first."""
    lines = [
        Line(
            f"evolved, {entry.name}" if entry.evolved else entry.name,
            "chosen" if entry.name == search.chosen else "",
            _EVOLVED_STYLE if entry.evolved else _PLAIN_STYLE,
            entry.name == search.chosen,
            entry.score,
            entry.ci95,
        )
        for entry in search.validation
    ]
    finding = (
        f"{counted(search.validation[0].n, 'example')} that the search never saw decide which allocation it returns."
    )
    if isinstance(metric := search.settings.get("metric"), str):
        finding += f" Metric {short(metric)}."
    return Panel(search_title(search), finding, lines=lines)


def positions(search: Search) -> Panel:
    """Return the positions that the layers keep of one example."""
    kept = search.kept
    assert kept is not None
    width = len(kept.share[0])
    # The last bin may be narrower than the others.
    sizes = [min(kept.bin, kept.tokens - i * kept.bin) for i in range(width)]
    held = sum(share * size for row in kept.share for share, size in zip(row, sizes, strict=True))
    finding = f"Example {short(kept.example)}: of its {kept.tokens:,} tokens, the layers keep "
    finding += f"{percent(held / (kept.tokens * len(kept.share)))} on average."
    return Panel(search_title(search), finding, kept_chart(kept, "Share of the tokens kept"))


def allocations(sources: Sources) -> list[Panel]:
    """Each allocation once: of the profiles, and of searches whose profile was not given."""
    found: list[tuple[list[list[int]], str]] = []
    for profile in sources.profiles:
        if (entry := (profile.budgets, profile.model.name)) not in found:
            found.append(entry)
    for search in sources.searches:
        chosen = search.profile or search.result or search.leader
        if chosen is not None and all(chosen.budgets != budgets for budgets, _ in found):
            what = search.chosen if search.result else "so far"
            found.append((chosen.budgets, f"{what}, {search.rival}" if search.rival else what))
    return [_allocation(budgets, short(what)) for budgets, what in sorted(found, key=lambda entry: mean_of(entry[0]))]


def _allocation(budgets: list[list[int]], what: str) -> Panel:
    mean = mean_of(budgets)
    bars, heat = budget_charts(budgets, "Budgets (cache entries)")
    by_head = heat.rows > 1
    cells = [(value, layer, head) for layer, row in enumerate(budgets) for head, value in enumerate(row)]
    most, layer, head = max(cells, key=lambda cell: cell[0])
    least = min(cells)[0]
    finding = f"{counted(len(budgets), 'layer')} × {counted(len(budgets[0]), 'KV head')}, "
    if most == least:
        finding += f"each of which keeps {most:,} entries."
    else:
        place = f"head {head} of layer {layer}" if by_head else f"the heads of layer {layer}"
        finding += f"{number(round(mean, 1))} entries per head on average, from {least:,} to {most:,} in {place}. "
        finding += f"Half of the cache belongs to {percent(_holders_of_half(cells))} of the heads."
    title = f"Mean budget {number(round(mean, 1))} ({what})"
    return Panel(title, finding, heat, bars=bars, by_head=by_head)


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
