"""Budgets by gradient: follow the slope of the loss through cuts that are soft at first and hard in the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv.allocators import complete
from evolkv.errors import StudyError
from evolkv.evaluation.engine import Engine
from evolkv.evolution.config import SearchConfig
from evolkv.evolution.evolve import Rotation
from evolkv.evolution.limit import SLOPE_ROWS, TimeLimit
from evolkv.evolution.progress import SearchProgress
from evolkv.evolution.result import Evaluation, as_lists
from evolkv.evolution.space import SearchSpace
from evolkv.evolution.strategies.base import bounds

if TYPE_CHECKING:
    from evolkv.evolution.study import Study

Floats = NDArray[np.float64]

#: Sharpness of the first step and the last. What leaks through a soft cut is not there in the end.
SHARPNESS = (4.0, 40.0)
#: Share of the steps after which the cuts are at their sharpest. Where they sharpen to the very end, budgets that are
#: good under soft cuts lose under hard ones for most of the descent, and what they come to differs more between seeds.
SHARPENED = 0.5
#: Adam's step size in the first step and the one that it comes near in the last, and its averages of the gradient and
#: its square.
RATE = (0.25, 0.05)
BETAS = (0.9, 0.95)
#: Spread of the noise on the logarithm of each budget, drawn anew for each step and example. Budgets found so leave a
#: margin beyond the ranks that the training examples happen to need.
NOISE = 0.4
#: Factor on the first step of the evolution that goes on from a descent: its start is good already.
STEP_AFTER = 0.35
#: Training examples that each step looks at, all of them in turn. They come from different shards, since those of one
#: shard are alike: needles at neighbouring depths. Three or four take up to twice as long, and find no more.
SLOPE_EXAMPLES = 2


class Descent:
    """Adam on the logarithms of all entries, at exactly the target memory.

    A budget is its floor and a share of what is left: ``b = floor + min(room, s · exp θ)``, with s such that the mean
    is exactly the target. Each step asks for the slopes of a few losses, each at one of the `points` near the current
    budgets, and at a sharpness that grows geometrically from step to step; see `evolkv.cache.soft`.

    Adam: Kingma & Ba 2014, arXiv 1412.6980.

    Args:
        shape: (L,) for layer budgets or (L, H) for head budgets.
        budget: c, the mean budget, in cache entries.
        steps: how many steps to take.
        floor: the least an entry may get, an int or an array that broadcasts to `shape`.
        ceiling: the most an entry may get, likewise.
        points: how many losses a step looks at.
        seed: of the noise.

    Attributes:
        step: number of slopes told.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        budget: int,
        steps: int,
        floor: ArrayLike,
        ceiling: ArrayLike,
        points: int = 1,
        seed: int = 0,
    ):
        self._floor, self._ceiling = bounds(shape, budget, floor, ceiling)
        self._room = (self._ceiling - self._floor).astype(np.float64)
        self.shape, self.steps, self.step = shape, steps, 0
        self._total = budget * int(np.prod(shape))
        start = complete(np.ones(shape), self._total, self._floor, self._ceiling)
        # An entry at its floor would never leave it.
        self._theta: Floats = np.log(np.maximum(start - self._floor, 0.5))
        self._random = np.random.default_rng(seed)
        self._noise: Floats = np.exp(NOISE * self._random.standard_normal((points, *shape)))
        self._first, self._second = np.zeros(shape), np.zeros(shape)

    @property
    def done(self) -> bool:
        """True after the last step."""
        return self.step >= self.steps

    @property
    def sharpness(self) -> float:
        """The sharpness of the cuts at the current step."""
        first, last = SHARPNESS
        return float(first * (last / first) ** min(1.0, self.step / max(1.0, SHARPENED * (self.steps - 1))))

    @property
    def points(self) -> Floats:
        """The soft budgets at which slopes are wanted, ``[points, *shape]``: the current ones with noise."""
        return (self._floor + self._shares()) * self._noise

    @property
    def budgets(self) -> NDArray[np.int64]:
        """The current budgets in `shape`, rounded at the exact total."""
        return complete(self._floor + self._shares(), self._total, self._floor, self._ceiling)

    def folded(self, slopes: Floats) -> Floats:
        """Return the slope of the mean loss with respect to the current budgets, given those at `points`."""
        return np.asarray((slopes * self._noise).mean(axis=0))

    def tell(self, slope: ArrayLike) -> None:
        """Take a step, given the slope of the mean loss with respect to the current budgets, in `shape`."""
        shares = self._shares()
        full = shares >= self._room
        free = np.where(full, 0.0, shares)
        # One more entry here is one less among all that are free to change, each in its proportion.
        by_share = np.asarray(slope, dtype=np.float64)
        gradient = shares * (by_share - (free * by_share).sum() / max(free.sum(), 1e-9))
        # One that is full can only come down.
        gradient[full] = np.maximum(gradient[full], 0.0)
        self.step += 1
        self._first = BETAS[0] * self._first + (1 - BETAS[0]) * gradient
        self._second = BETAS[1] * self._second + (1 - BETAS[1]) * gradient**2
        first, second = self._first / (1 - BETAS[0] ** self.step), self._second / (1 - BETAS[1] ** self.step)
        rate = RATE[0] + (RATE[1] - RATE[0]) * (self.step - 1) / self.steps
        self._noise = np.exp(NOISE * self._random.standard_normal(self._noise.shape))
        self._theta = np.log(np.maximum(shares, 1e-6)) - rate * first / (np.sqrt(second) + 1e-12)

    def _shares(self) -> Floats:
        """Return what each entry has above its floor."""
        left = float(self._total - self._floor.sum())
        shares: Floats = np.exp(self._theta - self._theta.max())
        full = np.zeros(self.shape, dtype=bool)
        # Those that are full hand the rest to the others, of which more may be full then.
        while not full.all():
            scale = (left - self._room[full].sum()) / shares[~full].sum()
            more = ~full & (shares * scale >= self._room)
            if not more.any():
                break
            full |= more
        return np.where(full, self._room, shares * scale)


def descend(
    budget: int,
    *,
    config: SearchConfig,
    space: SearchSpace,
    rotation: Rotation,
    scorer: Callable[[], Engine],
    study: Study | None = None,
    limit: TimeLimit | None = None,
) -> tuple[list[Evaluation], bool, float]:
    """Follow the slope from uniform budgets; steps that the study holds are taken again as they were.

    KeyboardInterrupt ends the descent early.

    Args:
        budget: the target, in cache entries per KV head.
        config: the settings of the search.
        space: the budgets to choose from.
        rotation: which examples each step looks at.
        scorer: the engine over the training examples; asked for only if a slope has to be computed.
        study: where steps are recorded.
        limit: ends the descent before the first step for which there is no time.

    Returns:
        The steps, each with the budgets that it came to, at exactly the target total; whether it was interrupted; and
        the seconds that earlier runs took for those that the study held.

    Raises:
        StudyError: if what the study holds is not what the descent comes to.
        KeyboardInterrupt: if interrupted before the first step.
    """
    stage = f"gradient {budget}"
    recorded = study.generations(stage) if study is not None else []
    floor, ceiling = space.bounds
    descent = Descent(space.shape, budget, config.gradient_steps, floor, ceiling, rotation.size, config.seed)
    limit = limit or TimeLimit(None)
    steps: list[Evaluation] = []
    interrupted, recorded_seconds = False, 0.0
    try:
        while not descent.done:
            number = descent.step
            if number < len(recorded):
                (entry,) = recorded[number]
                recorded_seconds += entry.seconds
                descent.tell(np.array(entry.slope).reshape(space.shape))
                if entry.budgets != as_lists(space.matrix(descent.budgets)):
                    raise StudyError(
                        f"step {number} of {stage} in the study is not what this version comes to; continue with the "
                        "version that the study was made with, or start another --study"
                    )
            else:
                columns = rotation(number)
                engine = scorer()
                if steps and limit.reached():
                    break
                started = time.perf_counter()
                points = np.stack([space.matrix(point) for point in descent.points])
                losses, slopes = engine.slope(points, descent.sharpness, columns)
                slope = descent.folded(space.by_variable(slopes))
                descent.tell(slope)
                by_example = rotation.spread(columns, [float(np.exp(-loss)) for loss in losses.tolist()])
                score = float(np.exp(-losses).mean())
                budgets = as_lists(space.matrix(descent.budgets))
                took = time.perf_counter() - started
                limit.scored(SLOPE_ROWS * len(columns), took)
                by_layer = slope.reshape(space.layers, -1).tolist()
                entry = Evaluation(budgets, score, score, 1.0, number, by_example, took, by_layer)
                if study is not None:
                    study.record(stage, number, [entry])
            steps.append(entry)
            config.report(
                SearchProgress(
                    "gradient", number + 1, descent.steps, entry.score, entry.score, entry.budgets, budget=budget
                )
            )
    except KeyboardInterrupt:
        if not steps:
            raise
        interrupted = True
    return steps, interrupted, recorded_seconds
