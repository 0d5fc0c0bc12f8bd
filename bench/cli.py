"""Run an `evolkv` command and put its results on record.

    python bench/cli.py --record NAME demo --budget 128
    python bench/cli.py --record NAME eval smollm2-135m --task niah:context=1600 --method snapkv tova --budget 128

Everything behind these options is the command. The record holds the rows, the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lib.common import machine, versions
from lib.records import about_this_run, check_name, write


def main() -> None:
    """Run the command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--record", required=True, metavar="NAME", help="bench/records/NAME.json is written")
    options.add_argument("--timed", action="store_true", help="record the seconds too: of an idle machine only")
    options.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="demo or eval, with its options")
    arguments = options.parse_args()
    check_name(arguments.record)
    if arguments.command[:1] not in (["demo"], ["eval"]):
        options.error("expected demo or eval behind --record NAME")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        where = ["--out", folder] if arguments.command[0] == "demo" else ["--json", str(results)]
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "evolkv", *arguments.command, *where])
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(done.returncode)
        rows = json.loads(results.read_text())["rows"]
    about = {"benchmark": "cli", **about_this_run(), "machine": machine(), "versions": versions()}
    about["command"] = shlex.join(["evolkv", *arguments.command])
    about |= {key: rows[0][key] for key in ("model", "dtype", "seed", "n")}
    about |= {"seconds": seconds} if arguments.timed else {}
    write(arguments.record, {**about, "rows": rows})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
