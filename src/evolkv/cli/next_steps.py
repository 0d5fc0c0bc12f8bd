"""Suggestions at the end of a command: what to do next, as commands to paste."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterable

from evolkv.cli import console


def suggest(steps: Iterable[tuple[str, str]]) -> None:
    """Print commands, each under what it is for."""
    console.OUT.print("\nTry next:")
    for purpose, command in steps:
        console.OUT.print(f"  # {purpose}\n  {command}", soft_wrap=True)


def as_command(words: Iterable[object]) -> str:
    """Return a command of this program that works when pasted, from its words after the program's name."""
    return shlex.join([program_name(), *map(str, words)])


def program_name() -> str:
    """Return the name of this program if the shell finds it, else its path."""
    called = sys.argv[0]
    found = shutil.which("evolkv")
    if os.path.basename(called) != "evolkv" or (found and os.path.exists(called) and os.path.samefile(found, called)):
        return "evolkv"
    return os.path.relpath(called)
