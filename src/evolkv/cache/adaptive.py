"""Layers whose budgets are laid out for each prompt anew, from its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

import numpy as np
import torch
from torch import Tensor

from evolkv.allocators.adaptive.base import Observations, rank_and_observe
from evolkv.cache.layer import CompressedLayer
from evolkv.cache.masks import real_tokens
from evolkv.errors import UsageError
from evolkv.methods import Method
from evolkv.selectors import LayerContext, PromptAttention


@dataclass(frozen=True)
class _Waiting:
    """A layer's prompts, whole, until their budgets are known; the lists have an entry for each sequence."""

    key: Tensor
    value: Tensor
    rankings: list[Tensor]
    observed: list[Observations]
    ceilings: list[int]
    real: list[Tensor] | None


class AdaptiveLayer(CompressedLayer):
    """A layer of a cache whose budgets a method such as ``adakv+snapkv`` decides for each prompt.

    Where only the heads of a layer share its budget (Ada-KV), a layer is cut down as soon as it has seen the prompt.
    Where layers compete (CAKE, DynamicKV) none is cut before the last one has seen it: until then the whole prompt's
    keys and values are in memory.

    Args:
        method: the method; it has an allocator that goes by the prompt.
        start: what the method starts from in this layer, ``[kv_heads]``.
        layers: all layers of the cache in order; the caller adds this one to them.
        sliding_window: the layer's window in tokens, or None.
        context: where the layer is in the model.
    """

    def __init__(
        self,
        method: Method,
        start: np.ndarray,
        layers: Sequence[AdaptiveLayer],
        sliding_window: int | None,
        context: LayerContext,
    ):
        assert method.selector is not None
        self._method, self.start, self._layers = method, start, layers
        self.keeps_queries = any(allocator.observed_queries for allocator, _ in method.observers)
        self._waiting: _Waiting | None = None
        super().__init__(start, method.selector, sliding_window, context)

    def reset(self) -> None:
        """Empties the layer, which is then ready for another prompt."""
        super().reset()
        self._waiting = None

    def activate_past_recording(self) -> None:
        """See `CompressedLayer.activate_past_recording`; drafts cannot wait until layers that compete are cut down.

        Raises:
            UsageError: if layers compete.
        """
        if self._method.layers is not None:
            raise UsageError(
                f"method {self._method.name!r} cuts no layer before all have read the prompt, but assisted decoding "
                "brings drafts along with it; generate without assistance, or under a profile"
            )
        super().activate_past_recording()

    def copy(self, layers: list[CompressedLayer], context: LayerContext | None) -> Self:
        """See `CompressedLayer.copy`."""
        twin = super().copy(layers, context)
        twin._layers = cast("list[AdaptiveLayer]", layers)
        return twin

    @property
    def is_of_one_text(self) -> bool:
        """Return False: the method lays out budgets for each prompt."""
        return False

    def covers(self, tokens: int) -> bool:
        """Return False: who looks at the scores wants them of every prompt."""
        return False

    def store_prompt(self, prompt: PromptAttention, padding: Tensor | None) -> None:
        """See `CompressedLayer.store_prompt`; what layers compete for is stored with the last of them."""
        with torch.no_grad():
            self._waiting = self._see(prompt, padding)
        if self._method.layers is None:
            _decide(self._method, [self])
        elif self is self._layers[-1]:
            _decide(self._method, self._layers)

    def _see(self, prompt: PromptAttention, padding: Tensor | None) -> _Waiting:
        real = real_tokens(padding, prompt.key)
        prompts = prompt.sequences(real)
        seen = [rank_and_observe(each, self.selector, self._method.observers) for each in prompts]
        rankings, observed = [ranking for ranking, _ in seen], [noted for _, noted in seen]
        return _Waiting(prompt.key, prompt.value, rankings, observed, [each.most_held for each in prompts], real)

    def start_at(self, tokens: int) -> np.ndarray:
        """Return what the method starts from for a prompt of so many tokens, ``[kv_heads]``."""
        return self.start if self.by_length is None else self.by_length(tokens)

    def _lay_out(self, lengths: list[int]) -> None:
        """Nothing: the method has laid out budgets for each prompt."""

    def waiting(self) -> _Waiting:
        """Return the prompts that await their budgets."""
        assert self._waiting is not None
        return self._waiting

    def cut(self, budgets: np.ndarray) -> None:
        """Keeps of the prompts that wait what ``[batch, kv_heads]`` budgets allow."""
        held = self.waiting()
        self.budgets, self._waiting = budgets, None
        self._store(held.key, held.value, list(held.rankings), held.real)


def _decide(method: Method, layers: Sequence[AdaptiveLayer]) -> None:
    """Lays out the budgets of layers that are decided together, and cuts these down."""
    waiting = [layer.waiting() for layer in layers]
    budgets = [
        method.budgets_for(
            [held.observed[i] for held in waiting],
            np.stack([layer.start_at(ranking.shape[-1]) for layer in layers]),
            np.array([held.ceilings[i] for held in waiting]),
        )
        for i, ranking in enumerate(waiting[0].rankings)
    ]
    for number, layer in enumerate(layers):
        layer.cut(np.stack([rows[number] for rows in budgets]))
