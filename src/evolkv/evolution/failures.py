"""Failures of a storage, in plain words."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Iterator
from typing import Literal

from evolkv.errors import EvolKVError, RunError, StudyError
from evolkv.evolution.location import Location

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def reporting(location: Location, doing: Literal["read", "written to"]) -> Iterator[None]:
    """Turn whatever goes wrong with a storage into one line.

    Raises:
        RunError: no room, read-only, unreachable, locked by another program.
        StudyError: a damaged file, a missing driver, tables of another version.
    """
    try:
        yield
    except EvolKVError:
        raise
    except (OSError, RuntimeError, ImportError, ValueError, sqlite3.Error) as error:
        raise _explained(error, location, doing) from error
    except Exception as error:
        if type(error).__module__.startswith(("optuna.", "sqlalchemy.")):
            raise _explained(error, location, doing) from error
        raise


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what led to it, from the surface down."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _explained(error: Exception, location: Location, doing: str) -> EvolKVError:
    for link in causes(error):
        if isinstance(link, ImportError) and link.name:
            return StudyError(
                f"storage {location} needs the Python package {link.name!r}, which is not installed; "
                "install it, or name another driver in the URL (postgresql+DRIVER://…)"
            )
        if type(link).__name__ == "NoSuchModuleError":
            return StudyError(f"storage {location}: SQLAlchemy knows no such database or driver; check the URL")
        if isinstance(link, sqlite3.Error):
            return _explained_sqlite(link, location, doing)
        if isinstance(link, OSError) and location.path is not None:
            reason = (link.strerror or str(link)).lower()
            if link.errno in _NO_ROOM:
                return _no_room(location, reason)
            return _inaccessible(location, doing, reason)
    reason = root_cause(error)
    if "optuna storage upgrade" in reason or "pip install -U optuna" in reason:
        return StudyError(f"storage {location} was made by another version of Optuna: {reason}")
    if location.path is not None:
        return RunError(f"{location} cannot be {doing}: {reason}")
    if doing == "read" and "version_info" in reason:
        return StudyError(f"storage {location} is empty: no search has recorded anything in it")
    return RunError(f"storage {location} cannot be {doing}: {reason}; check the server, its address and your rights")


def root_cause(error: BaseException) -> str:
    """Return the message of what an error came from, as one line."""
    *_, root = causes(error)
    return " ".join(str(root).split()) or type(root).__name__


def _explained_sqlite(error: sqlite3.Error, location: Location, doing: str) -> EvolKVError:
    code = getattr(error, "sqlite_errorname", "")
    if code == "SQLITE_FULL":
        return _no_room(location, str(error))
    if code.startswith("SQLITE_IOERR"):
        return _no_room(location, f"{error}: a full disk, a quota or a failing disk")
    if code.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return _inaccessible(location, doing, str(error))
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return RunError(f"{location} is held by another program ({error}); close that and run the same command again")
    if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return StudyError(f"{location} is damaged ({error}); restore a copy of it, or give another --storage")
    return RunError(f"{location} cannot be {doing}: {error}")


def _no_room(location: Location, reason: str) -> RunError:
    return RunError(
        f"{location} cannot be written to ({reason}); make room and run the same command again: "
        "what was recorded before is kept"
    )


def _inaccessible(location: Location, doing: str, reason: str) -> RunError:
    return RunError(f"{location} cannot be {doing}: {reason}; give another --storage, or make this one accessible")
