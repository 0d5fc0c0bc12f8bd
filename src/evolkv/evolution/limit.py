"""The time limit of a search, with room for the choice on validation examples."""

from __future__ import annotations

import math
import time

from evolkv.errors import RunError

#: Seconds from some moment on; tests put their own here.
clock = time.perf_counter
#: By how much the time that is kept for the choice is larger than expected.
_MARGIN = 1.1
#: Passes of one row that a pass there and back takes as long as.
SLOPE_ROWS = 3


def allocations(budgets: int, balanced: bool = False) -> int:
    """Return how many allocations are scored where so many budgets choose.

    Each has two heuristics, two of the search and two to start from, and those of its neighbours expanded to it.
    Balanced scores are relative to two more.
    """
    return 6 * budgets + 2 * (budgets - 1) + 2 * balanced


class OutOfTimeError(RunError):
    """Too little time is left to read the prompts and to choose."""


class TimeLimit:
    """The time that searches share, one for each selector and budget, and what they were measured to need of it.

    Times of scoring and reading are wall-clock seconds as the search itself sees them, with all its workers. Every
    search makes at least one step, however little time is left.

    Args:
        seconds: for everything; None for no limit.
        selectors: searches of the same budgets, each with a choice of its own.
        budgets: budgets of each.
        val: validation examples.
        train: training examples, on all of which the choices are scored as well.
        balanced: whether scores are balanced; see `evolkv.evaluation.balance`.
    """

    def __init__(
        self,
        seconds: float | None,
        selectors: int = 1,
        budgets: int = 1,
        val: int = 0,
        train: int = 0,
        balanced: bool = False,
    ):
        self._end = math.inf if seconds is None else clock() + seconds
        self._budgets, self._val, self._train = budgets, val, train
        self._left, self._allocations = selectors * budgets, allocations(budgets, balanced)
        self._began: float | None = None
        self._prompt = self._row = self._step = 0.0
        #: Whether anything was computed; and whether nothing may be, so that a search comes to what is on record.
        self.computes = self.over = False

    def compute(self) -> None:
        """Say that something is to be computed, which interrupts the search if its time is over."""
        self.computes = True
        if self.over:
            raise KeyboardInterrupt

    def read(self, done: int, total: int, seconds: float) -> None:
        """Take in that so many of the training prompts were read in so many seconds.

        Raises:
            OutOfTimeError: if the rest, and the choice, cannot be done in time.
        """
        self._prompt = seconds / done
        needed = self._prompt * (total - done + self._val + self._budgets)
        now = clock()
        if now + needed > self._end:
            # What came before, such as opening the study, took its part of the limit.
            left = max(0.0, self._end - (now - seconds))
            raise OutOfTimeError(
                f"--time-limit leaves {left:.1f} s for the search, which is too short: to read {total} training and "
                f"{self._val} validation prompts takes about {seconds + needed:.1f} s, before any candidate is "
                "scored; allow more, or use a smaller --train or --val"
            )

    def scored(self, rows: int, seconds: float) -> None:
        """Take in how long a step took, which scored so many rows: one candidate on one example each."""
        self._row, self._step = seconds / rows, seconds

    def reached(self) -> bool:
        """Return True if one more step like the last would leave too little for the choice and other searches."""
        now = clock()
        if self._began is None:
            self._began = now
        selectors = math.ceil(self._left / self._budgets)
        prompts = self._val + self._budgets
        rows = selectors * self._allocations * (self._val + self._train)
        kept = _MARGIN * (prompts * self._prompt + rows * self._row)
        return now + self._step > self._began + (self._end - kept - self._began) / self._left

    @property
    def is_set(self) -> bool:
        """True if there is a limit."""
        return self._end < math.inf

    def next_search(self) -> None:
        """Begin the share of the next search."""
        self._left, self._began = max(1, self._left - 1), None
