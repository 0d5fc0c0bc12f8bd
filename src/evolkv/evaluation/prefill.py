"""Prefill, once per example: a prefix that consecutive prompts share is computed once for all of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.cache.compressed import CompressedCache
from evolkv.cache.recording import Observer, RecordedPrompt, RecordingCache, from_rankings
from evolkv.cache.rereading import tokens_read_again
from evolkv.models.forward import input_device
from evolkv.models.layers import looks_ahead
from evolkv.models.rotary import stretching
from evolkv.selectors import Selector, get_selector

# Below this many common tokens a second forward pass costs more than it saves.
_MIN_SHARED = 32


class RecordingStore:
    """Prompts that are searched under one selector after another, each prefilled once as long as there is room.

    Args:
        room: bytes that it may hold.
    """

    def __init__(self, room: int):
        self._room = room
        self._held: dict[str, RecordedPrompt] = {}
        self._lock = threading.Lock()

    def get(self, key: str, selector: Selector) -> RecordedPrompt | None:
        """Return the prompt put there under a key, if it has a selector's ranking; else None."""
        prompt = self._held.get(key)
        ranked = prompt is not None and all(selector in layer.rankings for layer in prompt.kv_layers)
        return prompt if ranked else None

    def put(self, key: str, recorded: RecordedPrompt) -> None:
        """Hold a prompt, if there is room for it."""
        with self._lock:
            if key not in self._held and recorded.nbytes <= self._room:
                self._room -= recorded.nbytes
                self._held[key] = recorded


class Prefiller:
    """Prefills prompts one after another, starting each where it first differs from the one before.

    Keys and values of a common prefix are the same for both prompts, up to the rounding of differently shaped matrix
    products. Nothing is shared when a selector's score needs the queries of the whole prompt, where tokens of a prompt
    look ahead, or in a hybrid model, whose recurrent states cannot be taken back to an earlier token.

    Args:
        model: the model.
        selectors: whose rankings to record.
        observers: allocators that are to see the prompts, each with the selector (one of `selectors`) it goes by.
    """

    def __init__(self, model: PreTrainedModel, selectors: Sequence[Selector], observers: Sequence[Observer] = ()):
        self.model = model
        self.selectors = list(dict.fromkeys(selectors))
        self.observers = list(dict.fromkeys(observers))
        observed = [selector.observed_queries for selector in self.selectors]
        observed += [allocator.observed_queries for allocator, _ in self.observers]
        unknown = None in observed or looks_ahead(model)
        self._observed = None if unknown else max((n for n in observed if n is not None), default=0)
        self._cache: RecordingCache | None = None
        self._last: list[int] = []

    def __call__(self, input_ids: Tensor) -> RecordedPrompt:
        """Prefill one prompt.

        Args:
            input_ids: ``[1, tokens]``, at least one token and no more than the model's context.
        """
        ids = input_ids[0].tolist()
        shared = self._shared(ids)
        if self._cache is None or shared == 0:
            self._cache = RecordingCache(self.model, self.selectors, self.observers)
            shared = 0
        # If this fails, nobody knows what the cache holds.
        self._last = []
        self._cache.cut(shared)
        device = input_device(self.model)
        with torch.inference_mode():
            output = self.model(
                input_ids[:, shared:].to(device),
                # What follows is placed from 0, too; by itself a model may count from 1, or go by an earlier image.
                position_ids=torch.arange(shared, len(ids), device=device)[None],
                cache=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._last = ids
        return self._cache.recorded(output.logits[0, -1].float())

    def tokens_to_compute(self, prompts: Sequence[Tensor]) -> int:
        """Return how many tokens are computed where these prompts, ``[1, tokens]`` each, are all that is prefilled.

        Those that a selector has the model read again count too: nothing of them is shared.
        """
        cache = RecordingCache(self.model, self.selectors, self.observers)
        ahead = Prefiller(self.model, self.selectors, self.observers)
        ahead._cache = cache
        total = 0
        for ids in (each[0].tolist() for each in prompts):
            total += len(ids) - ahead._shared(ids)
            total += sum(tokens_read_again(self.model, selector, ids) for selector in self.selectors)
            ahead._last = ids
        return total

    def _shared(self, ids: list[int]) -> int:
        """Return how many tokens at its start a prompt takes from the one before."""
        if self._observed is None or (self._cache is not None and self._cache.state_layers):
            return 0
        for kind, longest in stretching(self.model.get_decoder().config):
            both = {len(ids) > longest, len(self._last) > longest}
            # Beyond its limit a text is turned in another way, or each length in its own.
            if len(both) > 1 or (kind != "longrope" and True in both):
                return 0
        limit = min(len(ids) - max(1, self._observed), len(self._last))
        shared = next((i for i in range(max(0, limit)) if ids[i] != self._last[i]), max(0, limit))
        return shared if shared >= _MIN_SHARED else 0


def whole_cache(model: PreTrainedModel, recorded: RecordedPrompt, room: int) -> CompressedCache:
    """Return a cache that holds all of a recorded prompt, as the full cache does.

    Args:
        model: the model.
        recorded: the prompt; it stays as it is.
        room: new tokens to reserve memory for.
    """
    keys_values = [layer.held() for layer in recorded.kv_layers]
    # The newest tokens first: those are what a layer with a sliding window still sees.
    newest = [torch.arange(recorded.tokens - 1, -1, -1, device=keys.device) for keys, _ in keys_values]
    rankings = [each.expand(1, keys.shape[1], -1) for each, (keys, _) in zip(newest, keys_values, strict=True)]
    budgets = np.full((1, len(rankings), rankings[0].shape[1]), recorded.tokens)
    selector = get_selector("streaming_llm")
    return from_rankings(model, keys_values, rankings, budgets, selector, room, recorded.state_layers)
