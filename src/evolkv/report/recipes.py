"""Commands that reproduce a report, and the settings that were recorded of each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from evolkv.profile_file import ProfileFile
from evolkv.report.comparisons import Comparison, model_name
from evolkv.report.schemas import Search, mean_of
from evolkv.report.sources import Sources
from evolkv.report.units import duration
from evolkv.report.views import search_title
from evolkv.report.words import counted, eval_command, search_command, shown_settings


@dataclass(frozen=True)
class Recipe:
    """A command that reproduces a run, and the settings that were recorded of it."""

    title: str
    command: list[str]
    settings: list[tuple[str, str]]


def recipes(sources: Sources, groups: Sequence[Comparison], model: str) -> list[Recipe]:
    """Return a recipe for each curve, search, profile and comparison."""
    found = []
    for origin in dict.fromkeys(search.origin for search in sources.searches):
        searches = [search for search in sources.searches if search.origin == origin]
        known = [_settings(search, sources.profiles, model) for search in searches]
        if len(searches) == 1:
            title = "Search" if len(sources.searches) == 1 else f"Search: {search_title(searches[0])}"
            found.append(_recipe(title, known[0], searches[0].seconds))
            continue
        budgets = list(dict.fromkeys(str(settings["budget"]) for settings in known if "budget" in settings))
        common = {name: value for name, value in known[0].items() if all(value == each.get(name) for each in known)}
        whole = {**common, "budget": ",".join(budgets)}
        what = [counted(len(budgets), "budget")]
        if len(rivals := dict.fromkeys(search.rival for search in searches)) > 1:
            what.append(f"under {counted(len(rivals), 'selector')}")
            selectors = {search.rival: each.get("selector") for search, each in zip(searches, known, strict=True)}
            whole["rivals"] = [{"selector": selector} for selector in selectors.values()]
        found.append(_recipe(f"Search at {' '.join(what)}", whole))
        for search, settings in zip(searches, known, strict=True):
            own = {name: value for name, value in settings.items() if name not in common}
            found.append(Recipe(search_title(search), [], _facts(own, search.seconds)))
    for profile in sources.profiles if not sources.searches else []:
        found_in = {"granularity": profile.granularity, "selector": profile.selector}
        settings = {"model": profile.model.name, "budget": profile.target, **found_in}
        recipe = _recipe(f"Profile, budget {profile.target}", {**settings, **profile.search})
        found.append(recipe if "strategy" in profile.search else replace(recipe, command=[]))
    for group in groups:
        if not group.of_curve:
            found.append(Recipe("Comparison", eval_command([entry.row for entry in group.entries]), []))
    return found


def _settings(search: Search, profiles: Sequence[ProfileFile], model: str) -> dict[str, Any]:
    """A search's settings; those that are not among what it recorded follow from its profile or result."""
    chosen = search.result or search.leader
    profile = search.profile or next((each for each in profiles if chosen and each.budgets == chosen.budgets), None)
    known: dict[str, Any] = {"model": (profile.model.name if profile else model) or "MODEL"}
    if chosen is not None:
        by_layer = all(value == row[0] for row in chosen.budgets for value in row)
        known |= {"budget": round(mean_of(chosen.budgets)), "granularity": "layer" if by_layer else "head"}
    if profile is not None:
        known |= {"budget": profile.target, "granularity": profile.granularity, "selector": profile.selector}
    # A study names all of its budgets, in their order; a search has one of them.
    if isinstance(order := search.settings.get("budgets"), list) and len(order) > 1:
        known["first"] = "largest" if order[0] > order[-1] else "smallest"
    return {**known, **{name: value for name, value in search.settings.items() if name != "budgets"}}


def _recipe(title: str, settings: dict[str, Any], seconds: float = 0.0) -> Recipe:
    return Recipe(title, search_command(settings, model_name(settings) or "MODEL"), _facts(settings, seconds))


def _facts(settings: dict[str, Any], seconds: float) -> list[tuple[str, str]]:
    return shown_settings(settings) + ([("time", duration(seconds))] if seconds else [])
