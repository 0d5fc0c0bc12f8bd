"""The command line: parses, calls, prints. `main` is the program `evolkv`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; see `evolkv.cli.app.main`."""
    try:
        # The commands take a moment to import, and Ctrl-C may come in it.
        from evolkv.cli.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("evolkv: interrupted\n")
        return 130
    return run(argv)
