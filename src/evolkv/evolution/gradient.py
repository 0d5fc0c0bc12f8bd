"""Budgets by gradient: follow the slope of the loss through cuts that are soft at first and hard in the end."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv.allocators import complete
from evolkv.evolution.strategies.base import bounds

Floats = NDArray[np.float64]

#: Sharpness of the first and the last step. What leaks through a soft cut is not there in the end.
SHARPNESS = (2.0, 40.0)
#: Adam's step size in the first and the last step, and its averages of the gradient and its square.
RATE = (0.25, 0.05)
BETAS = (0.9, 0.95)


class Descent:
    """Adam on the logarithms of all entries, at exactly the target memory.

    A budget is its floor and a share of what is left: ``b = floor + min(room, s · exp θ)``, with s such that the mean
    is exactly the target. Each step asks for the slope of the loss at the current budgets and a sharpness, which grows
    geometrically from step to step; see `evolkv.cache.soft`.

    Adam: Kingma & Ba 2014, arXiv 1412.6980.

    Args:
        shape: (L,) for layer budgets or (L, H) for head budgets.
        budget: c, the mean budget, in cache entries.
        steps: how many steps to take.
        floor: the least an entry may get, an int or an array that broadcasts to `shape`.
        ceiling: the most an entry may get, likewise.
        x0: budgets to start from, of shape `shape`; default: uniform.

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
        x0: ArrayLike | None = None,
    ):
        self._floor, self._ceiling = bounds(shape, budget, floor, ceiling)
        self._room = (self._ceiling - self._floor).astype(np.float64)
        self.shape, self.steps, self.step = shape, steps, 0
        self._total = budget * int(np.prod(shape))
        start = np.ones(shape) if x0 is None else np.asarray(x0, dtype=np.float64)
        start = complete(start, self._total, self._floor, self._ceiling) - self._floor
        # An entry at its floor would never leave it.
        self._theta: Floats = np.log(np.maximum(start, 0.5))
        self._first, self._second = np.zeros(shape), np.zeros(shape)

    @property
    def done(self) -> bool:
        """True after the last step."""
        return self.step >= self.steps

    @property
    def sharpness(self) -> float:
        """The sharpness of the cuts at the current step."""
        return _between(*SHARPNESS, self.step / max(1, self.steps - 1))

    @property
    def soft_budgets(self) -> Floats:
        """The current budgets in `shape`, before they are rounded."""
        return self._floor + self._shares()

    @property
    def budgets(self) -> NDArray[np.int64]:
        """The current budgets in `shape`, rounded at the exact total."""
        return complete(self.soft_budgets, self._total, self._floor, self._ceiling)

    def tell(self, slope: ArrayLike) -> None:
        """Take a step, given the slope of the loss with respect to each budget, in `shape`."""
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


def _between(first: float, last: float, part: float) -> float:
    return float(first * (last / first) ** part)
