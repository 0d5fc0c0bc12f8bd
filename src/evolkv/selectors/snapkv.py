"""SnapKV: what the last tokens of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from evolkv.errors import UsageError
from evolkv.selectors.base import Selector
from evolkv.selectors.prompt import PromptAttention

#: No prompt is longer than what a few of these would cover.
MOST_KERNEL = 65_535


def check_votes(name: str, window: int, kernel: int) -> None:
    """Raise `UsageError` for a window that cannot vote, or a kernel that cannot pool; `name` is the selector's."""
    if window < 1:
        raise UsageError(f"{name}: window is {window}; it must be at least 1 token")
    if not 1 <= kernel <= MOST_KERNEL or kernel % 2 == 0:
        raise UsageError(f"{name}: kernel is {kernel}; expected an odd number from 1 to {MOST_KERNEL:,}")


@dataclass(frozen=True)
class SnapKV(Selector):
    """Keeps the tokens that the observation window at the end of the prompt attends to.

    The attention of the window's queries is averaged over the window, pooled over neighbouring positions so
    that tokens are kept in clusters, and averaged over the query heads that share a KV head (or their maximum is
    taken). The window itself is always kept.

    Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469,
    section 4 and listing 1.

    Args:
        window: number of last prompt tokens that vote and are always kept.
        kernel: width of the pooling over positions, odd, 65,535 at most; 1 turns pooling off.
        pooling: "max" (the paper's ablation favours it for retrieval) or "mean".
        gqa: how the query heads that share a KV head are combined, "mean" or "max" (the two choices of Ada-KV's code,
            arXiv 2407.11550).
    """

    name: ClassVar[str] = "snapkv"
    window: int = 32
    kernel: int = 7
    pooling: Literal["max", "mean"] = "max"
    gqa: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        check_votes(self.name, self.window, self.kernel)
        if self.pooling not in ("max", "mean"):
            raise UsageError(f"snapkv: pooling is {self.pooling!r}; it must be 'max' or 'mean'")
        if self.gqa not in ("mean", "max"):
            raise UsageError(f"snapkv: gqa is {self.gqa!r}; it must be 'mean' or 'max'")

    @property
    def observed_queries(self) -> int:
        """The window."""
        return self.window

    def score(self, prompt: PromptAttention) -> Tensor:
        """Pooled mean attention of the window, ``[batch, kv_heads, tokens]``."""
        tokens = prompt.num_tokens
        window = min(self.window, tokens)
        older = tokens - window
        votes = prompt.probabilities(older, tokens)[..., :older].mean(dim=3)
        if older and self.kernel > 1:
            pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
            votes = pool(votes.flatten(0, 1), self.kernel, stride=1, padding=self.kernel // 2).view_as(votes)
        votes = votes.mean(dim=2) if self.gqa == "mean" else votes.amax(dim=2)
        return F.pad(votes, (0, window), value=torch.inf)
