"""Ada-KV: within a layer, budget goes to the heads whose attention is spread most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from evolkv.allocators.adaptive.base import HeadAllocator
from evolkv.allocators.complete import complete
from evolkv.errors import UsageError


@dataclass(frozen=True)
class AdaKV(HeadAllocator):
    """Gives each head as many entries as it has among the layer's highest scores, and a safeguard.

    Of what a layer may keep beyond protected tokens, a head gets the share `safeguard` of the mean, and the rest in
    proportion to how many of the layer's highest scores are its own.

    Feng et al. 2024, "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
    arXiv 2407.11550, algorithm 1 and section 3.3 (safeguard α = 0.2).

    Args:
        safeguard: the part of a layer's budget that all its heads share equally, from 0 to 1.
    """

    name: ClassVar[str] = "adakv"
    safeguard: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.safeguard <= 1:
            raise UsageError(f"adakv: safeguard is {self.safeguard}; expected a share between 0 and 1")

    def heads(
        self,
        observed: Sequence[NDArray[np.float64]],
        layers: NDArray[np.int64],
        floor: int,
        ceilings: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """See `HeadAllocator.heads`."""
        rows = []
        for scores, mean, ceiling in zip(observed, layers.tolist(), ceilings.tolist(), strict=True):
            count = len(scores)
            protected = int(np.isinf(scores[0]).sum())
            spare = mean - protected
            if spare <= 0 or mean >= ceiling:
                rows.append(np.full(count, mean, dtype=np.int64))
                continue
            free = scores[:, protected:]
            # Scores of a head are in order, so those above the layer's threshold are its first ones.
            best = np.argsort(-free, axis=None, kind="stable")[: spare * count]
            owned = np.bincount(best // free.shape[1], minlength=count)
            share = self.safeguard * spare + (1 - self.safeguard) * owned
            rows.append(complete(protected + share, mean * count, min(floor, mean), ceiling))
        return np.stack(rows)
