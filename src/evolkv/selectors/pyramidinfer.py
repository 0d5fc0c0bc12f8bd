"""PyramidInfer: what the recent tokens attend to goes on to the next layer, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evolkv.errors import UsageError
from evolkv.selectors.base import Selector
from evolkv.selectors.prompt import PromptAttention

# Float32 probabilities held at once: on a CPU so many as its caches hold, which takes half of the time.
_BLOCK_ON_CPU, _BLOCK = 1 << 20, 1 << 26
_LEAST_ROWS = 16


@dataclass(frozen=True)
class PyramidInfer(Selector):
    """Keeps the tokens that the recent part of the prompt attends to, and drops the others from all deeper layers.

    After each layer the recent tokens vote with their attention, averaged over all query heads and weighted so that
    later ones count more. The tokens that a layer's budget allows are held in that layer, and only they enter the next
    one. So budgets are by layer and must not rise, and a smaller one also makes the prefill cheaper.

    Yang et al. 2024, "PyramidInfer: Pyramid KV Cache Compression for High-throughput LLM Inference", arXiv 2405.12532,
    section 3.3 and algorithm 1, for the prompt. Tokens that are generated are all kept.

    The paper keeps all recent tokens, a fifth of the prompt, which is more than a small budget. Here they take up to
    `protected` of a layer's budget, the latest first. A recent token that is not protected may still win by votes.
    With ``protected=1`` recent tokens come before all others, as in the paper.

    Layers with a sliding window drop no tokens, because their voters see no other tokens than those in the window. They
    hold what their budget allows of what enters them.

    Args:
        recent: share of the prompt whose queries vote; one more token than that votes, too.
        weight: of the last token's vote; that of the first voter is 1, and those between are on a straight line.
        sinks: number of first tokens that win every vote.
        protected: the most of a layer's budget that goes to recent tokens because they are recent, as a share.
    """

    name: ClassVar[str] = "pyramidinfer"
    layer: ClassVar[str | None] = "evolkv.cache.pruning:PruningLayer"
    prunes_prefill: ClassVar[bool] = True
    recent: float = 0.2
    weight: float = 1.2
    sinks: int = 4
    protected: float = 0.5

    def __post_init__(self) -> None:
        for field in ("recent", "protected"):
            if not 0 <= (value := getattr(self, field)) <= 1:
                raise UsageError(f"pyramidinfer: {field} is {value}; expected a share from 0 to 1")
        if not 0 < self.weight < float("inf"):
            raise UsageError(f"pyramidinfer: weight is {self.weight}; expected a number above 0, such as 1.2")
        if self.sinks < 0:
            raise UsageError(f"pyramidinfer: sinks is {self.sinks}; expected 0 tokens or more")

    def score(self, prompt: PromptAttention) -> Tensor:
        """Minus the place of each token in the order that all budgets cut, ``[batch, kv_heads, tokens]``.

        The heads of a layer have one order. Of its first N tokens at least ``protected`` · N are the latest ones, until
        all recent tokens are among them; the others have the most votes.
        """
        places = prompt.places[:, 0]
        age = prompt.length - 1 - places
        recent = 1 + int(self.recent * prompt.length)
        votes = self._votes(prompt, age, recent).masked_fill(places < self.sinks, torch.inf)
        order = votes.argsort(dim=-1, descending=True, stable=True)
        # The number of tokens from which on a token is among them: by its votes, and by its age.
        by_votes = torch.arange(1, 1 + places.shape[1], device=votes.device).double().expand_as(votes)
        by_votes = by_votes / (1 - self.protected) if self.protected < 1 else torch.full_like(by_votes, torch.inf)
        by_age = age.double() / self.protected if self.protected else torch.full_like(by_votes, torch.inf)
        by_age = by_age.masked_fill(age >= recent, torch.inf).masked_fill(age == 0, 0)
        first = torch.minimum(by_votes, by_age.gather(1, order))
        order = order.gather(1, first.argsort(dim=-1, stable=True))
        return -order.argsort(dim=-1)[:, None].expand(prompt.key.shape[:3]).float()

    def _votes(self, prompt: PromptAttention, age: Tensor, recent: int) -> Tensor:
        """Attention that each token receives from the voters, ``[batch, tokens]``; `age` is 0 for the last token."""
        batch, _, tokens, _ = prompt.key.shape
        weights = 1 + (self.weight - 1) * (recent - 1 - age).float() / max(1, recent - 1)
        weights = weights.masked_fill(age >= recent, 0)
        votes = prompt.key.new_zeros((batch, tokens), dtype=torch.float32)
        voters = int((age < recent).sum(dim=1).max())
        elements = _BLOCK_ON_CPU if prompt.key.device.type == "cpu" else _BLOCK
        for block in prompt.blocks(tokens - voters, tokens, elements, _LEAST_ROWS):
            attention = prompt.probabilities(block.start, block.stop).flatten(1, 2).mean(dim=1)
            votes[:, : block.stop] += (weights[:, None, block] @ attention)[:, 0]
        return votes
