"""DynamicKV: layers that hold more of the model's highest scores get more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from evolkv.allocators.adaptive.base import LayerAllocator
from evolkv.allocators.layout import expand
from evolkv.errors import UsageError


@dataclass(frozen=True)
class DynamicKV(LayerAllocator):
    """Gives each layer as many entries as it has among the highest scores of all layers.

    Beyond protected tokens, a layer brings at most `most` times the mean as candidates; of all layers' candidates the
    highest scores count.

    Zhou et al. 2024, "DynamicKV: Task-Aware Adaptive KV Cache Compression for Long Context LLMs", arXiv 2412.14838,
    algorithm 1, with one update after the last layer instead of one every few layers.

    Args:
        most: the paper's r_max.
    """

    name: ClassVar[str] = "dynamickv"
    most: int = 10

    def __post_init__(self) -> None:
        if self.most < 1:
            raise UsageError(f"dynamickv: most is {self.most}; expected at least 1")

    def layers(
        self, observed: Sequence[NDArray[np.float64]], budget: int, floor: int, ceilings: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """See `LayerAllocator.layers`."""
        count = len(observed)
        protected = np.array([int(np.isinf(scores[0]).sum()) for scores in observed])
        spare = max(0, budget - int(protected.max()))
        heads = len(observed[0])
        candidates = [
            np.sort(scores[:, kept:].ravel())[::-1][: self.most * spare * heads]
            for scores, kept in zip(observed, protected, strict=True)
        ]
        layer = np.repeat(np.arange(count), [len(scores) for scores in candidates])
        best = np.argsort(-np.concatenate(candidates), kind="stable")[: spare * heads * count]
        owned = np.bincount(layer[best], minlength=count) / heads
        return expand(protected + owned, budget, floor, ceilings)
