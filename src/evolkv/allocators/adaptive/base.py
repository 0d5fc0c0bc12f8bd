"""The interface of allocators that lay out budgets anew for each prompt, from its attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evolkv.selectors import PromptAttention, Selector


@dataclass(frozen=True)
class AdaptiveAllocator(ABC):
    """Decides budgets for one prompt. A subclass is a frozen dataclass whose fields are the method's parameters.

    While a prompt is prefilled, `observe` notes of each layer what `LayerAllocator.layers` or `HeadAllocator.heads`
    later needs. The total is always met exactly, within floor and ceilings.
    """

    name: ClassVar[str]

    @property
    def observed_queries(self) -> int:
        """Number of the prompt's last queries that `observe` looks at."""
        return 0

    def observe(self, prompt: PromptAttention, scores: Tensor) -> NDArray[np.float64]:
        """Return what the allocator needs to know of a layer. Default: the scores.

        Args:
            prompt: the layer's attention inputs, of a single prompt.
            scores: the selector's scores of what the layer may keep, highest first, ``[kv_heads, entries]``; protected
                tokens score ``+inf``.
        """
        return scores.double().cpu().numpy()


class LayerAllocator(AdaptiveAllocator):
    """Shares a budget out among the layers."""

    @abstractmethod
    def layers(
        self, observed: Sequence[NDArray[np.float64]], budget: int, floor: int, ceilings: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return budgets ``[layers]`` with mean `budget`.

        Args:
            observed: of each layer.
            budget: mean entries per KV head.
            floor: the least a layer may get; where its ceiling is lower, it gets the ceiling.
            ceilings: the most each layer may get, ``[layers]``; together more than the budget.
        """


class HeadAllocator(AdaptiveAllocator):
    """Shares each layer's budget out among its heads."""

    @abstractmethod
    def heads(
        self,
        observed: Sequence[NDArray[np.float64]],
        layers: NDArray[np.int64],
        floor: int,
        ceilings: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Return budgets ``[layers, kv_heads]``, whose mean over the heads of each layer is that of `layers`.

        Args:
            observed: of each layer.
            layers: budgets of the layers, ``[layers]``.
            floor: the least a head may get; where its ceiling is lower, it gets the ceiling.
            ceilings: the most a head of each layer may get, ``[layers]``.
        """


#: An allocator, and the selector whose scores it looks at.
Observer = tuple[AdaptiveAllocator, Selector]
#: What each observer noted of one layer.
Observations = dict[Observer, NDArray[np.float64]]


def rank_and_observe(
    prompt: PromptAttention, selector: Selector, observers: Sequence[Observer]
) -> tuple[Tensor, Observations]:
    """Return a selector's ranking ``[1, kv_heads, tokens]`` of a prompt, and what its observers note of the scores."""
    # A sequence of padding alone has nothing to score.
    scores = selector.score(prompt) if prompt.num_tokens else prompt.key.new_zeros(prompt.key.shape[:3])
    ranking = selector.order(prompt, scores)
    mine = [observer for observer in observers if observer[1] == selector]
    if not mine:
        return ranking, {}
    best = scores.gather(-1, ranking[..., : prompt.most_held])[0]
    return ranking, {observer: observer[0].observe(prompt, best) for observer in mine}
