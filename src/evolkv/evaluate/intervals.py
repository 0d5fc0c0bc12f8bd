"""95 % intervals of a mean score."""

from __future__ import annotations

import math

import numpy as np

_Z95 = 1.959963984540054


def ci95(scores: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of scores in [0, 1].

    Where every score is 0 or 1 it is Wilson's interval, which stays honest when all are equal; otherwise it is the
    percentile bootstrap over examples (10,000 resamples, fixed seed).

    Args:
        scores: ``[examples]``, at least one.
    """
    scores = np.asarray(scores, dtype=np.float64)
    n, mean = len(scores), float(scores.mean())
    if np.isin(scores, (0.0, 1.0)).all():
        centre = (mean + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
        half = _Z95 * math.sqrt(mean * (1 - mean) / n + _Z95**2 / (4 * n * n)) / (1 + _Z95**2 / n)
        # The mean lies inside by construction; rounding must not push it out where all scores are equal.
        return max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean))
    draws = np.random.default_rng(0).integers(0, n, size=(10_000, n))
    low, high = np.quantile(scores[draws].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)
