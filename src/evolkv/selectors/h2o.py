"""H2O: heavy hitters of the whole prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evolkv.errors import UsageError
from evolkv.selectors.base import Selector
from evolkv.selectors.prompt import PromptAttention

# Bounds the block of attention held at once to this many float32 probabilities (256 MiB).
_BLOCK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class H2O(Selector):
    """Keeps the tokens with the most attention summed over all queries of the prompt, and the last ones.

    Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
    Models", arXiv 2306.14048, section 4.2, applied once after prefill. The paper splits a budget evenly
    between recent tokens and heavy hitters; here, as in PyramidKV's evaluation of H2O, the recent share is a
    fixed window, so that one ranking serves every budget. Where a cache is cut again, what was held goes on from the
    sum it had, as in the paper.

    Attention is summed in blocks of queries; no tokens × tokens matrix is held.

    Args:
        window: number of last prompt tokens that are always kept.
    """

    name: ClassVar[str] = "h2o"
    accumulates: ClassVar[bool] = True
    window: int = 32

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"h2o: window is {self.window}; it must be at least 1 token")

    def score(self, prompt: PromptAttention) -> Tensor:
        """Attention received, summed over queries and averaged over the group of query heads."""
        return self.protect(self.accumulated(prompt))

    def accumulated(self, prompt: PromptAttention) -> Tensor:
        """Attention received so far, the last tokens' too."""
        total = torch.zeros_like(prompt.key[..., 0], dtype=torch.float32)
        if prompt.received is not None:
            total += prompt.received
        for block in prompt.blocks(prompt.first_query, prompt.num_tokens, _BLOCK_ELEMENTS):
            total[..., : block.stop] += prompt.probabilities(block.start, block.stop).sum(dim=3).mean(dim=2)
        return total

    def protect(self, scores: Tensor) -> Tensor:
        """The last tokens first."""
        scores = scores.clone()
        scores[..., max(0, scores.shape[-1] - self.window) :] = torch.inf
        return scores
