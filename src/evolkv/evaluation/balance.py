"""Scores that count each example by what budgets can gain on it, so that no kind of a mixture drowns another.

On a needle the score goes from 0 under uniform budgets to 1 with the full cache; on a worked problem from 0.55 to 0.6.
The mean of both goes by the needle alone. Here an example's score s becomes

    ½ + ½ · clip((s − u) / max(f − u, δ), −1, 1)

with u its score under uniform budgets and f that with the full cache: ½ is what uniform budgets do, 1 what the full
cache does, on every example alike. δ keeps noise small where budgets change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evolkv.evaluation.engine import Engine

#: δ: the least difference between the full cache and uniform budgets that counts as one, in score.
LEAST_GAIN = 0.05
#: The same in the loss −log(score), for weights of slopes.
LEAST_LOSS = 0.1
#: No score is taken for a probability below it.
_LEAST_SCORE = 1e-6


class BalancedEngine(Engine):
    """Turns the scores of another engine into balanced ones; see the module.

    Args:
        engine: scores candidates.
        uniform: the uniform budgets, ``[layers, kv_heads]``; of several, those at the smallest budget.
    """

    def __init__(self, engine: Engine, uniform: np.ndarray):
        self.engine = engine
        everything = np.full_like(uniform, np.iinfo(np.int32).max)
        self._references = np.stack([uniform, everything])
        #: Scores of all examples under uniform budgets and with the full cache, ``[2, examples]``; None until needed.
        self._known: np.ndarray | None = None
        #: Of each candidate that was last scored on all examples, the mean share of the full cache's score.
        self.retained = np.empty(0)

    def score(self, budgets: np.ndarray, columns: Sequence[int] | None = None) -> np.ndarray:
        """See `Engine.score`."""
        if columns is not None:
            bounds = self.refer()[:, list(columns)]
            scores = self.engine.score(budgets, columns)
        else:
            # In one call: an engine that holds nothing prefills in each.
            every = self.engine.score(np.concatenate([self._references, budgets]))
            bounds, scores = every[:2], every[2:]
            self.retained = np.clip(scores / np.maximum(bounds[1], _LEAST_SCORE), 0, 1).mean(axis=1)
        uniform, full = bounds
        gain = (scores - uniform) / np.maximum(full - uniform, LEAST_GAIN)
        return 0.5 + 0.5 * np.clip(gain, -1, 1)

    def slope(
        self,
        budgets: np.ndarray,
        sharpness: float,
        columns: Sequence[int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.slope`; each loss counts by what the full cache takes off the loss of uniform budgets."""
        uniform, full = -np.log(np.maximum(self.refer()[:, list(columns)], _LEAST_SCORE))
        own = 1 / np.maximum(uniform - full, LEAST_LOSS)
        # Of the size of plain losses, so that steps are, too.
        losses, slopes = self.engine.slope(budgets, sharpness, columns)
        return losses, slopes * (own / own.mean())[:, None, None]

    def utility(self) -> np.ndarray:
        """See `Engine.utility`."""
        return self.engine.utility()

    def close(self) -> None:
        """See `Engine.close`."""
        self.engine.close()

    def refer(self) -> np.ndarray:
        """Return what all examples score under uniform budgets and with the full cache, ``[2, examples]``.

        All at once: what is computed together decides the last bits of a score, and a continued search asks for other
        examples together than one that was not stopped.
        """
        if self._known is None:
            self._known = self.engine.score(self._references)
        return self._known
