"""Write the tables of docs/ and README.md from bench/records/. Needs nothing but Python.

    python bench/tables.py [--check]        # or: make tables [CHECK=1]

A page says where a table goes by two comments, <!-- table:NAME --> and <!-- /table:NAME -->; what stands between them
is replaced. NAME is a record, or several joined by "+" or matched by "*", and may end in ":VIEW", one of `VIEWS`. With
--check nothing is written; the exit code is 1 if a page differs from its records.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lib.records import RECORDS, ROOT, read

_MARKED = re.compile(r"(<!-- table:(\S+) -->\n).*?(<!-- /table:\2 -->)", re.DOTALL)
_LINKED = re.compile(r"bench/records/([\w.-]+)\.json")
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Record:
    """A record, seen from a page.

    Args:
        name: of its file.
        content: what the file holds.
        page: the page that it is shown on.
    """

    name: str
    content: dict[str, Any]
    page: Path

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    @property
    def table(self) -> dict[str, Any]:
        """The first table of a record of bench/results.py."""
        return self.content["tables"][0]

    @property
    def link(self) -> str:
        """Path of the record, as the page links to it."""
        return os.path.relpath(RECORDS / f"{self.name}.json", self.page.parent)

    @property
    def setting(self) -> str:
        """The machine and the settings, for a cell, with a link to the record."""
        dtype = _SHORT.get(self["dtype"], self["dtype"])
        return f"[{self['machine']['processor']}, {dtype}]({self.link})"

    @property
    def caption(self) -> str:
        """Model, n, seed, what needles hide in if the record says so, machine and date, as a line."""
        first, seeds = self["seed"], self.content.get("seeds", 1)
        seeds = len(seeds) if isinstance(seeds, list) else seeds
        seed = f"seed {first}" if seeds == 1 else f"seeds {first} to {first + seeds - 1}"
        facts = [self["model"], f"n = {self['n']}", seed, *self._haystacks, self.setting]
        return f"{'; '.join(facts)}. Measured {self['date'][:10]}."

    @property
    def _haystacks(self) -> list[str]:
        parts = [*self.content.get("tables", []), *self.content.get("rows", [])]
        return [f"haystack: {each}" for each in sorted({part["haystack"] for part in parts if "haystack" in part})]


Lines = Iterator[str]
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]
View = Callable[[Sequence[Record]], Lines]


def row(cells: Sequence[Any]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Lines:
    """Yield the lines of a table."""
    yield from (row(heads), row(["---"] * len(heads)), *map(row, rows))


def methods(records: Sequence[Record]) -> Lines:
    """Yield scores by method and budget; the best of each budget but the full cache's are bold."""
    for record in records:
        scores = record.table["scores"]
        best = [max(column) for column in zip(*(scores[each] for each in scores if each != "full"), strict=True)]

        def cell(method: str, value: float, top: float) -> str:
            return f"**{value:.3f}**" if value == top and method != "full" else f"{value:.3f}"

        rows = [[name, *(cell(name, *pair) for pair in zip(scores[name], best, strict=True))] for name in scores]
        about = f"protocol {record.table['protocol']}, metric `{record.table['metric']}`; {record.caption}"
        yield from (f"`{record['command']}`; {about}", "")
        yield from table(["method", *record.table["budgets"]], rows)


def differences(records: Sequence[Record], rival: str | None = None) -> Lines:
    """Yield the best other method → evolved, and the paired difference, by task and budget; bold: above chance.

    Args:
        records: of bench/results.py.
        rival: the other method instead of the best one; tasks where it is the best at every budget are left out.
    """
    rows = []
    for record in records:
        for compared in record.table["comparisons"]:
            if rival is not None and all(cell["best"] == rival for cell in compared["cells"]):
                continue
            n = record["n"] if compared["n"] is None else compared["n"]
            cells = [_compared(cell if rival is None else {"best": rival, **cell[rival]}) for cell in compared["cells"]]
            rows.append([compared["task"], f"{compared['full']:.3f}", *cells, n])
    yield from table(["task", "full", *records[0].table["budgets"], "n"], rows)


def _compared(cell: dict[str, Any]) -> str:
    difference = _difference({"mean": cell["difference"], "ci95": cell["ci95"]}, 3)
    searches = [f"{each:+.3f}".replace("-", "−") for each in cell.get("searches", ())]
    by_search = f"; by search {', '.join(searches)}" if searches else ""
    return f"{cell['best']} {cell['mean_b']:.3f} → {cell['mean_a']:.3f}: {difference}{by_search}"


def results(records: Sequence[Record]) -> Lines:
    """Yield scores by method, then the paired differences by task in a fold."""
    for record in records:
        yield from methods([record])
        yield from ("", "<details><summary>By task, with paired differences</summary>", "")
        yield from differences([record])
        cells = [cell for compared in record.table["comparisons"] for cell in compared["cells"]]
        if all("lukv" in cell for cell in cells) and any(cell["best"] != "lukv" for cell in cells):
            yield from ("", "Where another method is best, against LU-KV:", "")
            yield from differences([record], "lukv")
        if all("equal" in cell for cell in cells):
            yield from ("", "Against equal budgets under the profile's own selector:", "")
            yield from differences([record], "equal")
        yield from ("", "</details>")


def leaderboard(records: Sequence[Record]) -> Lines:
    """Yield scores of an evolkv command by method and budget, with intervals, bytes held and prefill factors.

    A method SELECTOR-{}.json is a profile for each budget, evolved under that selector; SELECTOR-lukv-{}.json has
    LU-KV's budgets.
    """
    for record in records:
        rows: dict[str, list[dict[str, Any]]] = {}
        for each in record["rows"]:
            method = each["method"].replace("-lukv-{}.json", ", LU-KV").replace("-{}.json", ", evolved")
            rows.setdefault(method, []).append(each)
        budgets = list(dict.fromkeys(each["budget"] for each in record["rows"] if each["budget"] is not None))
        cells = []
        for method, mine in rows.items():
            scores = ["{:.2f} ({:.2f}–{:.2f})".format(each["score"], *each["ci95"]) for each in mine]
            scores += [""] * (len(budgets) - len(scores))
            held = " / ".join(f"{each['kv_bytes'] / 2**20:.1f}" for each in mine)
            cells.append([method, *scores, held, f"{mine[0]['prefill_factor']:.2f} ×"])
        yield from (f"`{record['command']}`; {record.caption}", "")
        yield from table(["method", *(f"{each} kept" for each in budgets), "held, MiB", "prefill"], cells)


def headline(records: Sequence[Record]) -> Lines:
    """Yield needles found at the smallest budget: the best published method, equal budgets, evolved ones."""
    rows = []
    for record in records:
        scores = {method: values[0] for method, values in record.table["scores"].items()}
        under = record.table["evolved_under"][0]
        best, published = _best_published(scores)
        rows.append(
            [
                record["model"],
                record.table["protocol"],
                f"{100 * published:.0f} % ({best})",
                f"{100 * scores[under]:.0f} % ({under})",
                f"{100 * scores['lukv']:.0f} %" if "lukv" in scores else "",
                f"**{100 * scores['evolved']:.0f} %**",
                _examples(record),
                record.setting,
            ]
        )
    heads = ["model", "protocol", "best published method", "same selector, equal budgets", "LU-KV", "evolved", "n"]
    yield from table([*heads, "measured on"], rows)


def one_profile(records: Sequence[Record]) -> Lines:
    """Yield what one profile does for all tasks of a table at its largest budget: the mean over the tasks."""
    rows = []
    for record in records:
        scores = {method: values[-1] for method, values in record.table["scores"].items()}
        best, published = _best_published(scores)
        rows.append(
            [
                _SERVED[record.table["table"]],
                record.table["budgets"][-1],
                f"{scores['full']:.2f}",
                f"{published:.2f} ({best})",
                f"{scores['lukv']:.2f}",
                f"**{scores['evolved']:.2f}**",
                _examples(record),
                record.setting,
            ]
        )
    heads = ["one profile for", "entries per head", "full cache", "best published method", "LU-KV", "evolved", "n"]
    yield from table([*heads, "measured on"], rows)


#: What the profile of a table of bench/results.py serves.
_SERVED = {
    "ruler": "eleven tasks of RULER, 2,048 tokens",
    "workloads": "retrieval, tracking, code, GSM8K and news",
    "unseen": "sixteen tasks that its search never saw (`--task general`)",
}


def _best_published(scores: dict[str, float]) -> tuple[str, float]:
    """Return the best of the published methods, at their own defaults, and its score."""
    theirs = {
        name: each for name, each in scores.items() if name not in ("full", "evolved", "lukv") and ":" not in name
    }
    best = max(theirs, key=lambda name: theirs[name])
    return best, theirs[best]


def _examples(record: Record) -> str:
    # Means over all examples repeat what their tasks have counted.
    n = sum(each["n"] for each in record.table["comparisons"] if each["task"] != "all examples")
    seeds = record.content.get("seeds", 1)
    return f"{n} × {seeds} searches" if seeds > 1 else str(n)


def summary(records: Sequence[Record]) -> Lines:
    """Yield on how many tasks evolved budgets are ahead of the best other, level with it, and behind it."""
    budgets = sorted({budget for record in records for budget in record.table["budgets"]})
    counts: dict[tuple[str, str], dict[int, list[int]]] = {}
    for record in records:
        mine = counts.setdefault((record["model"], record.table["protocol"]), {budget: [0, 0, 0] for budget in budgets})
        for compared in record.table["comparisons"]:
            for budget, cell in zip(record.table["budgets"], compared["cells"], strict=True):
                low, high = cell["ci95"]
                # Means over all examples repeat what their tasks have counted.
                mine[budget][0 if low > 0 else 2 if high < 0 else 1] += compared["task"] != "all examples"
    rows = [
        [*kind, *("{} / {} / {}".format(*mine[budget]) if any(mine[budget]) else "" for budget in budgets)]
        for kind, mine in counts.items()
    ]
    yield from table(["model", "protocol", *budgets], rows)


def _spread(values: dict[str, float], digits: int = 1) -> str:
    median, low, high = (f"{values[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low}–{high})"


def rows_of_evolkv(record: Record) -> Table:
    """Return the rows of an evolkv command's results."""
    heads = ["method", "mean budget", "score", "95 % interval", "KV cache"]
    rows = [
        [
            each["method"],
            f"{each['mean_budget']:,.0f}",
            f"{each['score']:.2f}",
            "{:.2f}–{:.2f}".format(*each["ci95"]),
            f"{each['kv_bytes'] / 2**20:.2f} MiB",
        ]
        for each in record["rows"]
    ]
    return heads, rows


def decode(record: Record) -> Table:
    """Return milliseconds of a decode step by prompt length."""
    heads = [
        "prompt tokens",
        "contender",
        "milliseconds",
        "over plain",
        "over plain after 128 tokens",
        "floor",
        "cache",
    ]
    reads = any("read_bytes" in each for each in record["decode"])
    rows = [
        [
            f"{each['context']:,}",
            each["contender"],
            _spread(each["milliseconds"]),
            _spread(each["over_plain"], 2) if "over_plain" in each else "",
            _spread(each["over_plain_after_short_prompt"], 2),
            f"{each['floor_milliseconds']:.1f}",
            _mib(each["kv_bytes"]),
            *([_mib(each.get("read_bytes", each["kv_bytes"]))] if reads else []),
        ]
        for each in record["decode"]
    ]
    return [*heads, *(["read by a step"] if reads else [])], rows


def prefill(record: Record) -> Table:
    """Return seconds of a prompt by its length."""
    rows = [
        [
            f"{each['context']:,}",
            each["contender"],
            _spread(each["seconds"], 2),
            _spread(each["over_plain"], 2),
            f"{each['floor_seconds']:.2f}",
        ]
        for each in record["prefill"]
    ]
    return ["prompt tokens", "contender", "seconds", "over plain", "floor"], rows


def batch(record: Record) -> Table:
    """Return milliseconds of a step, and tokens per second, by batch size."""
    rows = [
        [
            each["batch"],
            each["contender"],
            _spread(each["milliseconds"]),
            _spread(each["over_plain"], 2),
            f"{each['floor_milliseconds']:.1f}",
            f"{each['tokens_per_second']:.0f}",
            _mib(each["kv_bytes"]),
        ]
        for each in record["batch"]
    ]
    return ["sequences", "contender", "milliseconds", "over plain", "floor", "tokens per second", "cache"], rows


def throughput(record: Record) -> Table:
    """Return how many sequences a fixed cache memory holds, and what they yield together."""
    plain = record["throughput"][0].get("tokens_per_second")
    rows = []
    for each in record["throughput"]:
        row = [each["contender"], each["sequences_that_fit"]]
        if "tokens_per_second" in each:
            row += [_spread(each["step_milliseconds"]), f"{each['floor_milliseconds']:.1f}"]
            row += [f"{each['tokens_per_second']:.0f}", f"{each['tokens_per_second'] / plain:.1f}" if plain else ""]
        rows.append(row + [""] * (6 - len(row)))
    return ["contender", "sequences", "milliseconds of a step", "floor", "tokens per second", "over plain"], rows


def memory(record: Record) -> Table:
    """Return what a cache holds, and by how much the process grew."""
    keys = ("kv_bytes", "prefill_peak_bytes", "decode_peak_bytes")
    rows = [
        [f"{each['context']:,}", each["contender"], *(_mib(each[key]) for key in keys)] for each in record["memory"]
    ]
    return ["prompt tokens", "contender", "cache", "peak of the prompt", "peak of the steps"], rows


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def construction(record: Record) -> Table:
    """Return milliseconds of making a cache."""
    return ["making a cache, milliseconds"], [[_spread(record["milliseconds"])]]


def scoring(record: Record) -> Table:
    """Return what each selector's scoring costs a prompt."""
    heads = ["selector", "plain, seconds", "compressed, seconds", "ratio of pairs", "scoring memory over a layer's KV"]
    rows = [
        [
            name,
            *(_spread(each[key], 2) for key in ("plain_seconds", "compressed_seconds", "ratio_of_pairs")),
            f"{each['scoring_memory_over_kv']:.1f}",
        ]
        for name, each in record["selectors"].items()
    ]
    return heads, rows


def scoring_memory(record: Record) -> Table:
    """Return what scoring one layer holds, over the layer's keys and values."""
    rows = [
        [name, record["context"], f"{each['scoring_memory_over_kv']:.2f}"] for name, each in record["selectors"].items()
    ]
    return ["selector", "prompt tokens", "scoring memory over a layer's KV"], rows


def kept_tokens(record: Record) -> Table:
    """Return how far each selector keeps the tokens that its press keeps."""
    rows = [
        [name, each["press"], each["budget"], f"{each['jaccard_mean']:.4f}", f"{each['jaccard_min']:.3f}"]
        for name, each in record["selectors"].items()
    ]
    return ["selector", record["peer"], "budget", "mean", "least over heads"], rows


def chunks(record: Record) -> Table:
    """Return what prompts read in chunks find, hold at most, and take."""
    rows = [
        [
            name,
            f"{each['score']:.2f}",
            f"{each['peak_entries_per_head']:,}",
            f"{each['peak_kv_bytes'] / 2**20:.2f}",
            _spread(each["prefill_seconds"], 2),
        ]
        for name, each in record["rows"].items()
    ]
    return ["method", "found", "peak entries of a head", "peak KV MiB", "prefill, seconds"], rows


def against(record: Record) -> Table:
    """Return this tree's seconds over another revision's."""
    rows = [
        [name, *(_spread(each[key], 3) for key in ("before", "after", "ratio_of_pairs"))]
        for name, each in record["seconds"].items()
    ]
    return ["work", "before, CPU seconds", "after, CPU seconds", "after over before, in pairs"], rows


def gradient(record: Record) -> Table:
    """Return needles found under each method, over the seeds."""
    heads = ["mean budget", "method", "found, mean of seeds", "least and most", "n of each seed"]
    rows = [
        [
            row["budget"],
            row["method"],
            f"{row['mean']:.2f}",
            f"{row['min']:.2f}–{row['max']:.2f}",
            f"{record['n']} × {record['seeds']}",
        ]
        for row in record["table"]
    ]
    return heads, rows


def found(record: Record) -> Table:
    """Return needles found at each budget, a row for each, under what a reader would compare."""
    rows = []
    for budget in dict.fromkeys(row["budget"] for row in record["table"]):
        at = {row["method"]: row for row in record["table"] if row["budget"] == budget}
        shown = [f"{100 * at[method]['mean']:.0f} %" for method in ("full", "snapkv", "chunkkv")]
        evolved = at["evolkv"]
        mine = f"**{100 * evolved['mean']:.0f} %** ({100 * evolved['min']:.0f}–{100 * evolved['max']:.0f} %)"
        rows.append([budget, f"{budget / 16:.1f} %", *shown, mine, f"{record['n']} × {record['seeds']} searches"])
    heads = ["entries per head", "of the prompt", "full cache", "SnapKV", "same selector, equal budgets"]
    return [*heads, "evolved, mean (least–most)", "n"], rows


def descent(record: Record) -> Table:
    """Return what a descent and evolution from uniform budgets come to, and what they cost."""
    rows = [
        [
            row["seed"],
            *(f"{row[name]:.3f}" for name in ("uniform", "evolution", "descent")),
            f"step {row['reached']} of {row['steps']}" if row["reached"] else "not reached",
            *(f"{row['passes'][name]:,} ({row['seconds'][name]:.0f} s)" for name in ("evolution", "descent")),
        ]
        for row in record["rows"]
    ]
    heads = ["seed", "equal budgets", "evolution alone", "descent", "as good as evolution"]
    return [*heads, "passes of evolution", "passes of the descent"], rows


def label_free(record: Record) -> Table:
    """Return scores of budgets that were evolved with and without answers."""
    rows = []
    for row in record["rows"]:
        scores = row["scores"]
        low, high = row["ci95"]
        shown = [f"{scores[name]:.3f}" for name in ("full", row["selector"], "logprob", "fidelity")]
        difference = f"{row['difference']:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")
        rows.append([row["task"], row["budget"], row["metric"], *shown, difference])
    heads = ["task", "budget", "metric", "full", "equal budgets", "evolved with answers", "without", "difference"]
    return heads, rows


def under(record: Record) -> Table:
    """Return what evolved budgets are worth under each selector."""
    rows = []
    for row in record["rows"]:
        shown = [f"{row['scores'][name]:.3f}" for name in ("full", row["selector"], "evolved")]
        difference = _difference(row["difference"], 3)
        rows.append([f"`{row['selector']}`", row["budget"], row["task"], *shown, difference])
    return ["selector", "budget", "task", "full", "equal budgets", "evolved", "difference"], rows


def plan(record: Record) -> Table:
    """Return what was planned beside what was taken."""
    mib = 2**20
    rows = [
        [
            row["setting"],
            f"{row['planned_seconds']:.0f}",
            f"{row['seconds']:.0f}",
            f"{row['time_ratio']:.2f}",
            f"{row['planned_bytes'] / mib:,.0f}",
            f"{row['bytes'] / mib:,.0f}",
            f"{row['memory_ratio']:.2f}",
        ]
        for row in record["rows"]
    ]
    heads = ["search", "planned, s", "took, s", "ratio", "planned peak, MiB", "peak, MiB", "ratio"]
    return heads, rows


def way_back(record: Record) -> Table:
    """Return the memory of one slope."""
    heads = ["prompt", "answer", "recording, MiB", "peak beyond it, MiB", "estimate, MiB", "seconds"]
    row = [
        f"{record['context']:,}",
        record["answer"],
        f"{record['recording_mebibytes']:,.0f}",
        _spread(record["peak_mebibytes"], 0),
        f"{record['estimate_mebibytes']:,.0f}",
        _spread(record["seconds"]),
    ]
    return heads, [row]


def serving(record: Record) -> Table:
    """Return requests per second, waiting times and needles of each server, by length of the answers."""
    heads = ["answer", "server", "requests/s", "over plain", "at once", "over plain", "blocks in use"]
    rows = [
        [
            each["answer"],
            each["contender"],
            _spread(each["requests_per_second"], 2),
            _spread(each["requests_per_second_over_plain"], 2),
            f"{each['most_running']['median']:.0f}",
            f"{each['most_running_over_plain']['median']:.1f}",
            f"{100 * each['most_blocks']['median']:.0f} %",
            _spread(each["seconds_to_first_token"]),
            f"{1000 * each['seconds_between_tokens']['median']:.0f}",
            f"{each['score']['median']:.2f}",
        ]
        for each in sorted(record["rows"], key=lambda each: each["answer"])
    ]
    return [*heads, "seconds to the first token", "milliseconds between tokens", "needles found"], rows


def host(record: Record) -> Table:
    """Return what a step of decoding costs besides the model, by groups of layers or of KV heads."""
    rows = [
        [each["groups"], _spread(each["milliseconds"], 2), _spread(each["over_plain"], 2)] for each in record["rows"]
    ]
    parts = f"{record['layers']} layers with {record['kv_heads']} KV heads each"
    return [f"groups, of {parts}", "milliseconds a step", "over plain vLLM"], rows


def heads(record: Record) -> Table:
    """Return microseconds of a layer's attention, by calls."""
    rows = [[name, _spread(each, 0)] for name, each in record["microseconds"].items()]
    return ["attention of a layer", "microseconds"], [*rows, ["ratio of pairs", _spread(record["ratio_of_pairs"], 2)]]


def strategies(record: Record) -> Table:
    """Return the paper's finding on strategies and group sizes: scores at one budget, and differences."""
    budget, base = record["settings"]["budget"], "evolkv, groups of 8"
    differences = {each["what"]: each for each in record["summary"]["differences"] if each["budget"] == budget}
    rows = [
        [each["name"], _interval(each), _difference(differences.get(f"{each['name']} − {base}"))]
        for each in record["summary"]["scores"]
        if each["budget"] in (budget, None) and each["name"] != "direct" and not each["name"].startswith("expanded")
    ]
    return ["allocation", "held-out score", "minus groups of 8"], rows


def expansion(record: Record) -> Table:
    """Return the paper's finding on expanding budgets: scores by budget, and differences."""
    scores = {(each["name"], each["budget"]): each for each in record["summary"]["scores"]}
    differences = {(each["what"], each["budget"]): each for each in record["summary"]["differences"]}
    budgets = record["settings"]["budgets"]
    names = ("direct", f"expanded from {budgets[0]}", "uniform")
    pairs = (f"{names[0]} − {names[1]}", f"{names[1]} − {names[2]}")
    rows = [
        [
            f"{budget:,}",
            *(_interval(scores.get((name, budget))) for name in names),
            *(_difference(differences.get((pair, budget))) for pair in pairs),
        ]
        for budget in budgets
    ]
    return ["budget", "searched there", *names[1:], "searched − expanded", "expanded − uniform"], rows


def transfer(record: Record) -> Table:
    """Return the scores of budgets on tasks that they were not evolved on; one prompt has no interval."""
    by_task: dict[str, dict[str, Any]] = {}
    for each in record["summary"]["transfer"]:
        by_task.setdefault(each["task"], {})[each["name"]] = each
    names = [name for name in next(iter(by_task.values())) if name not in ("uniform", "pyramid", "full cache")]
    rows = [
        [
            Path(re.sub(r"^jsonl:path=|,split=all$", "", task)).stem,
            found["uniform"]["score"]["n"],
            *(f"{found[name]['score']['mean']:.3f}" for name in ("uniform", "full cache")),
            *(_difference(found[name]["minus_uniform"], 3) for name in names),
        ]
        for task, found in by_task.items()
        if found["uniform"]["score"]["n"] > 1
    ]
    return ["task", "n", "uniform", "full cache", *(f"{name} − uniform" for name in names)], rows


def _interval(each: dict[str, Any] | None) -> str:
    return "" if each is None else "{:.2f} ({:.2f}–{:.2f})".format(each["mean"], *each["ci95"]).replace("-", "−")


def _difference(each: dict[str, Any] | None, digits: int = 2) -> str:
    """Write a difference with its interval, bold if that is above zero."""
    if each is None:
        return ""
    mean, low, high = (f"{value:+.{digits}f}".replace("-", "−") for value in (each["mean"], *each["ci95"]))
    return f"**{mean} ({low} to {high})**" if each["ci95"][0] > 0 else f"{mean} ({low} to {high})"


def engine(records: Sequence[Record]) -> Lines:
    """Yield the milliseconds of one candidate on one example."""
    heads = ["naive, ms", "replay, ms", "ratio", "largest difference of scores", "floor, ms", "replay over floor", "n"]
    rows = [
        [
            _spread(record["milliseconds_per_candidate_and_example"]["naive"], 0),
            _spread(record["milliseconds_per_candidate_and_example"]["replay"]),
            f"{record['naive_over_replay']:.0f}",
            f"{record['largest_score_difference']:.1e}",
            f"{record['floor_milliseconds']:.1f}",
            f"{record['replay_over_floor']:.2f}",
            record["n"],
            record.setting,
        ]
        for record in records
    ]
    yield from table([*heads, "measured on"], rows)


def layer(records: Sequence[Record]) -> Lines:
    """Yield microseconds of attention to ragged rows, in each way, by number format."""
    rows = [[way, *(_spread(record["ragged"][way], 0) for record in records)] for way in records[0]["ragged"]]
    yield from table(["attention to 24 ragged rows", *(record.setting for record in records)], rows)


def one_by_one(view: Callable[[Record], Table]) -> View:
    """Return a view that gives each record a table of its own, under its command and caption."""

    def lines(records: Sequence[Record]) -> Lines:
        for record in records:
            taken = record.content.get("seconds") if record["benchmark"] == "cli" else None
            seconds = f", {taken:.0f} seconds" if taken else ""
            yield from (f"`{record['command']}`{seconds}; {record.caption}", "")
            yield from table(*view(record))

    return lines


#: How a record is shown unless the page says otherwise, by the benchmark that made it.
BY_BENCHMARK: dict[str, View] = {
    "results": results,
    "cli": one_by_one(rows_of_evolkv),
    "inference paired": one_by_one(decode),
    "inference selectors": one_by_one(scoring),
    "inference construction": one_by_one(construction),
    "inference layer-step": layer,
    "search engine": engine,
    "search gradient": one_by_one(gradient),
    "search descent": one_by_one(descent),
    "search label-free": one_by_one(label_free),
    "search under": one_by_one(under),
    "plan": one_by_one(plan),
    "search way-back": one_by_one(way_back),
    "kvpress kept-tokens": one_by_one(kept_tokens),
    "inference chunks": one_by_one(chunks),
    "against": one_by_one(against),
    "serving serve": one_by_one(serving),
    "serving host": one_by_one(host),
    "serving heads": one_by_one(heads),
}
VIEWS: dict[str, View] = {
    "found": one_by_one(found),
    "prefill": one_by_one(prefill),
    "batch": one_by_one(batch),
    "throughput": one_by_one(throughput),
    "memory": one_by_one(memory),
    "scoring-memory": one_by_one(scoring_memory),
    "strategies": one_by_one(strategies),
    "expansion": one_by_one(expansion),
    "transfer": one_by_one(transfer),
    "methods": methods,
    "headline": headline,
    "one-profile": one_profile,
    "summary": summary,
    "leaderboard": leaderboard,
}


def _expanded(names: str) -> list[str]:
    """Return the records that names with "+" between them stand for; "*" stands for any letters."""
    parts = ((part, sorted(path.stem for path in RECORDS.glob(f"{part}.json"))) for part in names.split("+"))
    return [name for part, found in parts for name in (found if "*" in part else [part])]


def rendered(name: str, page: Path) -> str:
    """Return what stands between the comments of a name."""
    names, _, view = name.partition(":")
    records = [Record(each, read(each), page) for each in _expanded(names)]
    known = VIEWS | BY_BENCHMARK
    shown = known.get(view or records[0]["benchmark"])
    if shown is None:
        raise SystemExit(f"{page.relative_to(ROOT)}: table:{name}: nothing shows it; known views: {', '.join(VIEWS)}")
    return "\n".join(["", *shown(records), "", ""])


def _filled(page: Path, match: re.Match[str]) -> str:
    return match[1] + rendered(match[2], page) + match[3]


def main() -> None:
    """Write the tables, or check them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page differs")
    check, used, differing = options.parse_args().check, set[str](), []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = page.read_text()
        after = _MARKED.sub(partial(_filled, page), before)
        if before.count("<!-- table:") != len(_MARKED.findall(before)):
            raise SystemExit(f"{page.relative_to(ROOT)}: a comment 'table:NAME' lacks its '/table:NAME'")
        used |= {name for found in _MARKED.findall(before) for name in _expanded(found[1].partition(":")[0])}
        # A sentence may say what a small record holds, with a link to it.
        used |= set(_LINKED.findall(before))
        if before != after:
            differing.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(after)
    unused = {path.stem for path in RECORDS.glob("*.json")} - used
    for text in [*differing, *(f"record {name}: no page shows it" for name in sorted(unused))]:
        print(text)
    if check and differing:
        sys.exit(f"{len(differing)} pages differ from the records; run: make tables")


if __name__ == "__main__":
    main()
