"""What the program shows: results on stdout; progress, warnings and errors on stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console

_PLAIN_EVERY_SECONDS = 5.0
#: Where nobody looks at the output, tables need not fit a terminal.
_PLAIN_WIDTH = 120


@dataclass
class Settings:
    """The global flags of this run of the program."""

    debug: bool = False
    quiet: bool = False


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `main`, which ends the program; rich would end it here."""
        raise BrokenPipeError


settings = Settings()
OUT = _Console(highlight=False, markup=False, emoji=False)
ERR = _Console(highlight=False, markup=False, emoji=False, stderr=True)


def prepare() -> None:
    """Make ready for a run: default settings, and output that no character can break."""
    settings.debug = settings.quiet = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not OUT.is_terminal and "COLUMNS" not in os.environ:
        OUT.width = _PLAIN_WIDTH


def say(message: str) -> None:
    """One line on stderr, also in quiet mode."""
    with contextlib.suppress(BrokenPipeError):
        print(" ".join(message.split()), file=sys.stderr, flush=True)  # noqa: T201


def note(message: str) -> None:
    """One line on stderr, but not in quiet mode."""
    if not settings.quiet:
        say(message)


def quiet_libraries() -> None:
    """Hide what libraries print by themselves; EvolKV's own warnings come as one line each."""
    handler = _OneLine()
    log = logging.getLogger("evolkv")
    log.handlers[:] = [old for old in log.handlers if not isinstance(old, _OneLine)] + [handler]
    if settings.debug:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


class _OneLine(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Show a warning."""
        if record.levelno >= logging.WARNING:
            note(f"evolkv: warning: {record.getMessage()}")


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Say what is being done while it cannot be measured."""
    if settings.quiet:
        yield
    elif ERR.is_terminal:
        with ERR.status(what):
            yield
    else:
        say(what)
        yield


class Progress:
    """Shows how work in stages goes on: a bar on a terminal, a line now and then elsewhere.

    Use it as a context manager, and call it with each step.
    """

    def __init__(self) -> None:
        self._stage: str | None = None
        self._started = self._shown = 0.0
        self._first = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if not settings.quiet and ERR.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description:<10}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                TimeRemainingColumn(),
                console=ERR,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Show a step.

        Args:
            stage: what is being done.
            done: steps done in this stage.
            total: steps of this stage.
            detail: more to show, such as the best score so far.
        """
        if settings.quiet:
            return
        now = time.monotonic()
        is_new = stage != self._stage
        if is_new:
            self._stage, self._started, self._first = stage, now, done
        elapsed = now - self._started
        rate = (done - self._first) / elapsed if done > self._first and elapsed > 0 else 0.0
        parts = [f"{rate:.1f}/s"] if rate else []
        parts += [detail] if detail else []
        if self._bar is not None:
            if is_new:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(stage, total=total, detail="")
            self._bar.update(self._task, completed=done, total=total, detail="  ".join(parts))
        elif is_new or done >= total or now - self._shown >= _PLAIN_EVERY_SECONDS:
            self._shown = now
            if rate and done < total:
                parts.append(f"{duration((total - done) / rate)} left")
            say(", ".join([f"{stage} {done}/{total}", *parts]))


def duration(seconds: float) -> str:
    """A time span for people: 42 s, 3 min 05 s, 1 h 02 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def mebibytes(count: float) -> str:
    """A number of bytes in MiB."""
    size = count / 2**20
    return f"{size:,.2f}" if size < 10 else f"{size:,.1f}"
