"""Files that are written whole or not at all, and checked for before the work begins."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from evolkv import hub
from evolkv.errors import UsageError


def write_with(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Have `write` make a file, and put it at `path` only once it is complete. Missing folders are made.

    Args:
        path: where the file goes; what was there is replaced.
        write: called with the path it shall write to, which ends as `path` does.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(os.path.realpath(os.path.expanduser(path)))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
    try:
        write(partial)
        # Otherwise a power cut could leave the name and not the content.
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        if target.exists():
            # A file that others may not read stays one.
            shutil.copymode(target, partial)
        partial.replace(target)
    except OSError as error:
        if error.filename is None:
            # A disk that is full says so without a name.
            error.filename = os.fspath(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def output_path(path: str | os.PathLike[str]) -> str:
    """Return the path of an output, with ``~`` replaced by the home folder.

    Call this on what a user gave, before `pathlib` sees it: `Path` makes ``hf:/org/name`` of an address on the Hub.

    Raises:
        UsageError: it is empty, is called ``-``, or is an address on the Hub.
    """
    text = os.fspath(path)
    if not text:
        raise UsageError("the name of a file to write is empty; give a path")
    if text == "-":
        raise UsageError("'-' is no name for this file; give a path")
    if hub.is_address(text):
        raise UsageError(f"{text} is an address on the Hub, to read from; write to a file, then use push_to_hub")
    return os.path.expanduser(text)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check, without touching anything, that a file can be written at `path`; its folders may be missing.

    Raises:
        UsageError: as for `output_path`; or it is a folder or a device, or its folder cannot be made or written to.
    """
    target = Path(os.path.realpath(output_path(path)))
    if target.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file, such as {Path(path) / 'result.json'}")
    if target.exists() and not target.is_file():
        raise UsageError(f"{path} is not a regular file; give the name of a file")
    check_folder(target.parent)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Check, without touching anything, that files can be written to a folder, which may not exist yet.

    Raises:
        UsageError: part of the path is a file, or the folder cannot be made or written to.
    """
    folder = Path(os.path.realpath(os.path.expanduser(path)))
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder; give another path than {path}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"folder {folder} cannot be written to; give another path than {path}")


def check_outputs(outs: Iterable[str | os.PathLike[str]], read: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Check, without touching anything, that every file can be written: apart from the others, and from what is read.

    Raises:
        UsageError: one of `outs` cannot be written, stands among them twice, or is among the files `read`.
    """
    known = {os.path.realpath(os.path.expanduser(path)) for path in read}
    taken: set[str] = set()
    for path in outs:
        check_writable(path)
        place = os.path.realpath(os.path.expanduser(path))
        if place in known:
            raise UsageError(f"{path} would be written over, but is read by this command; give another path")
        if place in taken:
            raise UsageError(f"{path} would be written twice; give each output a file of its own")
        taken.add(place)


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write JSON values to a file; see `write_with`."""
    write_text(path, json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file; see `write_with`."""
    write_with(path, lambda partial: partial.write_bytes(text.encode()))
