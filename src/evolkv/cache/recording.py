"""A cache that keeps a whole prompt and each selector's ranking of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from evolkv.allocators.adaptive import Observations, Observer, rank_and_observe
from evolkv.cache.compressed import CompressedCache
from evolkv.cache.hook import Attention, tag
from evolkv.cache.hooked import HookedCache, layer_contexts
from evolkv.cache.math import attention, extra_term, fold_sinks, logit_terms
from evolkv.cache.resolve import make_layers
from evolkv.cache.state import StateLayer
from evolkv.models import model_facts
from evolkv.selectors import LayerContext, PromptAttention, Selector

# Queries in a block when a prompt is continued; measured fastest of 100, 200 and 400 on a CPU.
_BLOCK = 200


class RecordingLayer(DynamicLayer):
    """Holds all keys and values in order of position, and the rankings of the prompt seen last.

    Args:
        selectors: whose rankings to record.
        observers: allocators, each with the selector whose scores it looks at; what they observe is recorded.
        sliding_window: how many tokens a query of this layer sees, or None for all. The layer holds the whole prompt
            all the same, so that it can be cut back to a prefix.
        context: where the layer is.
    """

    def __init__(
        self,
        selectors: list[Selector],
        observers: list[Observer],
        sliding_window: int | None,
        context: LayerContext,
    ):
        super().__init__()
        self.selectors, self.observers = selectors, observers
        self.context = context
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        #: By selector, ``[1, kv_heads, tokens]``.
        self.rankings: dict[Selector, Tensor] = {}
        self.observations: Observations = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, and mark the keys for `attend`."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return tag(keys, values, self)

    def attend(
        self, own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the model's own attention, and record the rankings."""
        prompt = PromptAttention(
            query,
            key,
            value,
            sliding_window=self.sliding_window,
            first_query=key.shape[2] - query.shape[2],
            layer=self.context,
            **logit_terms(query, kwargs),
        )
        self._record(prompt)
        if prompt.first_query == 0 or len(query) > 1 or extra_term(kwargs) is not None:
            return own(module, query, key, value, mask, **kwargs)
        return _continue(prompt), None

    def _record(self, prompt: PromptAttention) -> None:
        self.rankings, self.observations = {}, {}
        for selector in self.selectors:
            self.rankings[selector], observed = rank_and_observe(prompt, selector, self.observers)
            self.observations |= observed
        self.context.leave()

    def most_held(self, tokens: int) -> int:
        """Return the most entries that a head may keep of a prompt."""
        return min(tokens, self.sliding_window or tokens)

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


def _continue(prompt: PromptAttention) -> Tensor:
    """Return the attention of the end of a prompt to all of it, ``[1, queries, heads, dim]``, in blocks of queries.

    A mask over the whole prompt would have every query look at every later token only to drop it; a block looks no
    further than its own end. And the query heads of a KV head are folded, so that keys are not repeated for them.
    """
    key, value, heads = prompt.key[0], prompt.value[0], prompt.key.shape[1]
    device = key.device
    outputs = []
    for start in range(prompt.first_query, prompt.num_tokens, _BLOCK):
        stop = min(start + _BLOCK, prompt.num_tokens)
        rows = prompt.query[0, :, start - prompt.first_query : stop - prompt.first_query]
        fold = len(rows) // heads
        asking = torch.arange(start, stop, device=device)[:, None]
        position = torch.arange(stop, device=device)
        visible = position <= asking
        if prompt.sliding_window is not None:
            visible &= position > asking - prompt.sliding_window
        folded = rows.reshape(heads, fold * (stop - start), -1)
        visible = visible.repeat(fold, 1)[None]
        sinks = fold_sinks(prompt.sinks, heads, stop - start)
        output = attention(folded, key[:, :stop], value[:, :stop], visible, prompt.scaling, prompt.softcap, sinks)
        outputs.append(output.view(heads * fold, stop - start, -1))
    return torch.cat(outputs, dim=1).transpose(0, 1)[None].contiguous()


@dataclass(frozen=True)
class RecordedPrompt:
    """A prompt that has been prefilled, whole, with rankings. The prompts that its cache reads later do not change it.

    Args:
        kv_layers: keys, values and rankings, by layer.
        state_layers: what the other layers of a hybrid model keep.
        tokens: length of the prompt.
        next_logits: logits of the first new token, ``[vocabulary]`` float32.
    """

    kv_layers: list[RecordingLayer]
    state_layers: list[StateLayer]
    tokens: int
    next_logits: Tensor

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

    def recorded(self, next_logits: Tensor) -> RecordedPrompt:
        """Return the prompt as it is now, with the logits ``[vocabulary]`` that it ended in."""
        # What a layer holds is replaced by the next prompt, never written to.
        layers = [copy.copy(layer) for layer in self.kv_layers]
        states = [StateLayer.merge([state]) for state in self.state_layers]
        return RecordedPrompt(layers, states, self.get_seq_length(), next_logits)

    def cut(self, tokens: int) -> None:
        """Forget everything from position `tokens` on, in every layer; a recurrent state cannot be taken back."""
        assert not self.state_layers or tokens in (0, self.get_seq_length())
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
