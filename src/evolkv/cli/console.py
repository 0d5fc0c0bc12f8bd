"""The output of the program: results on stdout; progress, warnings and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from evolkv.cli.standing import Pace, Standing, speed
from evolkv.report.words import duration

if TYPE_CHECKING:
    from evolkv.cli.glyphs import Line
    from evolkv.cli.live import View
    from evolkv.evolution.progress import SearchProgress

_NAME = "evolkv: "
_PLAIN_EVERY_SECONDS, _JSON_EVERY_SECONDS = 5.0, 1.0
#: Where nobody looks at the output, tables need not fit a terminal.
_PLAIN_WIDTH = 120


@dataclass
class Settings:
    """The global flags of this run of the program."""

    debug: bool = False
    quiet: bool = False
    log_json: bool = False


#: What names and texts of files may hold, and a terminal would obey, written out. Line ends and tabs stay.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class _Console(Console):
    def render_str(self, text: str, *args: Any, **kwargs: Any) -> Text:
        """Render text without control characters."""
        return super().render_str(text.translate(_CONTROLS), *args, **kwargs)

    def on_broken_pipe(self) -> None:
        """Leave it to `main`, which ends the program; rich would end it here."""
        raise BrokenPipeError


settings = Settings()
OUT = _Console(highlight=False, markup=False, emoji=False)
ERR = _Console(highlight=False, markup=False, emoji=False, stderr=True)


def prepare() -> None:
    """Make ready for a run: default settings, and output that no character can break."""
    settings.debug = settings.quiet = settings.log_json = False
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    OUT.stderr = OUT.quiet = False
    if not OUT.is_terminal and "COLUMNS" not in os.environ:
        OUT.width = _PLAIN_WIDTH


def _fill_closed_streams() -> None:
    """Give streams that the shell has closed (``>&-``) a place to write to, and take their numbers.

    Otherwise the next file that is opened would get the number, and what libraries print would end up in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def write_json(path: str | None, data: Any) -> None:
    """Write results where --json says: to a file, to standard output for ``-``, or nowhere for None."""
    if path == "-":
        sys.stdout.write(json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    elif path is not None:
        from evolkv import whole_files

        whole_files.write_json(path, data)


def keep_stdout_for_json(path: str | None) -> None:
    """Have tables go to stderr if --json is ``-``, so that standard output holds JSON alone."""
    if path == "-":
        OUT.stderr, OUT.quiet = True, settings.quiet


def say(message: str) -> None:
    """Print one line on stderr, also in quiet mode."""
    if settings.log_json:
        emit("note", message=message.removeprefix(_NAME))
    else:
        _write(" ".join(message.split()))


def note(message: str) -> None:
    """Print one line on stderr, but not in quiet mode."""
    if not settings.quiet:
        say(message)


def warn(message: str) -> None:
    """Print a warning, but not in quiet mode."""
    if settings.log_json and not settings.quiet:
        emit("warning", message=message)
    else:
        note(f"{_NAME}warning: {message}")


def fail(message: str, code: int) -> None:
    """Report the error that ends the program with this exit code."""
    if settings.log_json:
        emit("error", message=message, exit_code=code)
    else:
        say(f"{_NAME}error: {message}")


def trace(text: str) -> None:
    """Print the traceback of an error."""
    if settings.log_json:
        emit("traceback", message=text)
    else:
        _write(text.rstrip("\n"))


def emit(event: str, **fields: Any) -> None:
    """Print one line of JSON on stderr.

    Args:
        event: what kind of line it is.
        fields: what it says. Numbers that JSON has no word for become null.
    """
    known = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in fields.items()
    }
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    _write(json.dumps({"event": event, "time": now, **known}))


def _write(line: str) -> None:
    # Neither a reader that has left nor a full disk is a reason to end the work that is talked about.
    with contextlib.suppress(OSError):
        print(line.translate(_CONTROLS), file=sys.stderr, flush=True)  # noqa: T201


def show_warnings() -> None:
    """Have EvolKV's own warnings come as one line each, from now on."""
    log = logging.getLogger("evolkv")
    log.handlers[:] = [old for old in log.handlers if not isinstance(old, _OneLine)] + [_OneLine()]


def quiet_libraries() -> None:
    """Hide what libraries print by themselves."""
    if settings.debug and not settings.log_json:
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not settings.debug:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not settings.debug:
        transformers_logging.set_verbosity_error()
        return
    # Whoever reads JSON gets these warnings as JSON.
    warnings.showwarning = lambda message, *where, **more: warn(f"{message}")
    transformers_logging.disable_default_handler()
    transformers_logging.add_handler(_OneLine())


class _OneLine(logging.Handler):
    """Shows each warning of a command once: the searches under several selectors have the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a warning that is new."""
        message = record.getMessage()
        if record.levelno >= logging.WARNING and message not in self._shown:
            self._shown.add(message)
            warn(message)


def is_watched() -> bool:
    """Return True if stderr is a terminal, and a view may be drawn on it."""
    return (
        not (settings.quiet or settings.log_json)
        and ERR.is_terminal
        and not ERR.is_dumb_terminal
        and not ERR.legacy_windows
        # Colours may be forced on for what is no terminal.
        and ERR.file.isatty()
        # A view that is up puts itself in the way, and there is room for one.
        and ERR.file is sys.stderr
    )


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Say what is being done while it cannot be measured."""
    if not is_watched():
        note(what)
        yield
        return
    from evolkv.cli.glyphs import glyphs_for
    from evolkv.cli.live import View
    from evolkv.cli.watching import busy_picture

    started, glyphs = time.monotonic(), glyphs_for(ERR)
    with View(ERR, lambda columns, rows: busy_picture(what, time.monotonic() - started, columns, glyphs)):
        yield


class Progress:
    """Shows how work in stages goes on: a live view on a terminal, a line now and then elsewhere, JSON on request.

    Use it as a context manager, and call it with each step, from the thread that made it.
    """

    def __init__(self) -> None:
        self._standing: Standing | None = None
        self._paces: dict[str, Pace] = {}
        self._started = self._shown = time.monotonic()
        self._view: View | None = None

    def __enter__(self) -> Progress:
        if is_watched():
            from evolkv.cli.glyphs import glyphs_for
            from evolkv.cli.live import View
            from evolkv.cli.watching import progress_picture

            glyphs = glyphs_for(ERR)

            def picture(columns: int, rows: int) -> list[Line]:
                now = time.monotonic()
                return progress_picture(self._standing, now, now - self._started, columns, rows, glyphs)

            self._view = View(ERR, picture)
            self._view.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._view is not None:
            self._view.stop()

    def of_search(self, step: SearchProgress) -> None:
        """Show a step of a search."""
        self(step.stage, step.done, step.total, step)

    def __call__(self, stage: str, done: int, total: int, found: SearchProgress | None = None) -> None:
        """Show a step.

        Args:
            stage: what is being done.
            done: steps done in this stage.
            total: steps of this stage.
            found: what a search has come to. It stays on show when later steps, of another stage, say nothing about it.
                Another budget or selector means another search.
        """
        if settings.quiet:
            return
        now = time.monotonic()
        last = self._standing or Standing(stage, 0, total, now)
        generation, budget, selector = (
            (None, None, None) if found is None else (found.generation, found.budget, found.selector)
        )
        is_other = generation is not None and (generation < (last.generation or 0) or budget != (last.budget or budget))
        is_other = is_other or selector != last.selector
        if is_other:
            last = Standing(stage, 0, total, now)
        is_new = is_other or stage not in self._paces
        rate = self._paces.setdefault(stage, Pace()).add(now, done)
        step = replace(last, stage=stage, done=done, total=total, at=now, rate=rate, selector=selector)
        if found is not None and (generation is not None or found.score is not None):
            rows = last.budgets if found.budgets is None else tuple(map(tuple, found.budgets))
            step = replace(step, best_fitness=found.best, best_score=found.score, budgets=rows, budget=budget)
        bred = found if generation is not None and generation != last.generation else None
        if bred is not None:
            known = (bred.fitness,) if bred.fitness is not None and math.isfinite(bred.fitness) else ()
            step = replace(step, generation=generation, fitnesses=last.fitnesses + known)
        self._standing = step
        if self._view is not None:
            self._view.update()
            return
        if settings.log_json and bred is not None:
            emit("generation", **_fields(step, now), fitness=bred.fitness, budgets=bred.budgets)
        every = _JSON_EVERY_SECONDS if settings.log_json else _PLAIN_EVERY_SECONDS
        if is_new or done >= total or now - self._shown >= every:
            self._shown = now
            if settings.log_json:
                emit("progress", **_fields(step, now))
            else:
                say(_plain(step, now))


def _fields(step: Standing, now: float) -> dict[str, Any]:
    """Return a step as fields for JSON."""
    left = step.seconds_left(now)
    return {
        "stage": step.stage,
        "done": step.done,
        "total": step.total,
        "rate": None if step.rate is None else round(step.rate, 4),
        "seconds_left": None if left is None else round(left, 1),
        "best_fitness": step.best_fitness,
        "best_score": step.best_score,
        "generation": step.generation,
        "budget": step.budget,
        "selector": step.selector,
    }


def _plain(step: Standing, now: float) -> str:
    """Return a step as a line of text."""
    parts = [f"{step.stage} {step.done}/{step.total}"]
    # What comes after a search goes on without changing what it found.
    if step.stage != "search":
        step = replace(step, budget=None, best_score=None, best_fitness=None)
    if step.selector is not None:
        parts.append(f"under {step.selector}")
    if step.budget is not None:
        parts.append(f"budget {step.budget}")
    if step.rate is not None:
        parts.append(speed(step.rate))
    if step.best_score is not None:
        parts.append(f"score {step.best_score:.4f}")
    if step.best_fitness is not None:
        parts.append(f"fitness {step.best_fitness:.4f}")
    left = step.seconds_left(now)
    if left is not None:
        parts.append(f"{duration(left)} left")
    return ", ".join(parts)
