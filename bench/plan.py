"""Hold what `evolkv plan` says against what `evolkv search` then takes: seconds and peak memory, on real settings.

    python bench/plan.py [--record NAME] [--only NAME...]

Run it on an idle machine. Each search is a program of its own; its peak is the largest resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from lib.common import machine, versions
from lib.records import about_this_run, check_name, write

#: What is planned and searched, by name.
SETTINGS = {
    "niah-800-layer": ["--task", "niah:context=800", "--budget", "64", "--granularity", "layer"],
    "niah-1600-head": ["--task", "niah:context=1600", "--budget", "128", "--granularity", "head"],
    "code-layer": ["--task", "code", "--budget", "128", "--granularity", "layer"],
}
_COMMON = ["--selector", "snapkv", "--dtype", "float32", "--train", "12", "--val", "12", "--max-evals", "240"]


def main() -> None:
    """Plan and search."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--record", metavar="NAME", help="bench/records/NAME.json is written")
    options.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    options.add_argument("--model", default="smollm2-135m")
    arguments = options.parse_args()
    if arguments.record:
        check_name(arguments.record)
    rows = [_compared(arguments.model, name) for name in arguments.only]
    if arguments.record:
        about = {"benchmark": "plan", **about_this_run(), "machine": machine(), "versions": versions()}
        write(arguments.record, {**about, "model": arguments.model, "rows": rows})


def _compared(model: str, name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        settings = [*SETTINGS[name], *_COMMON, "--storage", "none", "--out", f"{folder}/p.json", "--json", str(result)]
        _peak(["plan", model, *settings])
        plan = json.loads(result.read_text())
        peak = _peak(["search", model, *settings])
        seconds = json.loads(result.read_text())["seconds"]
    row = {
        "setting": name,
        "planned_seconds": plan["seconds"]["total"],
        "seconds": seconds,
        "planned_bytes": plan["bytes"]["peak"],
        "bytes": peak,
        "stages": plan["seconds"],
        "parts": plan["bytes"],
    }
    row["time_ratio"] = row["planned_seconds"] / row["seconds"]
    row["memory_ratio"] = row["planned_bytes"] / row["bytes"]
    print(json.dumps(row, indent=1), flush=True)
    return row


def _peak(command: list[str]) -> int:
    """Run a command of the program, and return the bytes of its largest resident set."""
    process = os.posix_spawn(sys.executable, [sys.executable, "-m", "evolkv", *command], dict(os.environ))
    _, status, usage = os.wait4(process, 0)
    if status:
        sys.exit(f"evolkv {' '.join(command)} failed")
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
