"""Where studies are kept: Optuna storages by URL or path, who may write to one, and its failures in plain words."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import platform
import random
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast
from urllib.parse import unquote

import psutil
from filelock import FileLock, Timeout

from evolkv.errors import EvolKVError, RunError, StudyError

# Optuna and SQLAlchemy are imported where they are used: only a search that records needs them, and they take most
# of a second.
if TYPE_CHECKING:
    from optuna.storages import BaseStorage

_SQLITE_MAGIC = b"SQLite format 3\0"
_JOURNAL_START = b'{"op_code":'
_JOURNAL_SUFFIXES = (".log", ".journal")
_SERVERS = ("postgresql", "mysql", "mariadb", "oracle", "mssql")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Seconds that SQLite waits for another program that writes to the same file.
_PATIENCE = 20
#: Study attribute that holds a `Lease`.
LEASE = "evolkv_lease"


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
        with contextlib.closing(sqlite3.connect(path, timeout=_PATIENCE)) as database:
            tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and "studies" not in tables:
            raise StudyError(f"{path} is a database of another program; give another path")
    # The last one that Optuna makes.
    if exists and "alembic_version" not in tables:
        raise StudyError(f"{path} is empty: no search has recorded anything in it")


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
                f"{location} is damaged or not an Optuna journal ({_one_line(error)}); restore a copy of it"
            ) from error
    # Optuna formats the URL, as a template.
    url = location.url.replace("{", "{{").replace("}", "}}")
    options: dict[str, Any] = (
        {"connect_args": {"timeout": _PATIENCE}} if location.kind == "sqlite" else {"pool_pre_ping": True}
    )
    for _ in range(20):
        try:
            return RDBStorage(url, engine_kwargs=options, skip_table_creation=not create)
        except Exception as error:
            # Two processes make the tables of one new database at the same time: both shall have them.
            if not create or not _is_collision(error):
                raise
            time.sleep(random.uniform(0.05, 0.3))
    return RDBStorage(url, engine_kwargs=options)


def _is_collision(error: Exception) -> bool:
    return any(type(link).__name__ == "IntegrityError" or "already exists" in str(link) for link in _chain(error))


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


def _owner() -> dict[str, Any]:
    """Who this process is, for others to read."""
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"pid": os.getpid(), "host": platform.node(), "since": since}


def _in_use(location: Location, name: str, owner: Mapping[str, Any]) -> StudyError:
    who = f"process {owner['pid']} on {owner['host']} since {owner['since']}" if owner else "another process"
    return StudyError(
        f"study {name!r} in {location} is in use by {who}; wait until it ends, or give another --study or --storage"
    )


class FileClaim:
    """The right to write to a study in a local file, held by one process at a time.

    The operating system ends it with the process, however that ends.

    Args:
        location: of the file, whose folder is made if it is missing.
        name: of the study; others in the same file are free.

    Raises:
        StudyError: another process has it.
        OSError: there can be no lock file.
    """

    def __init__(self, location: Location, name: str):
        storage = Path(os.path.realpath(cast(Path, location.path)))
        storage.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        self._path = storage.with_name(f"{storage.name}.{digest}.lock")
        self._lock = FileLock(self._path, thread_local=False)
        try:
            # Long enough to begin anew where the one before us has just removed the file.
            self._lock.acquire(timeout=0.3)
        except Timeout:
            raise _in_use(location, name, self._read()) from None
        try:
            self._path.write_text(json.dumps(_owner()))
        except BaseException:
            self.release()
            raise

    def _read(self) -> dict[str, Any]:
        try:
            owner = json.loads(self._path.read_text())
            return {key: owner[key] for key in ("pid", "host", "since")}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def check(self) -> None:
        """Nobody can take a lock of the operating system away."""

    def release(self) -> None:
        """Give it up, and remove the lock file.

        Safe while the lock is held: one who opened the file before finds, once it has the lock, that the file is
        gone from its folder, and begins anew. A killed process leaves its file to the next one.
        """
        with contextlib.suppress(OSError):
            self._path.unlink()
        self._lock.release()


class Lease:
    """The right to write to a study on a database server, held by one process at a time.

    A study attribute says who holds it and when it was last seen; a thread renews it. It is void once it has not been
    renewed for `seconds`, or at once where its process is gone from this very machine.

    Args:
        storage: an Optuna storage.
        study_id: of the study.
        location: of the storage, for messages.
        name: of the study, for messages.
        seconds: how long a lease lasts unless renewed. It is renewed four times as often.
        settle: how long to wait before looking whether another process took it at the same moment.

    Raises:
        StudyError: another process has it.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study_id: int,
        location: Location,
        name: str,
        *,
        seconds: float = 60.0,
        settle: float = 1.0,
    ):
        self._storage, self._study_id, self._location, self._name = storage, study_id, location, name
        self._seconds = seconds
        self._mine = {**_owner(), "id": uuid.uuid4().hex, "started": psutil.Process().create_time()}
        self._lost: dict[str, Any] | None = None
        held = self._read()
        if held and self._is_alive(held):
            raise _in_use(location, name, held)
        self._write()
        # Whoever wrote last has it, and both will see that.
        time.sleep(settle)
        held = self._read()
        if held.get("id") != self._mine["id"]:
            raise _in_use(location, name, held)
        self._one_at_a_time = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="evolkv-lease", daemon=True)
        self._thread.start()

    def _read(self) -> dict[str, Any]:
        return self._storage.get_study_user_attrs(self._study_id).get(LEASE) or {}

    def _write(self) -> None:
        now = time.time()
        self._storage.set_study_user_attr(self._study_id, LEASE, {**self._mine, "seen": now})
        self._seen = now

    def _is_alive(self, held: Mapping[str, Any]) -> bool:
        if time.time() - held["seen"] > self._seconds:
            return False
        if held["host"] != self._mine["host"]:
            return True
        try:
            # Another process may have got the number since.
            return psutil.Process(held["pid"]).create_time() == held["started"]
        except psutil.NoSuchProcess:
            return False

    def _renew(self) -> None:
        with self._one_at_a_time:
            if self._lost is None:
                held = self._read()
                if held.get("id") == self._mine["id"]:
                    self._write()
                else:
                    self._lost = held

    def _keep(self) -> None:
        while not self._over.wait(self._seconds / 4) and self._lost is None:
            # A server that is away for a moment is none of our business: writing to it will tell.
            with contextlib.suppress(Exception):
                self._renew()
        self._storage.remove_session()

    def check(self) -> None:
        """Raise StudyError if another process has taken the lease, which it may after a long standstill of this one."""
        if time.time() - self._seen > self._seconds / 2:
            self._renew()
        if self._lost is not None:
            raise _in_use(self._location, self._name, self._lost)

    def release(self) -> None:
        """Give it up."""
        self._over.set()
        self._thread.join(5)
        # Where the server is gone, so will be the lease.
        with contextlib.suppress(Exception):
            if self._read().get("id") == self._mine["id"]:
                self._storage.set_study_user_attr(self._study_id, LEASE, None)


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


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, from the surface down."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _explained(error: Exception, location: Location, doing: str) -> EvolKVError:
    for link in _chain(error):
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
    reason = _one_line(error)
    if "optuna storage upgrade" in reason or "pip install -U optuna" in reason:
        return StudyError(f"storage {location} was made by another version of Optuna: {reason}")
    if location.path is not None:
        return RunError(f"{location} cannot be {doing}: {reason}")
    if doing == "read" and "version_info" in reason:
        return StudyError(f"storage {location} is empty: no search has recorded anything in it")
    return RunError(f"storage {location} cannot be {doing}: {reason}; check the server, its address and your rights")


def _one_line(error: BaseException) -> str:
    """What an error came from."""
    *_, root = _chain(error)
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
