"""Jobs side by side on the cores of one machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

T = TypeVar("T")

#: A job gets a function to call after each step of its work.
Job = Callable[[Callable[[], None]], T]


class _StoppedError(Exception):
    """Another job has failed, so this one's result is not wanted any more."""


#: Thread-local stop flag of the running job: `stopped` is set when nobody waits for its result any more.
_job = threading.local()


def check_wanted() -> None:
    """End the job that calls this if nobody waits for its result. For long work between two steps."""
    stopped: threading.Event | None = getattr(_job, "stopped", None)
    if stopped is not None and stopped.is_set():
        raise _StoppedError


class Workers:
    """Threads that share the cores among jobs which are too small to keep all cores busy one after another.

    PyTorch splits each operation over all cores and waits for the slowest; with operations as small as those of a
    short prompt, jobs side by side with a core each get more done. On an accelerator jobs run one after another.

    Args:
        device: where the jobs compute.
        most: how many jobs to run at once at most; default: as many as PyTorch uses cores.
    """

    def __init__(self, device: torch.device, most: int | None = None):
        self._threads = torch.get_num_threads()
        most = self._threads if most is None else min(most, self._threads)
        self.count = max(1, most) if device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="evolkv") if self.count > 1 else None

    def run(self, jobs: Sequence[Job[T]], on_step: Callable[[], None] | None = None) -> list[T]:
        """Run jobs to their end.

        Args:
            jobs: what to do.
            on_step: called, in the calling thread, for each step that a job reports.

        Returns:
            The jobs' results, in their order.

        Raises:
            Exception: what the first job to fail raised; the others end at their next step or `check_wanted`.
        """
        report = on_step or (lambda: None)
        if self._pool is None or len(jobs) < 2:
            return [job(report) for job in jobs]
        events: SimpleQueue[Future[T] | None] = SimpleQueue()
        stopped = threading.Event()

        def step() -> None:
            check_wanted()
            events.put(None)

        def work(job: Job[T]) -> T:
            # Part of this setting belongs to the thread and part to the process, so it is made for every job.
            torch.set_num_threads(max(1, self._threads // min(self.count, len(jobs))))
            _job.stopped = stopped
            return job(step)

        futures = [self._pool.submit(work, job) for job in jobs]
        for future in futures:
            future.add_done_callback(events.put)
        unfinished = len(futures)
        try:
            while unfinished:
                event = events.get()
                if event is None:
                    report()
                else:
                    event.result()
                    unfinished -= 1
        except BaseException:
            stopped.set()
            for future in futures:
                future.cancel()
            raise
        finally:
            torch.set_num_threads(self._threads)
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads; a job that was interrupted ends at its next step or `check_wanted`."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)
