"""The command line: parses, calls, prints. `main` is the program `evolkv`."""

from __future__ import annotations

from evolkv.cli.app import main

__all__ = ["main"]
