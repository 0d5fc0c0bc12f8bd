"""An engine turns candidates into scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from evolkv.errors import UsageError

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

    def slope(
        self,
        budgets: np.ndarray,
        sharpness: float,
        columns: Sequence[int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the loss on some examples, each under soft budgets of its own, and the slope of each.

        Args:
            budgets: ``[columns, layers, kv_heads]`` floats, each above 0.
            sharpness: k of `evolkv.cache.soft`.
            columns: numbers of the examples, in ascending order.

        Returns:
            The losses ``[columns]``, and the derivatives of each, ``[columns, layers, kv_heads]`` float64.

        Raises:
            UsageError: if the engine or the metric has no slope.
            RunError: if memory does not suffice, or what the model computes is not a number.
        """
        raise UsageError(f"a {type(self).__name__} has no slope; use engine 'replay'")

    def utility(self) -> np.ndarray:
        """Return how useful the entries at each rank are to the answers: LU-KV's calibration.

        Returns:
            The sum over all examples, ``[layers, kv_heads, ceiling]`` float32; see `evolkv.evaluation.utility`.

        Raises:
            UsageError: if the engine cannot say, or the metric has no answer that is read.
            ModelError: if the model's output projections are not found.
            RunError: if memory does not suffice, or what the model computes is not a number.
        """
        raise UsageError(f"a {type(self).__name__} has no calibration; use engine 'replay'")

    @abstractmethod
    def close(self) -> None:
        """Free what is held for further calls."""
