"""Results as tables of text, for a terminal or Markdown alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evolkv.report.axes import Table
from evolkv.report.words import counted, in_chunks, mebibytes, with_interval

if TYPE_CHECKING:
    from evolkv.evaluation.certify import Certificate, RecordsCertificate
    from evolkv.evaluation.compare import MethodComparison
    from evolkv.significance import PairedComparison

#: Columns of numbers, which stand right-aligned.
NUMERIC = frozenset(
    {
        *("budget", "mean budget", "n", "KV MiB", "of full", "resident MiB", "companion MiB", "read MiB"),
        *("prefill", "prefill left"),
        *("p", "safe budget", "loss"),
    }
)
_LEAST_P = 1e-4
NO_WIDTH = "An interval without width: all examples differ alike, and resampling cannot tell how others would."


def results_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Rows of an evaluation, with their intervals and what they cost.

    Args:
        rows: as `evolkv.evaluate` returns them.
    """
    several_tasks = len({row["task"] for row in rows}) > 1
    several_budgets = len({row["budget"] for row in rows if row["budget"] is not None}) > 1
    bins = sorted({name for row in rows for name in row.get("bins", {})})
    full = {row["task"]: row["kv_bytes"] for row in rows if row["method"] == "full"}
    columns = ["task"] * several_tasks + ["method"] + ["budget"] * several_budgets
    reads = any(row.get("read_bytes", row["kv_bytes"]) != row["kv_bytes"] for row in rows)
    pruned = any("prefill_share" in row for row in rows)
    columns += ["mean budget", "n", "metric", "score (95 % interval)", *bins, "KV MiB"] + ["of full"] * bool(full)
    reread = any(row.get("prefill_factor", 1) > 1 for row in rows)
    accompanied = any("companion_bytes" in row for row in rows)
    columns += ["resident MiB", "companion MiB"] * accompanied
    columns += ["read MiB"] * reads + ["prefill"] * reread + ["prefill left"] * pruned
    cells = []
    for row in rows:
        line = [row["task"]] * several_tasks + [row["method"]]
        line += ["–" if row["budget"] is None else str(row["budget"])] * several_budgets
        line += [f"{row['mean_budget']:,.1f}", str(row["n"]), row["metric"], with_interval(row["score"], row["ci95"])]
        line += [f"{row['bins'][name]['score']:.3f}" if name in row.get("bins", {}) else "–" for name in bins]
        line.append(mebibytes(row["kv_bytes"]))
        if full:
            line.append(f"{row['kv_bytes'] / full[row['task']]:.1%}" if row["task"] in full else "–")
        if accompanied:
            line.append(mebibytes(row.get("resident_bytes", row["kv_bytes"])))
            line.append(mebibytes(row.get("companion_bytes", 0)))
        if reads:
            line.append(mebibytes(row.get("read_bytes", row["kv_bytes"])))
        line += [f"{row.get('prefill_factor', 1):.2f} ×"] * reread
        if pruned:
            line.append(f"{row.get('prefill_share', 1):.1%}")
        cells.append(line)
    read = in_chunks(rows[0].get("prefill_chunk"))
    title = f"Scores of methods on the same {'' if any('seen' in row for row in rows) else 'held-out '}examples"
    return Table(f"{title}, prompts read {read}" if read else title, columns, cells)


def results_note(rows: Sequence[dict[str, Any]]) -> str:
    """Return what needles hide in and a caveat about the rows of an evaluation, in a line, or nothing."""
    said = []
    if used := {row["task"]: row["haystack"] for row in rows if "haystack" in row}:
        by_task = [f"{task} {haystack}" for task, haystack in used.items()]
        alike = [*dict.fromkeys(used.values())]
        said.append(f"Haystack: {'; '.join(alike if len(alike) == 1 else by_task)}.")
    saw = "{method} was evolved or chosen on {seen} of the {n} examples of {task}."
    said += dict.fromkeys(saw.format(**row) for row in rows if "seen" in row)
    if not all(row["ci95"][0] < row["ci95"][1] for row in rows):
        said.append("An interval without width: all examples score alike, and resampling cannot tell how others would.")
    return " ".join(said)


def comparison_table(found: MethodComparison) -> Table:
    """Two methods, task by task, and all tasks together where there are several."""
    columns = ["task", "metric", "n", "a", "b", "a − b (95 % interval)", "p", "wins / ties / losses of a"]
    rows = [_compared(each.task, each.metric, each.result) for each in found.tasks]
    if len(found.tasks) > 1:
        metrics = {each.metric for each in found.tasks}
        rows.append(_compared("all", metrics.pop() if len(metrics) == 1 else "several", found.overall))
    return Table(f"{found.model}: a is {found.a}, b is {found.b}", columns, rows)


def comparison_note(found: MethodComparison) -> str:
    """Return how the numbers of a comparison were computed, in a line."""
    results = [each.result for each in found.tasks] + [found.overall] * (len(found.tasks) > 1)
    counts = {True: "all ways to flip the signs", False: "20,000 random flips"}
    how = " or ".join(counts[exact] for exact in sorted({each.exact for each in results}, reverse=True))
    note = f"Intervals: BCa bootstrap over examples, 10,000 resamples. p: sign-flip test, {how}, two-sided."
    if any(each.ci95[0] == each.ci95[1] for each in results):
        note += f" {NO_WIDTH}"
    left_out = [counted(unpaired, "example")] if (unpaired := sum(each.unpaired for each in found.tasks)) else []
    left_out += found.left_out
    return f"{note} Left out: {', '.join(left_out)} on record for only one." if left_out else note


def _compared(task: str, metric: str, result: PairedComparison) -> list[str]:
    low, high = result.ci95
    difference = f"{result.difference:+.3f} ({low:+.3f} to {high:+.3f})"
    counts = f"{result.wins} / {result.ties} / {result.losses}"
    return [
        task,
        metric,
        str(result.n),
        f"{result.mean_a:.3f}",
        f"{result.mean_b:.3f}",
        difference,
        p_value(result.p),
        counts,
    ]


def certificates_table(found: RecordsCertificate) -> Table:
    """The smallest safe budget of each method, and the test that the next smaller one failed."""
    columns = ["task", "method", "metric", "n", "safe budget", "loss", "p", "the next budget"]
    rows = []
    for task, metric, method, each in found.rows:
        passed = [test for test in each.tested if test.certified]
        loss, p = (f"{passed[-1].loss:.3f}", p_value(passed[-1].p)) if passed else ("–", "–")
        rows.append(
            [task, method, metric, str(each.n), str(each.budget or "none"), loss, p, next_budget(each, found.loss)]
        )
    title = f"{found.model}: the smallest budget that loses less than {found.loss:g} against the full cache"
    return Table(f"{title}, with confidence {found.confidence:.4g}", columns, rows)


def next_budget(found: Certificate, bound: float) -> str:
    """Say which budget failed, and what it would take; nothing if none did."""
    if not found.tested or (test := found.tested[-1]).certified:
        return ""
    failed = f"{test.budget} loses {test.loss:.3f}, p {p_value(test.p)}"
    if found.needed is None:
        return f"{failed}; not below {bound:g}" if test.loss >= bound else failed
    return f"{failed}; about {found.needed:,} examples are needed"


def certificates_note(found: RecordsCertificate) -> str:
    """Return what the numbers of certificates mean, in a line or two."""
    tests = {True: "binomial test", False: "Hoeffding-Bentkus bound"}
    kinds = " or ".join(tests[exact] for exact in sorted({each.exact for *_, each in found.rows}, reverse=True))
    note = f"Loss: mean of max(0, full − score). p: {kinds}. "
    note += "Budgets are tested from the largest down to the first that fails."
    if (lines := len(found.rows)) > 1:
        several = 1 - (1 - found.confidence) / lines
        note += f" The confidence is each line's own; for all {lines} lines at once use --confidence {several:.4g}."
    return note


def p_value(p: float) -> str:
    """Return a p-value as tables and pages show it."""
    return f"{p:.4f}" if p >= _LEAST_P else f"<{_LEAST_P:.4f}"
