"""A cache that keeps a whole prompt and each selector's ranking of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from evolkv.allocators.adaptive.base import Observations, Observer, rank_and_observe
from evolkv.cache.compressed import CompressedCache
from evolkv.cache.hook import AttendingLayer, Attention
from evolkv.cache.hooked import HookedCache, layer_contexts
from evolkv.cache.math import continue_prompt, extra_term
from evolkv.cache.rereading import check_rereading, reread
from evolkv.cache.resolve import make_layers
from evolkv.cache.state import StateLayer
from evolkv.models import model_facts
from evolkv.selectors import LayerContext, PromptAttention, Selector


class RecordingLayer(DynamicLayer, AttendingLayer):
    """Holds all keys and values in order of position, and the rankings of the prompt seen last.

    Args:
        selectors: whose rankings to record.
        observers: allocators, each with the selector whose scores it looks at; what they observe is recorded.
        sliding_window: how many tokens a query of this layer sees, or None for all. The layer holds the whole prompt
            all the same, so that it can be cut back to a prefix.
        context: where the layer is.
    """

    context: LayerContext

    def __init__(
        self,
        selectors: list[Selector],
        observers: list[Observer],
        sliding_window: int | None,
        context: LayerContext,
    ):
        super().__init__(sliding_window)
        self.selectors, self.observers = selectors, observers
        self.context = context
        #: By selector, ``[1, kv_heads, tokens]``.
        self.rankings: dict[Selector, Tensor] = {}
        self.observations: Observations = {}
        #: The prompt, while selectors wait for the model to read it again.
        self._waiting: PromptAttention | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and mark the keys for `attend`."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return self.send(keys, values)

    def attend(
        self, own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the model's own attention, and record the rankings."""
        prompt = self.inputs(query, key, value, kwargs)
        self._record(prompt)
        if prompt.first_query == 0 or len(query) > 1 or extra_term(kwargs) is not None:
            return own(module, query, key, value, mask, **kwargs)
        return continue_prompt(prompt), None

    def _record(self, prompt: PromptAttention) -> None:
        self.rankings, self.observations = {}, {}
        for selector in self.selectors:
            if not selector.rereads:
                self.rank(prompt, selector)
        if len(self.rankings) < len(self.selectors):
            looks = any(allocator.observed_queries for allocator, selector in self.observers if selector.rereads)
            self._waiting = prompt if looks else prompt.without_queries()
        self.context.leave()

    def rank(self, prompt: PromptAttention, selector: Selector) -> None:
        """Record a selector's ranking, and what allocators observe of its scores."""
        self.rankings[selector], observed = rank_and_observe(prompt, selector, self.observers)
        self.observations |= observed

    def rank_reread(self, selector: Selector, repeated: Tensor) -> None:
        """Record the ranking of a selector that `rereads`, from what each entry received, ``[1, kv_heads, tokens]``."""
        assert self._waiting is not None
        self.rank(replace(self._waiting, repeated=repeated), selector)
        if len(self.rankings) == len(self.selectors):
            self._waiting = None

    def held(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the prompt, ``[1, kv_heads, tokens, dim]`` each."""
        keys, values = self.keys, self.values
        assert isinstance(keys, Tensor)
        assert isinstance(values, Tensor)
        return keys, values

    def cut(self, tokens: int) -> None:
        """Forget everything from position `tokens` on."""
        if self.is_initialized:
            self.keys, self.values = (held[:, :, :tokens] for held in self.held())


@dataclass(frozen=True)
class RecordedPrompt:
    """A prompt that has been prefilled, whole, with rankings. The prompts that its cache reads later do not change it.

    Args:
        kv_layers: keys, values and rankings, by layer.
        state_layers: what the other layers of a hybrid model keep.
        tokens: length of the prompt.
        next_logits: logits of the first new token, ``[vocabulary]`` float32.
        reread: tokens that the model read behind the prompt for a selector, where it read any.
    """

    kv_layers: list[RecordingLayer]
    state_layers: list[StateLayer]
    tokens: int
    next_logits: Tensor
    reread: Mapping[Selector, int] = field(default_factory=dict)

    def prefill_factor(self, selector: Selector) -> float:
        """Return how many tokens were read for each of the prompt's, so that a selector could rank it."""
        return 1 + self.reread.get(selector, 0) / self.tokens

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = [x for layer in self.kv_layers for x in (*layer.held(), *layer.rankings.values())]
        return sum(x.nbytes for x in tensors) + sum(state.nbytes for state in self.state_layers)


class RecordingCache(HookedCache):
    """Keeps one prompt whole, with the rankings of several selectors.

    Args:
        model: a transformers decoder-only model.
        selectors: whose rankings to record.
        observers: see `RecordingLayer`; their selectors must be among `selectors`.
    """

    kv_layers: list[RecordingLayer]

    def __init__(self, model: PreTrainedModel, selectors: list[Selector], observers: Sequence[Observer] = ()):
        places = zip(model_facts(model).sliding_windows, layer_contexts(model), strict=True)
        super().__init__(
            model, [RecordingLayer(selectors, list(observers), window, context) for window, context in places]
        )
        self._rereading = [each for each in selectors if each.rereads]
        for selector in self._rereading:
            check_rereading(model, selector)
        #: Of the text so far, where a selector has the model read it again.
        self._ids: list[int] = []
        self._reread: dict[Selector, int] = {}

    def read_again(self, arguments: Mapping[str, Any]) -> None:
        """See `HookedCache.read_again`."""
        if not self._rereading:
            return
        self._ids += arguments["input_ids"][0].tolist()
        for selector in self._rereading:
            held = [layer.held() for layer in self.kv_layers]
            repeated, self._reread[selector] = reread(self.model(), selector, self._ids, held)
            for layer, received in zip(self.kv_layers, repeated, strict=True):
                layer.rank_reread(selector, received)

    def recorded(self, next_logits: Tensor) -> RecordedPrompt:
        """Return the prompt as it is now, with the logits ``[vocabulary]`` that it ended in."""
        # What a layer holds is replaced by the next prompt, never written to.
        layers = [copy.copy(layer) for layer in self.kv_layers]
        states = [state.copy() for state in self.state_layers]
        return RecordedPrompt(layers, states, self.get_seq_length(), next_logits, dict(self._reread))

    def cut(self, tokens: int) -> None:
        """Forget everything from position `tokens` on, in every layer; a recurrent state cannot be taken back."""
        assert not self.state_layers or tokens in (0, self.get_seq_length())
        del self._ids[tokens:]
        for layer in self.kv_layers:
            layer.cut(tokens)


def from_rankings(
    model: PreTrainedModel,
    keys_values: list[tuple[Tensor, Tensor]],
    rankings: list[Tensor],
    budgets: np.ndarray,
    selector: Selector,
    room: int = 0,
    states: Sequence[StateLayer] = (),
) -> CompressedCache:
    """Return a cache of one prompt under several budgets, a sequence for each, from a prefill that was recorded.

    Args:
        model: the model.
        keys_values: by layer with keys and values, keys and values ``[1, kv_heads, tokens, dim]``.
        rankings: by layer, ``[sequences, kv_heads, tokens]``.
        budgets: ``[sequences, layers, kv_heads]``.
        selector: recorded with the layers; the rankings decide.
        room: new tokens to reserve memory for.
        states: what the prompt left in the other layers of a hybrid model, one sequence each.
    """
    repeated = [StateLayer.merge([state] * len(budgets)) for state in states]
    cache = CompressedCache.with_layers(model, make_layers(model, np.moveaxis(budgets, 1, 0), selector), repeated)
    for layer, (key, value), ranking in zip(cache.kv_layers, keys_values, rankings, strict=True):
        layer.store_ranked(key, value, ranking, room)
    return cache
