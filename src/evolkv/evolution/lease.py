"""A claim on a study in a database server, where no file can be locked."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import psutil

from evolkv.claims import ClaimedError, this_process

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

#: Study attribute that holds a `Lease`.
LEASE = "evolkv_lease"


class Lease:
    """The right to write to a study on a database server, held by one process at a time.

    A study attribute says who holds it and when it was last seen; a thread renews it. It is void once it has not been
    renewed for `seconds`, or at once where its process is gone from this very machine.

    Args:
        storage: an Optuna storage.
        study_id: of the study.
        seconds: how long a lease lasts unless renewed. It is renewed four times as often.
        settle: how long to wait before looking whether another process took it at the same moment.

    Raises:
        ClaimedError: another process has it.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study_id: int,
        *,
        seconds: float = 60.0,
        settle: float = 1.0,
    ):
        self._storage, self._study_id = storage, study_id
        self._seconds = seconds
        self._mine = {**this_process(), "id": uuid.uuid4().hex, "started": psutil.Process().create_time()}
        self._lost: dict[str, Any] | None = None
        held = self._read()
        if held and self._is_alive(held):
            raise ClaimedError(held)
        self._write()
        # Whoever wrote last has it, and both will see that.
        time.sleep(settle)
        held = self._read()
        if held.get("id") != self._mine["id"]:
            raise ClaimedError(held)
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
            # Another process may have the same number by now.
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
            # A server may be away for a moment. If it stays away, the next write fails.
            with contextlib.suppress(Exception):
                self._renew()
        self._storage.remove_session()

    def check(self) -> None:
        """Raise ClaimedError if another process has taken the lease, as it may after a standstill of this one."""
        if time.time() - self._seen > self._seconds / 2:
            self._renew()
        if self._lost is not None:
            raise ClaimedError(self._lost)

    def release(self) -> None:
        """Give it up."""
        self._over.set()
        self._thread.join(5)
        # If the server is gone, the lease runs out by itself.
        with contextlib.suppress(Exception):
            if self._read().get("id") == self._mine["id"]:
                self._storage.set_study_user_attr(self._study_id, LEASE, None)
