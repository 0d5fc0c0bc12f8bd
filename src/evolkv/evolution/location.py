"""The place where studies are kept: an Optuna storage, given as a URL or a path."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from evolkv.errors import StudyError

_SQLITE_MAGIC = b"SQLite format 3\0"
_JOURNAL_START = b'{"op_code":'
_JOURNAL_SUFFIXES = (".log", ".journal")
_SERVERS = ("postgresql", "mysql", "mariadb", "oracle", "mssql")
#: Seconds that SQLite waits for another program that writes to the same file.
SQLITE_PATIENCE = 20


@dataclass(frozen=True)
class Location:
    """One storage.

    Args:
        kind: "sqlite" and "journal" are local files.
        url: as Optuna takes it (a journal's is ours). It may hold a password: see `safe_url`.
        safe_url: the same without the password.
        path: of the file; None for a server.
    """

    kind: Literal["sqlite", "journal", "server"]
    url: str
    safe_url: str
    path: Path | None = None

    def __str__(self) -> str:
        return str(self.path or self.safe_url)


def locate(storage: str | os.PathLike[str]) -> Location:
    """Understand a storage as users give it.

    Args:
        storage: ``sqlite:///PATH``, ``journal:///PATH`` (a fourth slash begins an absolute path), the SQLAlchemy URL
            of a database server, or a path. A path is a journal if the file there is one or, where there is none, if
            it ends in ``.log`` or ``.journal``; else it is an SQLite file.

    Raises:
        StudyError: it is none of these.
    """
    text = os.fspath(storage)
    if "://" not in text:
        path = os.path.expanduser(text)
        if not path:
            raise StudyError(
                "the storage is empty; give the path of a file, such as study.db, or an Optuna storage URL"
            )
        kind = "journal" if _looks_like_journal(Path(path)) else "sqlite"
        text = f"{kind}:///" + path.replace("%", "%25").replace("?", "%3F")
    scheme, rest = text.split("://", 1)
    if scheme == "journal":
        path = unquote(rest.removeprefix("/"))
        if not rest.startswith("/") or not path:
            raise StudyError(
                f"storage {text!r} names no file; write journal:///study.log or journal:////folder/study.log"
            )
        return Location("journal", text, text, Path(path))
    return _locate_database(text)


def _locate_database(text: str) -> Location:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    expected = "the path of a file, sqlite:///PATH, journal:///PATH, or the URL of a PostgreSQL or MySQL database"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise StudyError(f"the storage is not a URL that SQLAlchemy understands; expected {expected}") from None
    safe = url.render_as_string(hide_password=True)
    backend = url.get_backend_name()
    if backend == "sqlite":
        if url.host or not url.database or url.database == ":memory:" or url.database.startswith("file:"):
            raise StudyError(f"storage {safe} names no file; write sqlite:///study.db or sqlite:////folder/study.db")
        return Location("sqlite", text, text, Path(url.database))
    if backend not in _SERVERS:
        raise StudyError(f"unknown kind of storage {backend!r}; expected {expected}")
    return Location("server", text, safe)


def _looks_like_journal(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        if head := file.read(len(_SQLITE_MAGIC)):
            return not head.startswith(_SQLITE_MAGIC) and (
                head.startswith(_JOURNAL_START) or path.suffix in _JOURNAL_SUFFIXES
            )
    return path.suffix in _JOURNAL_SUFFIXES


def check_file(location: Location, *, exists: bool) -> None:
    """Make sure that a local file is what it is taken for, before Optuna adds tables or lines to it.

    Args:
        location: of an SQLite file or a journal; a server passes.
        exists: whether the file has to exist and to hold something.

    Raises:
        StudyError: it is missing or something else.
    """
    path = location.path
    if path is None:
        return
    if not path.exists():
        if exists:
            raise StudyError(f"there is no file {path}; give the storage of a search, a file or an Optuna storage URL")
        return
    if not path.is_file():
        raise StudyError(f"{path} is not a regular file; give the path of an SQLite file or an Optuna journal")
    with path.open("rb") as file:
        head = file.read(len(_SQLITE_MAGIC))
    if not head:
        tables = set()
    elif location.kind == "journal":
        if not head.startswith(_JOURNAL_START) and not _JOURNAL_START.startswith(head):
            raise StudyError(f"{path} is not an Optuna journal; give another path")
        return
    else:
        if head != _SQLITE_MAGIC:
            raise StudyError(f"{path} is neither an SQLite file nor an Optuna journal; give another path")
        with contextlib.closing(sqlite3.connect(path, timeout=SQLITE_PATIENCE)) as database:
            tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and "studies" not in tables:
            raise StudyError(f"{path} is a database of another program; give another path")
    # Optuna makes this table last.
    if exists and "alembic_version" not in tables:
        raise StudyError(f"{path} is empty: no search has recorded anything in it")
