"""Commands and lines of Python that use the profile which a report is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evolkv.profile_card import generate_command, python_example, template_note
from evolkv.profile_file import ProfileFile
from evolkv.report.comparisons import Comparison, is_path
from evolkv.report.headline import named_first
from evolkv.report.schemas import mean_of
from evolkv.report.sources import Sources


@dataclass(frozen=True)
class Usage:
    """Text to copy: a command and a program."""

    finding: str
    command: str
    python: str


def usage(sources: Sources, groups: Sequence[Comparison], model: str, task: str) -> list[Usage]:
    """Return text that uses the profile which the headline names; nothing where there is none.

    Args:
        sources: as read.
        groups: of methods on the same examples.
        model: name of the model, or "".
        task: spec of the task that was evolved for, or "".
    """
    group = next((group for group in groups if group.evolved), None)
    target = named_first(group).row if group else None
    path = (
        target.method
        if target is not None and is_path(target.method)
        else _path(sources, target.mean_budget if target else None)
    )
    if not path:
        return []
    model = model or "MODEL"
    own = dict(zip(sources.profile_paths, sources.profiles, strict=True)).get(path)
    search = own.search if own else {}
    task = search.get("task") or task or (target.task if target else "")
    search = {**search, "task": task}
    finding = f"Generate with this cache on the command line, or in Python with any call of the model. Profile: {path}."
    finding = " ".join(filter(None, [finding, template_note(task)]))
    return [Usage(finding, generate_command(model, path, search), python_example(model, path, search))]


def _path(sources: Sources, budget: float | None) -> str:
    """Return where the profile with a mean budget lies, or the only one; of a search alone, where it puts it."""
    files = list(zip(sources.profiles, sources.profile_paths, strict=True))

    def far(entry: tuple[ProfileFile, str]) -> float:
        return abs(mean_of(entry[0].budgets) - budget) if budget is not None else 0.0

    if files:
        return min(files, key=far)[1]
    points = [point for curve in sources.curves for point in curve.points if point.profile]
    if points and budget is not None:
        return min(points, key=lambda point: abs(point.mean_budget - budget)).profile
    return "profile.json" if any(search.profile or search.result for search in sources.searches) else ""
