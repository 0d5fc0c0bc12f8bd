"""Progress of work in stages, and its rate."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_PACE_SECONDS, _PACE_STEPS, _PACE_EVERY_SECONDS = 60.0, 3, 0.5


@dataclass(frozen=True)
class Standing:
    """Progress of work in stages at one moment.

    Args:
        stage: what is being done.
        done: steps done in this stage.
        total: steps of this stage.
        at: when this was so, in seconds of `time.monotonic`.
        rate: steps per second, or None while unknown.
        best_fitness: of a search, the highest fitness so far.
        best_score: score of the fittest candidate so far.
        generation: the latest generation.
        fitnesses: highest fitness of each generation.
        budgets: the fittest candidate so far, a row of heads per layer.
        budget: what the search aims at.
        selector: the ranking that budgets are evolved under, where a search has several.
    """

    stage: str
    done: int
    total: int
    at: float
    rate: float | None = None
    best_fitness: float | None = None
    best_score: float | None = None
    generation: int | None = None
    fitnesses: tuple[float, ...] = ()
    budgets: tuple[tuple[int, ...], ...] | None = None
    budget: int | None = None
    selector: str | None = None

    def seconds_left(self, now: float) -> float | None:
        """Return the seconds that the rest of the stage takes at this rate, or None while unknown."""
        if self.rate is None or self.done >= self.total:
            return None
        return max(0.0, (self.total - self.done) / self.rate - (now - self.at))


class Pace:
    """The rate of a stage over its last minute, or over its last few steps where these take longer."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def add(self, now: float, done: int) -> float | None:
        """Return steps per second, or None while unknown, once `done` steps are done."""
        points = self._points
        if points and done < points[-1][1]:
            points.clear()
        if len(points) > 1 and now - points[-2][0] < _PACE_EVERY_SECONDS:
            points.pop()
        points.append((now, done))
        while len(points) > _PACE_STEPS and now - points[1][0] > _PACE_SECONDS:
            points.popleft()
        (since, before), (until, after) = points[0], points[-1]
        # What is computed together is done together, in no time.
        return (after - before) / (until - since) if after > before and until - since >= _PACE_EVERY_SECONDS else None


def speed(per_second: float) -> str:
    """Return a rate for people: 3.2/s, 40.0/min, 1.5/h."""
    unit, rate = "s", per_second
    for slower in ("min", "h"):
        if rate >= 1:
            break
        unit, rate = slower, rate * 60
    return f"{rate:,.1f}/{unit}" if rate < 100 else f"{rate:,.0f}/{unit}"
