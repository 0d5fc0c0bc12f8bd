"""The searches that a study holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evolkv.errors import UsageError
from evolkv.report.records import Search, checked, mean_of

if TYPE_CHECKING:
    from evolkv.search.study import StudyRecord

_CANDIDATE = ("budgets", "fitness", "score", "cache_score", "scores")


def study_searches(storage: str, name: str | None) -> tuple[str, list[Search]]:
    """Read a study.

    Args:
        storage: its file or storage URL.
        name: of the study; needed where the storage holds several.

    Returns:
        What to call the study, and one search per stage that has candidates.

    Raises:
        UsageError: it cannot be read, or is empty.
    """
    # Takes seconds to import, and no other input needs it.
    from evolkv.search.study import read_study

    record = read_study(storage, name)
    stages = [stage for stage, generations in record.stages.items() if generations]
    if not stages:
        raise UsageError(f"{record.storage}: study {record.name!r} has no candidates yet; try again when it has some")
    label = f"study {record.name}"
    return label, [_search(record, stage, len(stages) > 1) for stage in stages]


def _search(record: StudyRecord, stage: str, several: bool) -> Search:
    generations = record.stages[stage]
    history = [
        {**{key: getattr(entry, key) for key in _CANDIDATE}, "generation": number}
        for number, generation in enumerate(generations)
        for entry in generation
    ]
    settings = dict(record.settings)
    if isinstance(versions := record.facts.get("versions"), Mapping):
        settings["versions"] = dict(versions)
    data = {
        "evaluations": len(history),
        "seconds": float(sum(entry.seconds for generation in generations for entry in generation)),
        "settings": settings,
        "history": history,
        "stage": stage if several else "",
        "origin": f"study {record.name}",
    }
    found: Search = checked(Search, record.storage, data)
    for name, rows in record.facts.items():
        # A search that went on has one validation for each number of candidates it stopped at.
        if name != f"validation {len(history)}" and not (several and name.startswith("validation")):
            continue
        chosen = rows[0].get("name") if isinstance(rows, list) and rows and isinstance(rows[0], Mapping) else ""
        choice: Search = checked(Search, record.storage, {**data, "validation": rows, "chosen": chosen})
        if not choice.validation:
            continue
        if not several or stage.endswith(f" {mean_of(choice.validation[0].budgets):.0f}"):
            found = choice.model_copy(update={"improved": choice.validation[0].evolved})
    return found
