"""The fitness that evolution maximises (arXiv 2509.08315, Eq. 1–2)."""

from __future__ import annotations

import math

from evolkv.errors import UsageError


def cache_score(mean: float, target: float, gamma: float = 0.2) -> float:
    """Rate the mean budget k̄ against the target c (Eq. 2).

    max(0, 1 − (k̄ − c) / c) above the target, 1 − γ · (1 − k̄ / c) at or below it: spending more than the
    target costs in full, spending less costs a little.

    Args:
        mean: k̄, the mean budget of the group under search, in cache entries.
        target: c, the budget aimed at, positive.
        gamma: γ, how much staying below the target costs, in [0, 1].

    Returns:
        A score in [0, 1].

    Raises:
        UsageError: an argument that is not finite or out of its range.
    """
    k, c, g = _finite("mean", mean), _finite("target", target), _finite("gamma", gamma)
    if k < 0 or c <= 0:
        raise UsageError(f"cache_score needs mean >= 0 and target > 0, got mean {mean!r} and target {target!r}")
    if not 0 <= g <= 1:
        raise UsageError(f"gamma must be a number in [0, 1], got {gamma!r}")
    return max(0.0, 1 - (k - c) / c) if k > c else 1 - g * (1 - k / c)


def fitness(score: float, mean: float, target: float, lam: float = 0.3, gamma: float = 0.2) -> float:
    """Return f(S) · (1 + λ · cache_score(k̄, c)) (Eq. 1), to be maximised.

    Args:
        score: f(S), the candidate's mean metric, not negative.
        mean: k̄, as for `cache_score`.
        target: c, as for `cache_score`.
        lam: λ, the weight of the cache score, not negative.
        gamma: γ, as for `cache_score`.

    Raises:
        UsageError: an argument that is not finite or out of its range.
    """
    f, weight = _finite("score", score), _finite("lam", lam)
    if f < 0:
        raise UsageError(f"score must not be negative, got {score!r}")
    if weight < 0:
        raise UsageError(f"lam must be a number of at least 0, got {lam!r}")
    return f * (1 + weight * cache_score(mean, target, gamma))


def _finite(name: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(number):
        raise UsageError(f"{name} must be finite, got {value!r}")
    return number
