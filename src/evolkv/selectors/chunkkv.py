"""ChunkKV: whole phrases instead of single tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from evolkv.errors import UsageError
from evolkv.selectors.base import Selector
from evolkv.selectors.prompt import PromptAttention
from evolkv.selectors.snapkv import SnapKV, check_votes


@dataclass(frozen=True)
class ChunkKV(Selector):
    """Keeps chunks of neighbouring tokens, those that the observation window attends to most, alike for all heads.

    Every token of a chunk has the chunk's score, its mean attention from the window's queries over tokens and heads.
    The window is always kept. In the chunk that it begins in, its tokens count as much as the most attended of all
    older ones (as in kvpress 0.5.5; the paper leaves it open), so that this chunk is among the first. Where a budget
    ends within a chunk, the chunk's first tokens are kept. Of every `reuse` layers the first decides for all of them.

    Liu et al. 2025, "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference",
    arXiv 2502.00299, section 3 (algorithms 1 and 2). Layers with a sliding window and layers without do not decide for
    each other. Where a cache is cut again, a chunk counts with the tokens and heads that still hold some of it, and
    each layer has to decide for itself (`reuse` 1).

    Args:
        chunk: tokens of a chunk.
        window: number of last prompt tokens that vote and are always kept.
        kernel: width of mean pooling over positions before chunks are scored, odd; 1 (default) turns it off, as in
            the paper.
        reuse: for how many layers a choice is used, 1 for each on its own.
    """

    name: ClassVar[str] = "chunkkv"
    chunk: int = 10
    window: int = 32
    kernel: int = 1
    reuse: int = 2

    def __post_init__(self) -> None:
        for field, value in (("chunk", self.chunk), ("reuse", self.reuse)):
            if value < 1:
                raise UsageError(f"chunkkv: {field} is {value}; it must be at least 1")
        check_votes(self.name, self.window, self.kernel)

    @property
    def _votes(self) -> SnapKV:
        return SnapKV(self.window, self.kernel, "mean")

    @property
    def observed_queries(self) -> int:
        """The window."""
        return self.window

    @property
    def looks_at_other_layers(self) -> bool:
        """True if layers share a choice."""
        return self.reuse > 1

    def score(self, prompt: PromptAttention) -> Tensor:
        """The score of each token's chunk, ``[batch, kv_heads, tokens]``."""
        if prompt.layer is None or not self.looks_at_other_layers:
            return self._chunk_scores(prompt)
        index, memory = prompt.layer.index, prompt.layer.memory
        group = (self, index // self.reuse, prompt.sliding_window)
        decided = memory.get(group)
        # What this layer or a later one remembers is of the prompt before.
        if decided is None or decided[0] >= index:
            decided = memory[group] = index, self._chunk_scores(prompt)
        scores: Tensor = decided[1]
        return scores.to(prompt.key.device)

    def _chunk_scores(self, prompt: PromptAttention) -> Tensor:
        votes = self._votes.score(prompt)
        kv_heads, tokens = votes.shape[1:]
        window = min(self.window, tokens)
        older = votes[..., : tokens - window]
        if older.shape[-1] == 0:
            return votes
        # In a chunk that the window begins in, its tokens count as much as the most attended of all older tokens.
        highest = older.amax(dim=-1, keepdim=True)
        votes = F.pad(older, (0, window)).where(votes.isfinite(), highest)
        scores = _means(votes, self.chunk) if prompt.positions is None else _means_of_held(votes, prompt, self.chunk)
        return F.pad(scores[..., : tokens - window], (0, window), value=float("inf")).expand(-1, kv_heads, -1)


def _means(votes: Tensor, chunk: int) -> Tensor:
    """The mean vote of each token's chunk over its tokens and all heads, ``[batch, 1, tokens]``."""
    tokens = votes.shape[-1]
    votes = votes.mean(dim=1, keepdim=True)
    sums = F.pad(votes, (0, -tokens % chunk)).unflatten(-1, (-1, chunk)).sum(dim=-1)
    sizes = votes.new_full((sums.shape[-1],), chunk)
    sizes[-1] = tokens - chunk * (len(sizes) - 1)
    return (sums / sizes).repeat_interleave(chunk, dim=-1)[..., :tokens]


def _means_of_held(votes: Tensor, prompt: PromptAttention, chunk: int) -> Tensor:
    """The same over those tokens and heads that still hold some of the chunk, ``[batch, kv_heads, tokens]``."""
    # Slot 0 is for what stands for no entry.
    chunks = (prompt.places // chunk + 1).flatten(1)
    sums = votes.new_zeros((len(votes), prompt.length // chunk + 2)).scatter_add(1, chunks, votes.flatten(1))
    sizes = torch.zeros_like(sums).scatter_add(1, chunks, torch.ones_like(votes).flatten(1))
    return (sums / sizes.clamp(min=1)).gather(1, chunks).view_as(votes)
