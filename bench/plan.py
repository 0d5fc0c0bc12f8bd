"""Hold what `evolkv plan` says against what `evolkv search` then takes: seconds and peak memory, on real settings.

    python bench/plan.py [--record NAME] [--only NAME...]

Run it on an idle machine. Each search is a program of its own; its peak is the largest resident set of the process.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from evolkv.errors import UsageError
from lib.command import Bench, run

#: What is planned and searched, by name.
SETTINGS = {
    "niah-800-layer": ["--task", "niah:context=800", "--budget", "64", "--granularity", "layer"],
    "niah-1600-head": ["--task", "niah:context=1600", "--budget", "128", "--granularity", "head"],
    "code-layer": ["--task", "code", "--budget", "128", "--granularity", "layer"],
}
EXAMPLES = 12
_COMMON = ["--selector", "snapkv", "--train", str(EXAMPLES), "--val", str(EXAMPLES), "--max-evals", "240"]


def main(bench: Bench, only: list[str] = list(SETTINGS)) -> dict[str, Any]:  # noqa: B006
    """Plan and search.

    Args:
        only: names of the settings.
    """
    if unknown := [name for name in only if name not in SETTINGS]:
        raise UsageError(f"--only {' '.join(unknown)}: choose among {', '.join(SETTINGS)}")
    return {"n": EXAMPLES, "rows": [_compared(bench, name) for name in only]}


def _compared(bench: Bench, name: str) -> dict[str, Any]:
    common = [*_COMMON, "--dtype", bench.dtype, "--seed", str(bench.seed)]
    common += ["--device", bench.device] if bench.device else []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        settings = [*SETTINGS[name], *common, "--storage", "none", "--out", f"{folder}/p.json", "--json", str(result)]
        log = Path(folder) / "log.jsonl"
        _peak(["plan", bench.model, *settings], log)
        plan = json.loads(result.read_text())
        peak = _peak(["--log-json", "search", bench.model, *settings], log)
        seconds = json.loads(result.read_text())["seconds"]
        took = _stages(log)
    row = {
        "setting": name,
        "planned_seconds": plan["seconds"]["total"],
        "seconds": seconds,
        "planned_bytes": plan["bytes"]["peak"],
        "bytes": peak,
        "stages": plan["seconds"],
        "took": took,
        "parts": plan["bytes"],
    }
    row["time_ratio"] = row["planned_seconds"] / row["seconds"]
    row["memory_ratio"] = row["planned_bytes"] / row["bytes"]
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def _peak(command: list[str], log: Path) -> int:
    """Run a command of the program with its log in a file, and return the bytes of its largest resident set."""
    program = [sys.executable, "-m", "evolkv", *command]
    to_log = (os.POSIX_SPAWN_OPEN, 2, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    process = os.posix_spawn(sys.executable, program, dict(os.environ), file_actions=[to_log])
    _, status, usage = os.wait4(process, 0)
    if status:
        sys.exit(f"{log.read_text()}evolkv {' '.join(command)} failed")
    return usage.ru_maxrss * 1024


def _stages(log: Path) -> dict[str, float]:
    """Return the seconds from the end of one stage of a search to the end of the next, from its log.

    What is computed between two stages, such as LU-KV's calibration, counts to the later one.
    """
    events = [json.loads(line) for line in log.read_text().splitlines()]

    def at(event: dict[str, Any]) -> float:
        return datetime.fromisoformat(event["time"]).timestamp()

    before, seconds = at(events[0]), {}
    for stage in dict.fromkeys(event["stage"] for event in events if event["event"] == "progress"):
        end = max(at(event) for event in events if event.get("stage") == stage)
        seconds[stage] = round(end - before, 1)
        before = end
    return seconds


if __name__ == "__main__":
    run(__doc__, main)
