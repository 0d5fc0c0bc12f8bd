"""Commands that reproduce a report, and the settings that were recorded of each run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from evolkv.budgets import size_of
from evolkv.profile_file import ProfileFile
from evolkv.report.comparisons import Comparison, model_name
from evolkv.report.schemas import Row, Search, mean_of
from evolkv.report.sources import Sources
from evolkv.report.views import search_title
from evolkv.report.words import counted, duration, short
from evolkv.specs import format_spec

#: The settings that are options of `evolkv search`, in the order in which a command gives them.
_OPTIONS = (
    *("task", "budget", "selector", "strategy", "granularity", "metric", "train", "val", "max_evals", "population"),
    *("sigma", "group_size", "lam", "gamma", "floor", "ceiling", "seed", "engine", "prefill_chunk", "minibatch"),
    *("start", "gradient_steps", "first", "dtype", "protocol"),
)


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
            found.append(Recipe("Comparison", _eval_command([entry.row for entry in group.entries]), []))
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


def _recipe(title: str, settings: Mapping[str, Any], seconds: float = 0.0) -> Recipe:
    return Recipe(title, _search_command(settings), _facts(settings, seconds))


def _facts(settings: Mapping[str, Any], seconds: float) -> list[tuple[str, str]]:
    """(name, value) pairs of settings, nested ones on one line, and the time that a run took."""
    shown = {name: value for name, value in settings.items() if value is not None}
    if isinstance(selector := settings.get("selector"), Mapping):
        shown["selector"] = _selector_spec(selector)
    if rivals := _rivals(settings):
        shown["rivals"] = ", ".join(f"{spec} {score:.3f}" if score is not None else spec for spec, score in rivals)
    facts = [(short(str(name).replace("_", " ")), short(_value(value))) for name, value in shown.items()]
    return [*facts, ("time", duration(seconds))] if seconds else facts


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(
            f"{name} {_value(inner) if _plain(inner) else json.dumps(inner)}" for name, inner in value.items()
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if _plain(value) else json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> bool:
    return not isinstance(value, (dict, list))


def _search_command(settings: Mapping[str, Any]) -> list[str]:
    """The command that runs a search with these settings, in the pieces that a line may be broken between."""
    words = ["evolkv", "search", model_name(settings) or "MODEL"]
    for name in _OPTIONS:
        option, value = f"--{name.replace('_', '-')}", settings.get(name)
        if name == "val":
            value = settings.get("validation", value)
        if name == "minibatch" and settings.get("strategy") != "joint" and value == _count(settings.get("train")):
            # On record for every strategy; those that need all examples in each generation refuse the option.
            continue
        if name == "max_evals" and settings.get("strategy") in ("gradient", "start"):
            # On record, too, and not used.
            continue
        if name == "selector" and (rivals := _rivals(settings)):
            words += [option, *(spec for spec, _ in rivals)]
            continue
        value = _count(value) or _selector_spec(value) if isinstance(value, Mapping) else value
        if name == "start" and isinstance(value, str) and value.startswith("profile "):
            # Only the digest of a profile that a search started from is on record, not its path.
            value = "START.json"
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            words += [option, str(value)]
    return _pieces([*words, "--out", "profile.json"])


def _count(examples: Any) -> Any:
    """The number of examples that a search has on record for a split, if it has."""
    return examples.get("n") if isinstance(examples, Mapping) else None


def _rivals(settings: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """The selectors that a search was run under and the validation score of each, if there were several."""
    found = []
    for row in rows if isinstance(rows := settings.get("rivals"), list) else []:
        if isinstance(row, Mapping) and isinstance(selector := row.get("selector"), Mapping):
            score = row.get("score")
            found.append((str(_selector_spec(selector)), float(score) if isinstance(score, (int, float)) else None))
    return found


def _selector_spec(selector: Mapping[str, Any]) -> str | None:
    """A selector as the command line takes it, such as snapkv:window=32,kernel=7; None if it has no name."""
    if not isinstance(name := selector.get("name"), str):
        return None
    return format_spec(name, {key: str(value) for key, value in selector.items() if key != "name"})


def _eval_command(rows: Sequence[Row]) -> list[str]:
    """The command that scores the methods of one comparison's rows, in pieces."""
    methods = list(dict.fromkeys("profile.json" if row.method == "evolkv" else row.method for row in rows))
    budgets = sorted({row.budget for row in rows if row.budget is not None}, key=size_of)
    words = ["evolkv", "eval", rows[0].model, "--task", rows[0].task, "--method", *methods]
    words += ["--budget", *map(str, budgets)] if budgets else []
    words += ["--samples", str(rows[0].n)]
    # Where examples have several metrics, these are their own.
    words += ["--metric", rows[0].metric] if "+" not in rows[0].metric else []
    words += ["--protocol", rows[0].protocol] if rows[0].protocol else []
    words += ["--prefill-chunk", str(chunk)] if (chunk := rows[0].prefill_chunk) is not None else []
    words += ["--block-size", str(block)] if (block := rows[0].block_size) is not None else []
    words += ["--dtype", rows[0].dtype] if rows[0].dtype else []
    words += ["--seed", str(rows[0].seed)] if rows[0].seed is not None else []
    return _pieces(words)


def _pieces(words: Sequence[str]) -> list[str]:
    starts = [0, *(i for i, word in enumerate(words) if word.startswith("--")), len(words)]
    return [shlex.join(words[a:b]) for a, b in pairwise(starts)]
