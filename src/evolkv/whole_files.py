"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_with(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Have `write` make a file, and put it at `path` only once it is complete. Missing folders are made.

    Args:
        path: where the file goes; what was there is replaced.
        write: called with the path it shall write to, which ends as `path` does.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
    try:
        write(partial)
        # Otherwise a power cut could leave the name and not the content.
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
