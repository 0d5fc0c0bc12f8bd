"""Optuna storages, opened so that two processes can use one, and a killed one leaves it sound."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from evolkv.errors import StudyError
from evolkv.evolution.failures import causes, root_cause
from evolkv.evolution.location import SQLITE_PATIENCE, Location

# Optuna and SQLAlchemy are imported where they are used: only a search that records needs them, and they take most
# of a second.
if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def open_storage(location: Location, *, create: bool) -> BaseStorage:
    """Open a storage with Optuna; see `reporting` for what it raises.

    Args:
        location: which one.
        create: whether to make what is missing (the file, the tables).
    """
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    # Optuna announces new studies on stderr; what matters reaches the user as an exception.
    if optuna.logging.get_verbosity() < optuna.logging.ERROR:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Broken connections too: without a handler Python prints their tracebacks.
    if not logging.getLogger("sqlalchemy").handlers:
        logging.getLogger("sqlalchemy").addHandler(logging.NullHandler())
    if location.kind == "journal":
        path = os.path.realpath(cast(Path, location.path))
        try:
            return JournalStorage(JournalFileBackend(path, lock_obj=cast(Any, _AppendLock(path))))
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise StudyError(
                f"{location} is damaged or not an Optuna journal ({root_cause(error)}); restore a copy of it"
            ) from error
    # Optuna formats the URL, as a template.
    url = location.url.replace("{", "{{").replace("}", "}}")
    options: dict[str, Any] = (
        {"connect_args": {"timeout": SQLITE_PATIENCE}} if location.kind == "sqlite" else {"pool_pre_ping": True}
    )
    for _ in range(20):
        try:
            return RDBStorage(url, engine_kwargs=options, skip_table_creation=not create)
        except Exception as error:
            # Two processes may make the tables of a new database at the same time. Then the second attempt finds them.
            if not create or not _is_collision(error):
                raise
            time.sleep(random.uniform(0.05, 0.3))
    return RDBStorage(url, engine_kwargs=options)


def _is_collision(error: Exception) -> bool:
    return any(type(link).__name__ == "IntegrityError" or "already exists" in str(link) for link in causes(error))


def close_storage(storage: BaseStorage) -> None:
    """Close the connections and files of a storage."""
    storage.remove_session()
    engine = getattr(storage, "engine", None)
    if engine is not None:
        engine.dispose()


class _AppendLock:
    """Lets one process at a time append to a journal file, and mends the file before it does.

    Optuna's own lock is a link beside the file. It outlives a killed process and then holds everybody up for half a
    minute, so the file itself is locked too, which ends with the process: whoever holds that lock knows that a link
    of ours is a dead one.
    """

    def __init__(self, path: str):
        from optuna.storages.journal import JournalFileSymlinkLock

        folder, name = os.path.split(path)
        # The dots lead to the same file, and tell our links from those of other programs.
        self._target = os.path.join(folder, ".", ".", name)
        self._path = path
        self._link = JournalFileSymlinkLock(self._target)
        self._held = contextlib.ExitStack()

    def acquire(self) -> bool:
        # Not on Windows, where Optuna's links need special rights as well.
        import fcntl

        with contextlib.ExitStack() as undo:
            file = undo.enter_context(open(self._path, "r+b"))
            fcntl.flock(file, fcntl.LOCK_EX)
            link = self._path + ".lock"
            # Optuna renames a link before it removes it.
            for dead in (link, *glob.glob(f"{glob.escape(link)}*.rename")):
                with contextlib.suppress(OSError):
                    if os.readlink(dead) == self._target:
                        os.unlink(dead)
            self._link.acquire()
            undo.callback(self._link.release)
            _mend_journal(file)
            self._held = undo.pop_all()
        return True

    def release(self) -> None:
        self._held.close()


def _mend_journal(file: BinaryIO) -> None:
    """Cut off a last line that a killed process or a full disk left unfinished: the next would be glued to it."""
    end = file.seek(0, os.SEEK_END)
    if not end:
        return
    file.seek(end - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
