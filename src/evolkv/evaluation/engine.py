"""An engine turns candidates into scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

#: Called with (done, total) as examples are prepared.
Progress = Callable[[int, int], None]


class Engine(ABC):
    """Scores candidates on a fixed set of examples under one metric."""

    @abstractmethod
    def score(self, budgets: np.ndarray, columns: Sequence[int] | None = None) -> np.ndarray:
        """Score every candidate on every example, or on some.

        Args:
            budgets: ``[candidates, layers, kv_heads]`` int.
            columns: numbers of the examples to score on, in ascending order; None for all.

        Returns:
            ``[candidates, examples]`` float64 in [0, 1].
        """

    @abstractmethod
    def close(self) -> None:
        """Free what is held for further calls."""
