"""Paired comparison of two methods on the same examples: difference, interval and p-value."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evolkv.errors import UsageError
from evolkv.intervals import bootstrap95

#: Up to this many examples that differ, every way to flip their signs is counted.
_MOST_EXACT = 16
_DRAWS = 20_000
_DRAWN_AT_ONCE = 2_000_000
#: Sums of the same numbers in another order differ by rounding, and count as equal.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class PairedComparison:
    """Method a against method b on the same examples.

    Args:
        n: examples.
        mean_a: mean score of a.
        mean_b: mean score of b.
        difference: mean of a − b.
        ci95: 95 % interval of the difference, from a bootstrap over examples.
        p: chance of a difference at least this far from 0, either way, if a and b were the same: sign-flip test.
        exact: whether `p` counts every way to flip the signs, rather than 20,000 random ones.
        wins: examples on which a scores higher.
        ties: examples on which both score the same.
        losses: examples on which b scores higher.
    """

    n: int
    mean_a: float
    mean_b: float
    difference: float
    ci95: tuple[float, float]
    p: float
    exact: bool
    wins: int
    ties: int
    losses: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "ci95": list(self.ci95)}


def paired_comparison(
    a_scores: Sequence[float] | np.ndarray, b_scores: Sequence[float] | np.ndarray, seed: int = 0
) -> PairedComparison:
    """Compare two methods by their scores on the same examples.

    The interval is the BCa bootstrap of the mean difference (10,000 resamples of examples). `p` is the two-sided
    sign-flip permutation test (Fisher 1935, "The Design of Experiments", section 21): exact for 16 examples or fewer,
    and for more wherever at most 16 of them differ; else from 20,000 random flips, the observed one counted among them.

    Args:
        a_scores: ``[examples]``, finite.
        b_scores: ``[examples]``, in the same order.
        seed: of resamples and flips.

    Raises:
        UsageError: no scores, not as many of a as of b, or scores that are no numbers.
    """
    a, b = np.asarray(a_scores, dtype=np.float64), np.asarray(b_scores, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise UsageError(f"scores have the shapes {a.shape} and {b.shape}; give one score per example for both methods")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UsageError("scores must be numbers; leave out the examples that have none")
    differences = a - b
    p, exact = _sign_flip(differences[differences != 0], np.random.default_rng(seed))
    return PairedComparison(
        n=len(a),
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        difference=float(differences.mean()),
        ci95=bootstrap95(differences, seed),
        p=p,
        exact=exact,
        wins=int((differences > 0).sum()),
        ties=int((differences == 0).sum()),
        losses=int((differences < 0).sum()),
    )


def _sign_flip(differences: np.ndarray, random: np.random.Generator) -> tuple[float, bool]:
    """Return p of the sign-flip test, and whether it is exact. Differences of 0 have no sign and are left out."""
    n = len(differences)
    observed = abs(differences.sum()) - _ROUNDING * np.abs(differences).sum()
    if n <= _MOST_EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
        return float((np.abs(signs @ differences) >= observed).mean()), True
    rows = max(1, _DRAWN_AT_ONCE // n)
    extreme = 0
    for start in range(0, _DRAWS, rows):
        flips = random.integers(0, 2, size=(min(rows, _DRAWS - start), n), dtype=np.int8)
        extreme += int((np.abs((1.0 - 2.0 * flips) @ differences) >= observed).sum())
    return (extreme + 1) / (_DRAWS + 1), False
