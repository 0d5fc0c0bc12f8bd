"""CAKE: layers whose attention is spread and shifting get more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evolkv.allocators.adaptive.base import LayerAllocator
from evolkv.allocators.layout import expand
from evolkv.errors import UsageError
from evolkv.selectors import PromptAttention


@dataclass(frozen=True)
class CAKE(LayerAllocator):
    """Shares out budget, beyond a window, in proportion to each layer's preference P = H^(1/τ₁) · V^(1/τ₂).

    H is the entropy of the last queries' attention to the tokens before them, V the variance of that attention from
    query to query; both are summed over tokens and query heads.

    Qin et al. 2025, "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", arXiv 2503.12491, sections
    4.1 and 4.2. Cascading gives the same allocation as deciding once after prefill, which is done here. The authors
    search τ₁ and τ₂ for each model and budget, between 0.4 and 2.3; 1 is neutral.

    A budget that is no larger than the window leaves nothing to share out: all layers then get the same.

    Args:
        tau1: temperature of the entropy.
        tau2: temperature of the variance.
        window: number of last tokens whose queries count, and which every layer keeps on top of its share.
    """

    name: ClassVar[str] = "cake"
    tau1: float = 1.0
    tau2: float = 1.0
    window: int = 32

    def __post_init__(self) -> None:
        for name, value in (("tau1", self.tau1), ("tau2", self.tau2)):
            # What is far from the 0.4 to 2.3 that the authors search overflows.
            if not 0.05 <= value <= 20:
                raise UsageError(f"cake: {name} is {value}; expected a number from 0.05 to 20, such as 1.6")
        if self.window < 1:
            raise UsageError(f"cake: window is {self.window}; expected at least 1 token")

    @property
    def observed_queries(self) -> int:
        """The window."""
        return self.window

    def observe(self, prompt: PromptAttention, scores: Tensor) -> NDArray[np.float64]:
        """Return the preference, as one number."""
        tokens = prompt.num_tokens
        older = tokens - min(self.window, tokens)
        attention = prompt.probabilities(older, tokens)[..., :older]
        # What a sliding window hides has probability 0, and 0 · log 0 counts as 0.
        entropy = torch.special.entr(attention).sum().double()
        spread = tokens - older > 1 and older > 0
        variance = attention.var(dim=3).sum().double() if spread else entropy.new_zeros(())
        return (entropy ** (1 / self.tau1) * variance ** (1 / self.tau2)).cpu().numpy()

    def layers(
        self, observed: Sequence[NDArray[np.float64]], budget: int, floor: int, ceilings: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """See `LayerAllocator.layers`."""
        count = len(observed)
        window = min(self.window, budget)
        preference = np.array([float(value) for value in observed])
        total = preference.sum()
        shares = preference / total if total > 0 else np.full(count, 1 / count)
        # Rounded to whole entries within the bounds only once, on the sum.
        weights = window + (budget - window) * count * shares
        return expand(weights, budget, floor, ceilings)
