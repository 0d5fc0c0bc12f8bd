"""TOVA: what the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evolkv.selectors.base import Selector
from evolkv.selectors.prompt import PromptAttention


@dataclass(frozen=True)
class TOVA(Selector):
    """Keeps the tokens that the last prompt token attends to, averaged over all heads of a layer.

    All heads of a layer share one ranking. The last token itself is always kept. Where a cache is cut again, a token
    has the average of the KV heads that still hold it.

    Oren et al. 2024, "Transformers are Multi-State RNNs", arXiv 2401.06104, section 4, applied once after
    prefill.
    """

    name: ClassVar[str] = "tova"

    @property
    def observed_queries(self) -> int:
        """The last one."""
        return 1

    def score(self, prompt: PromptAttention) -> Tensor:
        """Attention of the last query, the same for every KV head of the layer."""
        tokens = prompt.num_tokens
        scores = prompt.mean_over_heads(prompt.probabilities(tokens - 1, tokens)[..., 0, :].mean(dim=2))
        return torch.cat([scores[..., :-1], scores.new_full((*scores.shape[:2], 1), torch.inf)], dim=-1)
