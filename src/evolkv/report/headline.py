"""The head of a report: what was evolved, for what, and what came out, in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from evolkv.profile_file import unit_of
from evolkv.report.comparisons import Comparison, Entry
from evolkv.report.schemas import Search, Validated, mean_of
from evolkv.report.sources import Sources
from evolkv.report.words import candidates, counted, duration, interval, listing, mebibytes, number, percent, short

#: A budget is worth naming first if its score is this close to the full cache's.
_CLOSE = 0.95
#: Allocations that no search evolved, as `evolkv.evolution.space` names them; to import that takes seconds.
NOT_EVOLVED = ("uniform", "pyramid", "cosine", "lukv", "start")


@dataclass(frozen=True)
class Fact:
    """A number at the top of the page, with what it is and what it compares to."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Headline:
    """Title, sentences and numbers at the top of the page."""

    title: str
    sentences: list[str]
    facts: list[Fact]


def headline(
    comparisons: Sequence[Comparison],
    sources: Sources,
    model: str,
    task: str,
) -> Headline:
    """Return the title, sentences and numbers at the top of a report.

    Args:
        comparisons: of methods on the same examples; those on held-out examples first.
        sources: as read.
        model: name of the model, or "".
        task: spec of the task, or "".
    """
    searches = sources.searches
    search_facts = _search_facts(searches)
    best = next((group for group in comparisons if group.evolved), None)
    if best is not None:
        return _evolved(best, sources, search_facts)
    results = [search for search in searches if search.result is not None]
    if results:
        return _chosen(_first(results), model, task, search_facts)
    if searches:
        return _so_far(searches, model, task, search_facts)
    if comparisons:
        return _methods(comparisons)
    profile = sources.profiles[0]
    low, high = min(map(min, profile.budgets)), max(map(max, profile.budgets))
    unit = unit_of(profile.selector)
    title = f"A profile for {short(profile.model.name)}: {number(mean_of(profile.budgets))} {unit} per KV head"
    sentence = f"Its {len(profile.budgets)} layers have between {low:,} and {high:,} {unit} per KV head."
    return Headline(title, [sentence], [])


def _evolved(group: Comparison, sources: Sources, search_facts: list[Fact]) -> Headline:
    entry, full = named_first(group), group.full
    held = _held_by(entry, sources)
    plain = held in NOT_EVOLVED
    row, share = entry.row, group.share(entry)
    memory = f"{percent(share)} of its KV cache" if share is not None else f"{mebibytes(row.kv_bytes)} MiB of KV cache"
    where = f"{_plain(row.task)} in validation" if group.of_curve else _plain(row.task)
    title = f"{_plain(row.model)} scores {row.score:.2f} on {where} with {memory}"
    beside = ""
    if full is not None:
        beside = f", where the full cache of {number(round(full.row.mean_budget))} scores {full.row.score:.2f}"
    sentences = [
        f"With {number(round(row.mean_budget, 1))} cache entries per KV head "
        f"{'the profile scores' if plain else 'the evolved budgets score'} "
        f"{row.score:.2f} (95\u202f% interval {interval(row.ci95)}) on {group.examples}{beside}."
    ]
    if plain:
        sentences.append(f"It holds the budgets of {held}, not evolved ones.")
    if rivals := sorted(group.rivals(entry), key=lambda rival: -rival.row.score):
        sentences.append(_beside("the search" if plain else "evolution", row.score, rivals))
    if group.of_curve:
        sentences.append(
            "The budgets were chosen on these examples, so scores on others may be lower: evaluate the profiles."
        )
    elif row.seen:
        sentences.append("On examples that the search saw scores are too high: evaluate the profile on others.")
    facts = [
        Fact("Score", f"{row.score:.2f}", f"full cache {full.row.score:.2f}" if full else f"{row.metric}, n = {row.n}"),
        Fact(
            "KV cache",
            f"{mebibytes(row.kv_bytes)} MiB",
            f"{percent(share)} of {mebibytes(full.row.kv_bytes)} MiB" if full and share is not None else "",
        ),
    ]
    facts.append(Fact("Budget", number(round(row.mean_budget, 1)), "entries per KV head"))
    return Headline(title, sentences, facts + search_facts)


def _held_by(entry: Entry, sources: Sources) -> str:
    """Return what the search called the budgets of an entry's profile, or nothing where that is not known."""
    if entry.source:
        return entry.source
    row, name = entry.row, PurePath(entry.row.method).name
    known = [
        (PurePath(path).name, each.budgets, each.search.get("chosen"))
        for each, path in zip(sources.profiles, sources.profile_paths, strict=True)
    ]
    known += [("", search.result.budgets, search.chosen) for search in sources.searches if search.result is not None]
    same = [each for each in known if each[0] == name]
    near = [each for each in known if math.isclose(mean_of(each[1]), row.mean_budget, rel_tol=0.02)]
    chosen = {each[2] for each in same or near}
    found = chosen.pop() if len(chosen) == 1 else None
    return found if isinstance(found, str) else ""


def _beside(what: str, ours: float, rivals: Sequence[Entry]) -> str:
    """Return what others score in the same memory, best first, and what follows for what made the profile."""
    best, theirs = rivals[0].row.method, rivals[0].row.score
    said = f"In the same memory {short(best)}, which needs no search, scores {theirs:.2f}"
    if len(rivals) > 1:
        said = (
            f"In the same memory the best of {len(rivals)} methods that need no search, {short(best)}, scores "
            f"{theirs:.2f}"
        )
    return said + (f", so here {what} gained nothing." if theirs >= ours else ".")


def named_first(group: Comparison) -> Entry:
    """Return the evolved entry to name: the least memory that scores almost as the full cache, or the best score."""
    evolved = sorted(group.evolved, key=lambda entry: entry.row.kv_bytes)
    target = _CLOSE * (group.full.row.score if group.full else max(entry.row.score for entry in evolved))
    return next(
        (entry for entry in evolved if entry.row.score >= target), max(evolved, key=lambda entry: entry.row.score)
    )


def _first(searches: Sequence[Search]) -> Search:
    """Of results the one to name: the smallest budget that scores almost as the best does, under its best selector."""

    def of(search: Search) -> Validated:
        assert search.result is not None
        return search.result

    target = _CLOSE * max(of(search).score for search in searches)
    close = [search for search in searches if of(search).score >= target]
    return min(close, key=lambda search: (mean_of(of(search).budgets), -of(search).score))


def _chosen(search: Search, model: str, task: str, facts: list[Fact]) -> Headline:
    result = search.result
    assert result is not None
    entries = number(round(mean_of(result.budgets), 1))
    heuristics = sorted((entry for entry in search.validation if not entry.evolved), key=lambda entry: -entry.score)
    on = f"On {counted(result.n, 'validation example')}"
    if search.improved:
        title = f"{_of(model, task)}: evolved budgets score {result.score:.2f} with {entries} entries per KV head"
        scored = f"{result.score:.2f} (95\u202f% interval {interval(result.ci95)})"
        sentences = [f"{on} the search's choice scores {scored}."]
        if heuristics:
            others = listing([f"{short(entry.name)} {entry.score:.2f}" for entry in heuristics])
            sentences.append(f"Budgets that need no evolution score less in the same memory: {others}.")
    elif len(search.validation) == 1:
        title = f"{_of(model, task)}: {short(result.name)} scores {result.score:.2f} with {entries} entries per KV head"
        sentences = [f"Nothing was evolved: the profile holds the start, {short(result.name)}."]
    else:
        title = f"{_of(model, task)}: no evolved budgets beat {short(result.name)} with {entries} entries per KV head"
        evolved = max((entry.score for entry in search.validation if entry.evolved), default=None)
        ahead = ""
        if evolved is not None:
            level = "ahead of" if evolved < result.score else "level with"
            ahead = f"{on} {short(result.name)} ({result.score:.2f}) is {level} the evolved budgets ({evolved:.2f}). "
        sentences = [f"{ahead}The profile holds {short(result.name)}."]
    score = Fact("Score", f"{result.score:.2f}", f"in validation, n = {result.n}")
    return Headline(title, sentences, [score, Fact("Budget", entries, "entries per KV head"), *facts])


def _so_far(searches: Sequence[Search], model: str, task: str, facts: list[Fact]) -> Headline:
    search = searches[0]
    course = search.course()
    title = f"{_of(model, task)}: {counted(sum(len(s.history) for s in searches), 'candidate')} so far"
    best = [Fact("Score", f"{course[-1][1]:.2f}", "on the training examples")] if course else []
    stopped = "was interrupted: the budgets are what it had come to" if search.interrupted else "has chosen nothing yet"
    return Headline(title, [f"The search {stopped}."] if len(searches) == 1 else [], best + facts)


def _methods(comparisons: Sequence[Comparison]) -> Headline:
    group = comparisons[0]
    methods = dict.fromkeys(entry.row.method for entry in group.entries)
    best = max(group.entries, key=lambda entry: (entry.row.score, -entry.row.kv_bytes))
    sentence = (
        f"{short(best.row.method)} scores highest: {best.row.score:.2f} (95\u202f% interval {interval(best.row.ci95)}) "
        f"on {group.examples}, with {mebibytes(best.row.kv_bytes)} MiB of KV cache."
    )
    title = f"{_of(group.first.model, group.first.task)}: {counted(len(methods), 'method')} compared"
    return Headline(title, [sentence], [])


def _search_facts(searches: Sequence[Search]) -> list[Fact]:
    evaluations = sum(candidates(search.evaluations, search.settings) for search in searches)
    if not evaluations:
        return []
    seconds = sum(search.seconds for search in searches)
    took = f" in {duration(seconds)}" if seconds else ""
    return [Fact("Search", number(evaluations), f"candidate{'s'[: evaluations > 1]}{took}")]


def _of(model: str, task: str) -> str:
    return " on ".join(filter(None, [_plain(model), _plain(task)])) or "A search"


def _plain(name: str) -> str:
    """A model without its owner, a task without its options: what a title has room for."""
    return short(name.partition(":")[0].rpartition("/")[2] or name, 48)
