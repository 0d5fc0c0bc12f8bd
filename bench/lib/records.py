"""Keep results on record: one JSON file each, in bench/records/. Needs nothing but Python."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "bench" / "records"


def check_name(name: str) -> None:
    """Refuse a name that is no plain file name."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise SystemExit(f"--record {name!r}: expected lower-case letters, digits, '-' and '.', such as needles-aware")


def about_this_run() -> dict[str, Any]:
    """Return the commit, command and date of a result that has just been measured."""
    arguments = iter(sys.argv[1:])
    kept = [text for text in arguments if not (text in ("--record", "--json") and next(arguments, None))]
    return {
        "commit": commit(),
        "command": shlex.join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *kept]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """Return the commit that the code is of, with a plus sign if its sources have changed since."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "src"], cwd=ROOT, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()[:12] + ("+" if changed.stdout else "")


def write(name: str, record: dict[str, Any]) -> Path:
    """Put a result on record."""
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{name}.json"
    # A line for each key: short enough to look at, and a change shows where it is.
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return path


def read(name: str) -> dict[str, Any]:
    """Read a record."""
    path = RECORDS / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"there is no record {path.relative_to(ROOT)}; make it with --record {name}")
    return json.loads(path.read_text())
