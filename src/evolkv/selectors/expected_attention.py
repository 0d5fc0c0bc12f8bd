"""Expected attention: what queries still to come would attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evolkv.errors import ModelError, UsageError
from evolkv.selectors.base import PromptAttention, Selector


@dataclass(frozen=True)
class ExpectedAttention(Selector):
    """Keeps the tokens whose expected contribution to the attention of future queries is largest.

    Future queries are taken to be normally distributed like the prompt's queries before their rotary embedding, turned
    by the average rotation of the next `future` positions. With mean m and covariance C the expected unnormalised
    attention to a key k is exp(m·k/√d + kᵀCk/2d); normalised over the prompt, averaged over the query heads of a KV
    head, and multiplied by the norm of the value. The first `sinks` tokens are always kept, and do not count in m
    and C. Where a cache is cut again, m and C are those of the queries since the last cut.

    Devoto et al. 2025, "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution", arXiv 2510.00636, section 3, with the defaults of the authors' kvpress.

    Args:
        future: positions after the prompt to average the rotation over.
        sinks: number of first tokens that are always kept.
        covariance: whether C counts; without it only the mean query does.
        value_norm: whether attention is multiplied by the norm of the value.
    """

    name: ClassVar[str] = "expected_attention"
    future: int = 512
    sinks: int = 4
    covariance: bool = True
    value_norm: bool = True

    def __post_init__(self) -> None:
        if self.future < 1:
            raise UsageError(f"expected_attention: future is {self.future}; it must be at least 1 position")
        if self.sinks < 0:
            raise UsageError(f"expected_attention: sinks is {self.sinks}; it must not be negative")

    @property
    def min_budget(self) -> int:
        """The sinks, and at least 1."""
        return max(1, self.sinks)

    @property
    def observed_queries(self) -> int | None:
        """All."""
        return None

    def score(self, prompt: PromptAttention) -> Tensor:
        """Expected attention, times the norm of the value, ``[batch, kv_heads, tokens]``."""
        if prompt.layer is None:
            raise ModelError("expected_attention needs to know the model's rotary position embedding; none was given")
        batch, kv_heads, tokens, _ = prompt.key.shape
        device, head_dim, length = prompt.key.device, prompt.query.shape[-1], prompt.length
        queries = prompt.query.shape[2]
        # The queries are those of the newest tokens.
        asking = torch.arange(length - queries, length, device=device)
        late = max(0, self.sinks - (length - queries))
        if late >= queries:
            return prompt.key.new_full((batch, kv_heads, tokens), torch.inf, dtype=torch.float32)
        rotary = prompt.layer.rotary()
        query = rotary.undo(prompt.query[:, :, late:], asking[late:])
        turn = rotary.mean_turn(torch.arange(length, length + self.future, device=device), head_dim)
        mean = query.mean(dim=2, keepdim=True)
        group = query.shape[1] // kv_heads
        keys = prompt.key.float().repeat_interleave(group, dim=1)
        logits = ((mean @ turn) @ keys.transpose(2, 3)).squeeze(2) * prompt.scaling
        if self.covariance:
            centred = (query - mean) @ turn
            spread = centred.transpose(2, 3) @ centred / centred.shape[2]
            logits = logits + ((keys @ spread) * keys).sum(dim=-1) * prompt.scaling**2 / 2
        places = prompt.places
        # Sinks, and what stands for no entry, have no part in the softmax.
        logits = logits.view(batch, kv_heads, group, tokens).masked_fill((places < self.sinks)[:, :, None], -torch.inf)
        expected = logits.softmax(dim=-1).mean(dim=2)
        if self.value_norm:
            expected = expected * torch.linalg.vector_norm(prompt.value, dim=-1, dtype=torch.float32)
        return expected.masked_fill(places < self.sinks, torch.inf)
