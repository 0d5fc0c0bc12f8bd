"""Claims: the right to write to something, held by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class ClaimedError(Exception):
    """Another process holds the claim.

    Args:
        owner: what that process said of itself, as `this_process` does; may be empty.
    """

    def __init__(self, owner: Mapping[str, Any]):
        known = all(key in owner for key in ("pid", "host", "since"))
        super().__init__(
            f"process {owner['pid']} on {owner['host']} since {owner['since']}" if known else "another process"
        )


def this_process() -> dict[str, Any]:
    """Return who this process is, for others to read."""
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"pid": os.getpid(), "host": platform.node(), "since": since}


class FileClaim:
    """A claim on a local file, by a lock file beside it.

    The operating system ends it with the process, however that ends.

    Args:
        path: of the lock file, in a folder that exists.

    Raises:
        ClaimedError: another process has it.
        OSError: no lock file can be made there.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lock = FileLock(path, thread_local=False)
        try:
            # Long enough to begin anew where the one before us has just removed the file.
            self._lock.acquire(timeout=0.3)
        except Timeout:
            if not path.exists():
                raise PermissionError(errno.EACCES, f"no lock file can be made beside it, as {path.name}") from None
            raise ClaimedError(self._read()) from None
        try:
            path.write_text(json.dumps(this_process()))
        except BaseException:
            self.release()
            raise

    def _read(self) -> dict[str, Any]:
        try:
            owner = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def check(self) -> None:
        """Do nothing: nobody can take a lock of the operating system away."""

    def release(self) -> None:
        """Give the claim up, and remove the lock file.

        Safe while the lock is held: one who opened the file before finds, once it has the lock, that the file is
        gone from its folder, and begins anew. A killed process leaves its file to the next one.
        """
        with contextlib.suppress(OSError):
            self._path.unlink()
        self._lock.release()
