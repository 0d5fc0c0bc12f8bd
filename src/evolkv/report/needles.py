"""Needle retrieval by depth and length of the prompt: a heat map for each method and budget that is on record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from evolkv.report.axes import Axis, Table, Tick
from evolkv.report.heatmaps import LEVELS, HeatMap, heat_paths
from evolkv.report.views import Panel
from evolkv.report.words import counted, in_chunks, number, short

if TYPE_CHECKING:
    from evolkv.evaluation.records import Record, Records

#: Rows of a grid.
DEPTHS = 10
#: Scores of each cell, by bin of the depth and context.
_Cells = dict[tuple[int, int], list[float]]


def needle_grids(records: Sequence[Records]) -> list[Panel]:
    """Return a grid for each method and budget that was asked for needles at two lengths of the prompt or more.

    Args:
        records: of any tasks; those of task `niah` whose settings differ in nothing but `context` share a grid.
    """
    groups: dict[tuple[str, ...], _Cells] = {}
    seen: set[tuple[str, ...]] = set()
    for each in records:
        for found in each.examples.values():
            for record in found.values():
                placed = _place(record)
                if placed is None:
                    continue
                rest, context, depth = placed
                read = in_chunks(each.settings.prefill_chunk)
                group = (each.settings.model.name, rest, record.protocol, read, record.metric, record.label)
                # The same example may be in several files.
                once = (*group, record.task, record.example, record.prompt_sha256)
                if once in seen:
                    continue
                seen.add(once)
                groups.setdefault(group, {}).setdefault((depth, context), []).append(record.score)
    grids = [(group, cells) for group, cells in groups.items() if len({context for _, context in cells}) > 1]
    return [_grid(group, cells, several=_distinguishing([key for key, _ in grids])) for group, cells in grids]


def _place(record: Record) -> tuple[str, int, int] | None:
    """A record's task without its context, context, and bin of the depth; None for anything but a needle."""
    from evolkv.errors import TaskError
    from evolkv.tasks.niah import NeedleInHaystack
    from evolkv.tasks.spec import parse_task

    try:
        name, values = parse_task(record.task)
        context = int(values.pop("context", str(NeedleInHaystack.context)))
    except (TaskError, ValueError):
        return None
    depth: Any = record.extra.get("depth")
    if name != NeedleInHaystack.name or not isinstance(depth, (int, float)) or not 0 <= depth <= 1:
        return None
    rest = ", ".join(f"{key} {value}" for key, value in values.items())
    return rest, context, min(DEPTHS - 1, int(depth * DEPTHS))


def _distinguishing(groups: Sequence[tuple[str, ...]]) -> list[int]:
    """Return the parts of the groups' keys, apart from the last, that are not the same in all."""
    return [i for i in range(len(groups[0]) - 1) if len({group[i] for group in groups}) > 1] if groups else []


def _grid(group: tuple[str, ...], cells: _Cells, several: Iterable[int]) -> Panel:
    *_, metric, label = group
    contexts = sorted({context for _, context in cells})
    means = [[_mean(cells.get((depth, context))) for context in contexts] for depth in range(DEPTHS)]
    levels = [[None if mean is None else round(mean * (LEVELS - 1)) for mean in row] for row in means]
    spans = [f"{100 * i // DEPTHS}–{100 * (i + 1) // DEPTHS} %" for i in range(DEPTHS)]
    rows = [[span, *(_cell(cells.get((i, context))) for context in contexts)] for i, span in enumerate(spans)]
    title = ", ".join([label, *filter(None, (group[i] for i in several))])
    chart = HeatMap(
        heat_paths(levels),
        len(contexts),
        DEPTHS,
        Axis(
            "context (tokens)",
            [Tick(round(100 * (i + 0.5) / len(contexts), 3), number(c)) for i, c in enumerate(contexts)],
        ),
        Axis("depth of the needle", [Tick(float(at), f"{at} %") for at in range(0, 101, 25)]),
        [Tick(0, "0"), Tick(50, "0.5"), Tick(100, "1")],
        Table(f"{short(title)}: mean {short(metric)} by depth", ["depth", *map(number, contexts)], rows),
    )
    return Panel(short(title), _finding(cells, contexts, spans, metric), chart)


def _finding(cells: _Cells, contexts: Sequence[int], spans: Sequence[str], metric: str) -> str:
    scores = [score for found in cells.values() for score in found]
    (depth, context), lowest = min(cells.items(), key=lambda item: (math.fsum(item[1]) / len(item[1]), item[0]))
    finding = f"{counted(len(scores), 'example')} at {len(contexts)} contexts: mean {short(metric)} "
    finding += f"{math.fsum(scores) / len(scores):.2f}; "
    if min(scores) == max(scores):
        return f"{finding}the same in every cell."
    worst = math.fsum(lowest) / len(lowest)
    return f"{finding}lowest, {worst:.2f}, at depth {spans[depth]} of {number(context)} tokens."


def _cell(scores: Sequence[float] | None) -> str:
    mean = _mean(scores)
    return "–" if scores is None or mean is None else f"{mean:.2f} (n = {len(scores)})"


def _mean(scores: Sequence[float] | None) -> float | None:
    return math.fsum(scores) / len(scores) if scores else None
