"""This tree against another revision: are results the same, bit for bit, and is anything slower?

    python bench/against.py --before REV [--pairs 4] [--record NAME]

The other revision is checked out into a temporary git worktree. Either tree then does the same work in fresh processes
with equal settings (bench/lib/workload.py). First histories, profiles and evaluated rows for one seed are compared, on
a tiny random model and on SmolLM2. Then a search, an evaluation, a prompt and a decode step are timed in pairs, in CPU
seconds: the two trees take turns, and each begins every other pair. Exits with 1 if a result differs; a ratio decides
nothing.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lib.command import Bench, run
from lib.common import ratios, spread
from lib.records import ROOT


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """Check a revision out into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        if subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision]).returncode:
            raise SystemExit(f"--before {revision}: git cannot check it out; expected a commit, a branch or a tag")
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def work(tree: Path, what: str) -> dict[str, Any]:
    """Do a part of the work in a fresh process that runs a tree's sources."""
    script = Path(__file__).resolve().parent / "lib" / "workload.py"
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    done = subprocess.run([sys.executable, script, what, tree], env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the work '{what}' failed in {tree}; see its messages above")
    return json.loads(done.stdout.splitlines()[-1])


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of the results that are not equal, with the first place at which they are not."""
    found = []
    for name in before:
        if before[name] != after[name]:
            pairs = zip(before[name], after[name], strict=False)
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), "length")
            found.append(f"{name}: entry {place}")
    return found


def main(
    bench: Bench,
    before: str,
    pairs: int = 4,
    only: Literal["same", "seconds", "both"] = "both",
    models: list[str] | None = None,
) -> dict[str, Any]:
    """Compare this tree with another revision.

    Args:
        before: revision to compare with: a commit, a branch or a tag.
        pairs: times that each tree is timed, in turn.
        only: compare results, seconds, or both.
        models: what results are compared on: tiny, smollm2 or both (the default).
    """
    # So that the temporary worktree goes when the program is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    result: dict[str, Any] = {"before": before, "n": pairs}
    with worktree(before) as old:
        trees = {"before": old, "after": ROOT}
        if only != "seconds":
            wrong: list[str] = []
            for name in models or ["tiny", "smollm2"]:
                outcomes = {side: work(tree, name) for side, tree in trees.items()}
                wrong += differing(outcomes["before"], outcomes["after"])
                result.setdefault("compared", []).extend(outcomes["before"])
            result |= {"differing": wrong, "passed": not wrong}
        if only != "same":
            times: dict[str, dict[str, list[float]]] = {}
            for pair in range(pairs):
                for side in ("before", "after") if pair % 2 == 0 else ("after", "before"):
                    for name, taken in work(trees[side], "timings").items():
                        times.setdefault(name, {}).setdefault(side, []).append(taken)
            result["seconds"] = {
                name: {
                    "before": spread(both["before"]),
                    "after": spread(both["after"]),
                    "ratio": statistics.median(both["after"]) / statistics.median(both["before"]),
                    "ratio_of_pairs": ratios(both["after"], both["before"]),
                }
                for name, both in times.items()
            }
    return result


if __name__ == "__main__":
    run(__doc__, main)
