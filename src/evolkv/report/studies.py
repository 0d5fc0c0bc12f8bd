"""The searches that a study holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolkv.errors import UsageError
from evolkv.report.schemas import Search
from evolkv.schemas import checked

if TYPE_CHECKING:
    from evolkv.evolution.result import Evaluation
    from evolkv.evolution.study import StudyRecord

_CANDIDATE = ("budgets", "fitness", "score", "cache_score", "scores")


def study_searches(storage: str, name: str | None) -> tuple[str, Path | None, list[Search]]:
    """Read a study, or those of one search under several selectors.

    Args:
        storage: its file or storage URL.
        name: of the study; needed where the storage holds several.

    Returns:
        What to call it, the file that it lies in (None for a server), and one search per stage that has candidates.

    Raises:
        UsageError: it cannot be read, or is empty.
    """
    # Takes seconds to import, and no other input needs it.
    from evolkv.evolution.location import locate
    from evolkv.evolution.study import read_studies

    records = read_studies(storage, name)
    searches = []
    for record in records:
        # Steps of a descent have no candidates.
        stages = [stage for stage, rows in record.stages.items() if rows and rows[0][0].slope is None]
        rival = record.name.rpartition("/")[2] if len(records) > 1 else ""
        searches += [_search(record, stage, len(stages) > 1, rival) for stage in stages]
    names = ", ".join(record.name for record in records)
    if not searches:
        raise UsageError(f"{records[0].storage}: study {names} has no candidates yet; try again when it has some")
    return f"study {names}", locate(storage).path, searches


def _search(record: StudyRecord, stage: str, several: bool, rival: str) -> Search:
    generations = record.stages[stage]
    budget = stage.rpartition(" ")[2]
    history, descent = _entries(generations), _entries(record.stages.get(f"gradient {budget}", []))
    settings = dict(record.settings)
    if settings.get("max_evals") is None and "max_evals" in record.facts:
        settings["max_evals"] = record.facts["max_evals"]
    if isinstance(versions := record.facts.get("versions"), Mapping):
        settings["versions"] = dict(versions)
    if isinstance(haystack := record.facts.get("haystack"), str):
        settings["haystack"] = haystack
    data = {
        "evaluations": len(history),
        "settings": settings,
        "history": history,
        "descent": descent,
        "stage": stage if several else "",
        "rival": rival,
        "origin": f"study {record.name.removesuffix(f'/{rival}') if rival else record.name}",
    }
    rows, kept = (_of_budget(record, fact, budget) for fact in ("validation", "kept"))
    data["kept"] = kept
    if isinstance(rows, list) and rows and isinstance(rows[0], Mapping):
        data |= {"validation": rows, "chosen": rows[0].get("name", ""), "improved": bool(rows[0].get("evolved"))}
    found: Search = checked(Search, record.storage, data)
    return found


def _entries(generations: Sequence[Sequence[Evaluation]]) -> list[dict[str, Any]]:
    """Return candidates, or the steps of a descent, as the entries of a result file."""
    return [
        {**{key: getattr(entry, key) for key in _CANDIDATE}, "generation": number}
        for number, generation in enumerate(generations)
        for entry in generation
    ]


def _of_budget(record: StudyRecord, name: str, budget: str) -> Any:
    """Return the value for one budget of a fact that is on record by budget."""
    fact = record.facts.get(name)
    return fact.get(budget) if isinstance(fact, Mapping) else None
