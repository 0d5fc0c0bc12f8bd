"""A block of lines at the end of a terminal that is drawn again and again, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.file_proxy import FileProxy
from rich.segment import ControlType, Segment

from evolkv.cli.glyphs import Line

#: From columns and rows of the terminal that may be used to that many lines of so many cells, or fewer.
Picture = Callable[[int, int], list[Line]]

_DRAWS_PER_SECOND = 8
#: Without news it is drawn again for its clock.
_IDLE_SECONDS = 1.0
#: Rich knows no code for the rest of the screen.
ERASE_REST_OF_LINE, ERASE_REST = "\x1b[K", "\x1b[J"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class View(RenderHook):
    """Shows a picture below everything else on a terminal, until it is stopped.

    `rich.live.Live` loses its place when the terminal becomes narrower, because what it has drawn is then wrapped.
    Here the cursor waits in front of the first line: terminals keep it there, so all that is below is the picture's.
    Lines are overwritten and never blanked first, which is what flickers.

    A thread draws it, at most eight times a second, so that a clock goes on and a resized terminal is put in order
    while the program is busy. What is printed meanwhile goes above the picture.
    """

    def __init__(self, console: Console, picture: Picture):
        self._console = console
        self._picture = picture
        self._frame = _frame([])
        self._size = console.size
        self._drawn = 0.0
        self._lock = threading.RLock()
        self._changed, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="evolkv-view", daemon=True)
        self._replaced: dict[str, tuple[FileProxy, TextIO]] = {}
        self._suspends = False

    def __enter__(self) -> View:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Draw it."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            with contextlib.suppress(AttributeError, ValueError):
                if stream.isatty() and not isinstance(stream, FileProxy):
                    self._replaced[name] = (FileProxy(self._console, stream), stream)
                    setattr(sys, name, self._replaced[name][0])
        self._console.push_render_hook(self)
        self._take_suspension()
        try:
            self.draw()
            self._thread.start()
        except BaseException:
            self.stop()
            raise

    def update(self) -> None:
        """Draw it again soon. Costs nothing."""
        self._changed.set()

    def stop(self) -> None:
        """Erase it, and leave the terminal as it was."""
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
            self._give_suspension_back()
            self._console.pop_render_hook()
            for name, (proxy, stream) in self._replaced.items():
                if getattr(sys, name) is proxy:
                    setattr(sys, name, stream)
            self._erase()
        if self._thread.is_alive():
            self._thread.join(timeout=1)

    def draw(self) -> None:
        """Draw it now, unless it is stopped or the program is in the background."""
        with self._lock:
            if self._ended.is_set() or not self._in_foreground():
                return
            self._changed.clear()
            self._drawn, self._size = time.monotonic(), self._console.size
            columns, rows = self._size
            # A line that fills the last column, or a picture that fills the last row, may scroll the terminal.
            self._frame = _frame(self._picture(max(1, columns - 1), max(1, rows - 1)))
            # A terminal that is gone is no reason to end the work.
            with contextlib.suppress(OSError, ValueError):
                self._console.print(self._frame, end="", crop=False)

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Put what is printed above the picture."""
        if any(isinstance(item, _Drawing) for item in renderables) or not self._in_foreground():
            return renderables
        return [_codes("\r" + ERASE_REST), *renderables, self._frame]

    def _run(self) -> None:
        while not self._ended.wait(1 / _DRAWS_PER_SECOND):
            idle = time.monotonic() - self._drawn
            if self._changed.is_set() or idle >= _IDLE_SECONDS or self._console.size != self._size:
                self.draw()

    def _erase(self) -> None:
        if self._in_foreground():
            with contextlib.suppress(OSError, ValueError):
                self._console.print(_codes("\r" + ERASE_REST + SHOW_CURSOR), end="", crop=False)

    def _in_foreground(self) -> bool:
        """Return True if the program is in the foreground, so that it may draw."""
        try:
            return os.tcgetpgrp(self._console.file.fileno()) == os.getpgrp()
        except (AttributeError, OSError, ValueError):
            return True

    def _take_suspension(self) -> None:
        """Have Ctrl-Z hand back a clean terminal."""
        self._suspends = (
            hasattr(signal, "SIGTSTP")
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL
        )
        if self._suspends:
            signal.signal(signal.SIGTSTP, self._suspend)

    def _give_suspension_back(self) -> None:
        if self._suspends:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        with self._lock:
            self._erase()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            signal.signal(number, self._suspend)
        self.update()


class _Drawing:
    """A frame or codes that the view itself writes."""

    def __init__(self, segments: list[Segment]):
        self._segments = segments

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        yield from self._segments


def _codes(codes: str) -> _Drawing:
    return _Drawing([_control(codes)])


def _frame(lines: list[Line]) -> _Drawing:
    """Lines over what was there before, the cursor back in front of the first."""
    segments = [_control(HIDE_CURSOR + "\r")]
    for index, line in enumerate(lines):
        segments += [*([Segment.line()] if index else []), *line, _control(ERASE_REST_OF_LINE)]
    up = f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""
    return _Drawing([*segments, _control(f"{ERASE_REST}\r{up}")])


def _control(codes: str) -> Segment:
    return Segment(codes, None, [(ControlType.CLEAR,)])
