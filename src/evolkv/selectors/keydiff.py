"""KeyDiff: keys unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from evolkv.selectors.base import Selector
from evolkv.selectors.prompt import PromptAttention


@dataclass(frozen=True)
class KeyDiff(Selector):
    """Keeps the tokens whose keys are least similar to the average key. No token is protected.

    Park et al. 2025, "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments", arXiv 2504.15364, section 3: the anchor is the mean of the normalised keys, and
    similarity is the cosine. Applied once after prefill, over the whole prompt, not block by block while it is read,
    unless the cache is asked to: the anchor is then that of what each head holds.
    """

    name: ClassVar[str] = "keydiff"

    @property
    def observed_queries(self) -> int:
        """None of them."""
        return 0

    def score(self, prompt: PromptAttention) -> Tensor:
        """Negative cosine similarity of each key to the anchor of its head."""
        # Where a head has no entry its key is zero, which does not turn the anchor.
        keys = F.normalize(prompt.key.float(), dim=-1)
        return -F.cosine_similarity(keys, keys.mean(dim=2, keepdim=True), dim=-1)
