"""The head of a report: what was evolved, for what, and what came out, in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evolkv.profile_file import ProfileFile
from evolkv.report.comparisons import Comparison, Entry
from evolkv.report.schemas import Search, Validated, mean_of
from evolkv.report.units import duration, mebibytes
from evolkv.report.words import candidates, counted, interval, listing, number, percent, short

#: A budget is worth naming first if its score is this close to the full cache's.
_CLOSE = 0.95


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
    searches: Sequence[Search],
    profiles: Sequence[ProfileFile],
    model: str,
    task: str,
) -> Headline:
    """Return the title, sentences and numbers at the top of a report.

    Args:
        comparisons: of methods on the same examples; those on held-out examples first.
        searches: as read.
        profiles: as read.
        model: name of the model, or "".
        task: spec of the task, or "".
    """
    search_sentences = [sentence for search in searches[:1] for sentence in _search_sentences(search, len(searches))]
    search_facts = _search_facts(searches)
    best = next((group for group in comparisons if group.evolved), None)
    if best is not None:
        return _evolved(best, search_sentences, search_facts)
    results = [search for search in searches if search.result is not None]
    if results:
        return _chosen(_first(results), model, task, search_sentences, search_facts)
    if searches:
        course = searches[0].course()
        title = f"{_of(model, task)}: {counted(sum(len(s.history) for s in searches), 'candidate')} so far"
        facts = [Fact("Score", f"{course[-1][2]:.2f}", "on the training examples")] if course else []
        return Headline(title, search_sentences, facts + search_facts)
    if comparisons:
        return _methods(comparisons)
    profile = profiles[0]
    low, high = min(map(min, profile.budgets)), max(map(max, profile.budgets))
    title = f"A profile for {short(profile.model.name)}: {number(mean_of(profile.budgets))} cache entries per KV head"
    sentence = f"Its {len(profile.budgets)} layers keep between {low:,} and {high:,} entries per KV head."
    return Headline(title, [sentence], [])


def _evolved(group: Comparison, search_sentences: list[str], search_facts: list[Fact]) -> Headline:
    entry, full = _best(group), group.full
    row, share = entry.row, group.share(entry)
    memory = f"{percent(share)} of its KV cache" if share is not None else f"{mebibytes(row.kv_bytes)} MiB of KV cache"
    where = f"{_plain(row.task)} in validation" if group.of_curve else _plain(row.task)
    title = f"{_plain(row.model)} scores {row.score:.2f} on {where} with {memory}"
    sentence = (
        f"With {number(round(row.mean_budget, 1))} cache entries per KV head, the evolved budgets score "
        f"{row.score:.2f} (95\u202f% interval {interval(row.ci95)}) on {group.examples}"
    )
    if full is not None:
        sentence += f"; the full cache holds {number(round(full.row.mean_budget))} and scores {full.row.score:.2f}"
    sentences = [sentence + "."]
    if group.of_curve:
        sentences.append(
            "The budgets were chosen on these examples, so scores on others may be lower: evaluate the profiles."
        )
    if rivals := group.rivals(entry):
        scores = listing([f"{short(rival.row.method)} {rival.row.score:.2f}" for rival in rivals])
        sentences.append(f"In the same memory: {scores}.")
        if max(rival.row.score for rival in rivals) >= row.score:
            sentences.append("So here evolution gained nothing.")
    facts = [
        Fact("Score", f"{row.score:.2f}", f"full cache {full.row.score:.2f}" if full else f"{row.metric}, n = {row.n}"),
        Fact(
            "KV cache",
            f"{mebibytes(row.kv_bytes)} MiB",
            f"{percent(share)} of {mebibytes(full.row.kv_bytes)} MiB" if full and share is not None else "",
        ),
    ]
    facts.append(Fact("Budget", number(round(row.mean_budget, 1)), "entries per KV head"))
    return Headline(title, sentences + search_sentences, facts + search_facts)


def _best(group: Comparison) -> Entry:
    """The smallest memory that scores almost as the full cache does, or else the highest score."""
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


def _chosen(search: Search, model: str, task: str, sentences: list[str], facts: list[Fact]) -> Headline:
    result = search.result
    assert result is not None
    entries = number(round(mean_of(result.budgets), 1))
    heuristics = [entry for entry in search.validation if not entry.evolved]
    others = listing([f"{short(other.name)} {other.score:.2f}" for other in heuristics])
    if search.improved:
        title = f"{_of(model, task)}: evolved budgets score {result.score:.2f} with {entries} entries per KV head"
    else:
        title = f"{_of(model, task)}: no evolved budgets beat {short(result.name)} with {entries} entries per KV head"
    score = Fact("Score", f"{result.score:.2f}", f"against {others}" if others and search.improved else "")
    return Headline(title, sentences, [score, Fact("Budget", entries, "entries per KV head"), *facts])


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


def _search_sentences(search: Search, count: int) -> list[str]:
    """Return sentences on how the budgets were found and chosen."""
    if count > 1:
        return []
    settings, said = search.settings, []
    how = f"Strategy {short(str(settings['strategy']))}" if "strategy" in settings else "The search"
    on = _examples(settings.get("train"))
    metric = f", scored by {short(str(settings['metric']))}" if "metric" in settings else ""
    took = f" in {duration(search.seconds)}" if search.seconds else ""
    if search.history:
        tried = counted(candidates(search.evaluations, settings), "candidate")
        first = f" after {counted(len(search.descent), 'step')} along the slope" if search.descent else ""
        said.append(f"{how} evaluated {tried}{first}{took}{metric}{on}.")
    if search.interrupted:
        said.append("The search was interrupted: the budgets are what it had come to.")
    elif search.result is not None:
        said.append(_choice(search, search.result))
    return said


def _choice(search: Search, result: Validated) -> str:
    heuristics = listing([f"{short(e.name)} ({e.score:.2f})" for e in search.validation if not e.evolved])
    unseen = f"On {counted(result.n, 'example')} that it never saw"
    if search.improved:
        return f"{unseen}, its choice scores {result.score:.2f}" + (f" beside {heuristics}." if heuristics else ".")
    return f"{unseen}, no evolved budgets beat {heuristics}: the profile holds {short(result.name)}."


def _search_facts(searches: Sequence[Search]) -> list[Fact]:
    evaluations = sum(candidates(search.evaluations, search.settings) for search in searches)
    if not evaluations:
        return []
    seconds = sum(search.seconds for search in searches)
    took = f" in {duration(seconds)}" if seconds else ""
    return [Fact("Search", number(evaluations), f"candidate{'s'[: evaluations > 1]}{took}")]


def _examples(train: object) -> str:
    n = train.get("n") if isinstance(train, dict) else train
    return f" on {counted(n, 'training example')}" if isinstance(n, int) and not isinstance(n, bool) else ""


def _of(model: str, task: str) -> str:
    return " on ".join(filter(None, [_plain(model), _plain(task)])) or "A search"


def _plain(name: str) -> str:
    """A model without its owner, a task without its options: what a title has room for."""
    return short(name.partition(":")[0].rpartition("/")[2] or name, 48)
