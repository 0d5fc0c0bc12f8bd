"""Key norm: small keys draw much attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evolkv.selectors.base import Selector
from evolkv.selectors.prompt import PromptAttention


@dataclass(frozen=True)
class KNorm(Selector):
    """Keeps the tokens whose keys have the smallest L2 norm. No token is protected.

    Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    arXiv 2406.11430, section 3.
    """

    name: ClassVar[str] = "knorm"

    @property
    def observed_queries(self) -> int:
        """None of them."""
        return 0

    def score(self, prompt: PromptAttention) -> Tensor:
        """Negative norm of each key, in float32 so that a low-precision cache makes no ties."""
        return -torch.linalg.vector_norm(prompt.key, dim=-1, dtype=torch.float32)
