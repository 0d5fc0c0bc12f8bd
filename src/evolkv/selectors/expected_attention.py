"""Expected attention: what queries still to come would attend to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evolkv.errors import ModelError, UsageError
from evolkv.selectors.base import Selector
from evolkv.selectors.prompt import PromptAttention

# Tokens that are looked at together: what is computed of each is several times its keys.
_BLOCK = 512


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

    def score(self, prompt: PromptAttention) -> Tensor:
        """Expected attention, times the norm of the value, ``[batch, kv_heads, tokens]``."""
        if prompt.layer is None:
            raise ModelError("expected_attention needs to know the model's rotary position embedding; none was given")
        batch, kv_heads, tokens, head_dim = prompt.key.shape
        device, length, count = prompt.key.device, prompt.length, prompt.query.shape[2]
        # The queries are those of the newest tokens.
        late = max(0, self.sinks - (length - count))
        if late >= count:
            return prompt.key.new_full((batch, kv_heads, tokens), torch.inf, dtype=torch.float32)
        rotary = prompt.layer.rotary()
        # Before the longer text is asked for: an embedding that stretches keeps the angles of the longest.
        cos, sin = rotary.cos_sin(torch.arange(length - count + late, length, device=device))
        turn = rotary.mean_turn(torch.arange(length, length + self.future, device=device), head_dim)

        def over_queries(measure: Callable[[Tensor], Tensor]) -> Tensor:
            """The mean of a measure, ``[batch, kv_heads, group, ...]``, of the queries before their embedding."""
            blocks = zip(prompt.query[:, :, late:].split(_BLOCK, 2), cos.split(_BLOCK), sin.split(_BLOCK), strict=True)
            total = sum(measure(rotary.undo_turn(*block)) for block in blocks)
            assert isinstance(total, Tensor)
            return (total / (count - late)).unflatten(1, (kv_heads, -1))

        mean = over_queries(lambda query: query.sum(dim=2))
        if self.covariance:
            centre = mean.flatten(1, 2)[:, :, None]
            spread = over_queries(lambda query: (query - centre).transpose(2, 3) @ (query - centre))
            spread = turn.T @ spread @ turn
        mean = mean @ turn
        logits = []
        for block in prompt.key.split(_BLOCK, 2):
            key = block.float()
            logit = (mean @ key.transpose(2, 3)) * prompt.scaling
            if self.covariance:
                logit += ((key[:, :, None] @ spread) * key[:, :, None]).sum(dim=-1) * prompt.scaling**2 / 2
            logits.append(logit)
        places = prompt.places
        # Sinks, and what stands for no entry, have no part in the softmax.
        hidden = (places < self.sinks)[:, :, None]
        expected = torch.cat(logits, dim=-1).masked_fill_(hidden, -torch.inf).softmax(dim=-1).mean(dim=2)
        if self.value_norm:
            expected = expected * torch.linalg.vector_norm(prompt.value, dim=-1, dtype=torch.float32)
        return expected.masked_fill(places < self.sinks, torch.inf)
