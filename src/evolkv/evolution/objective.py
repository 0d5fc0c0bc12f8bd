"""The fitness that evolution maximises (arXiv 2509.08315, Eq. 1–2)."""

from __future__ import annotations

from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv.errors import UsageError


@overload
def cache_score(mean: float, target: float, gamma: float = ...) -> float: ...
@overload
def cache_score(mean: ArrayLike, target: ArrayLike, gamma: float = ...) -> float | NDArray[np.float64]: ...
def cache_score(mean: ArrayLike, target: ArrayLike, gamma: float = 0.2) -> float | NDArray[np.float64]:
    """Rate the mean budget k̄ against the target c (Eq. 2).

    max(0, 1 − (k̄ − c) / c) above the target, 1 − γ · (1 − k̄ / c) at or below it: spending more than the
    target costs in full, spending less costs a little.

    Args:
        mean: k̄, the mean budget of the group under search, in cache entries; a number or an array.
        target: c, the budget aimed at, positive; a number or an array that broadcasts with `mean`.
        gamma: γ, how much staying below the target costs, in [0, 1].

    Returns:
        A score in [0, 1]: a float for numbers, a float64 array for arrays.

    Raises:
        UsageError: an argument that is not finite or out of its range.
    """
    k = _finite("mean", mean)
    c = _finite("target", target)
    g = _finite("gamma", gamma)
    if (k < 0).any() or (c <= 0).any():
        raise UsageError(f"cache_score needs mean >= 0 and target > 0, got mean {mean!r} and target {target!r}")
    if g.ndim or not 0 <= g <= 1:
        raise UsageError(f"gamma must be a number in [0, 1], got {gamma!r}")
    return _plain(np.where(k > c, np.maximum(0.0, 1 - (k - c) / c), 1 - g * (1 - k / c)))


@overload
def fitness(score: float, mean: float, target: float, lam: float = ..., gamma: float = ...) -> float: ...
@overload
def fitness(
    score: ArrayLike, mean: ArrayLike, target: ArrayLike, lam: float = ..., gamma: float = ...
) -> float | NDArray[np.float64]: ...
def fitness(
    score: ArrayLike, mean: ArrayLike, target: ArrayLike, lam: float = 0.3, gamma: float = 0.2
) -> float | NDArray[np.float64]:
    """Return f(S) · (1 + λ · cache_score(k̄, c)) (Eq. 1), to be maximised.

    Args:
        score: f(S), the candidate's mean metric, not negative; a number or an array.
        mean: k̄, as for `cache_score`.
        target: c, as for `cache_score`.
        lam: λ, the weight of the cache score, not negative.
        gamma: γ, as for `cache_score`.

    Returns:
        The fitness: a float for numbers, a float64 array for arrays.

    Raises:
        UsageError: an argument that is not finite or out of its range.
    """
    f = _finite("score", score)
    weight = _finite("lam", lam)
    if (f < 0).any():
        raise UsageError(f"score must not be negative, got {score!r}")
    if weight.ndim or weight < 0:
        raise UsageError(f"lam must be a number of at least 0, got {lam!r}")
    return _plain(f * (1 + weight * np.asarray(cache_score(mean, target, gamma))))


def _finite(name: str, value: ArrayLike) -> NDArray[np.float64]:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a number or an array of numbers, got {value!r}") from None
    if not np.isfinite(array).all():
        raise UsageError(f"{name} must be finite, got {value!r}")
    return array


def _plain(value: NDArray[np.float64]) -> float | NDArray[np.float64]:
    return float(value) if value.ndim == 0 else value
