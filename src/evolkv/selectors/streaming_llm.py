"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evolkv.errors import UsageError
from evolkv.selectors.base import Selector
from evolkv.selectors.prompt import PromptAttention


@dataclass(frozen=True)
class StreamingLLM(Selector):
    """Keeps the first tokens (attention sinks) and the most recent ones, whatever they say.

    Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453,
    section 3.2. Kept keys keep their rotary phase (the paper re-rotates them to cache positions).

    Args:
        sinks: number of first tokens that are always kept.
    """

    name: ClassVar[str] = "streaming_llm"
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise UsageError(f"streaming_llm: sinks is {self.sinks}; it must be 0 or more")

    @property
    def min_budget(self) -> int:
        """The sinks and the last token."""
        return self.sinks + 1

    @property
    def observed_queries(self) -> int:
        """None of them."""
        return 0

    def score(self, prompt: PromptAttention) -> Tensor:
        """The position itself; sinks come first."""
        places = prompt.places
        return places.float().masked_fill(places < self.sinks, torch.inf)
