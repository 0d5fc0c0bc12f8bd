"""Prefill, once per example; what consecutive prompts share is computed once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.cache.recording import Observer, RecordingCache
from evolkv.selectors import Selector

# Below this many common tokens a second forward pass costs more than it saves.
_MIN_SHARED = 32


@dataclass(frozen=True)
class RecordedPrompt:
    """A prompt that has been prefilled, whole, with rankings. Valid until the next prefill.

    Args:
        cache: keys, values and rankings.
        tokens: length of the prompt.
        next_logits: logits of the first new token, ``[vocabulary]`` float32.
    """

    cache: RecordingCache
    tokens: int
    next_logits: Tensor


class Prefiller:
    """Prefills prompts one after another, starting each where it first differs from the one before.

    Keys and values of a common prefix are the same for both prompts, up to the rounding of differently shaped matrix
    products. Nothing is shared when a selector's score needs the queries of the whole prompt.

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
        self._observed = None if None in observed else max((n for n in observed if n is not None), default=0)
        self._cache: RecordingCache | None = None
        self._last: list[int] = []
        #: Tokens of all prompts so far, and how many of them were computed rather than shared.
        self.tokens_seen = self.tokens_computed = 0

    def __call__(self, input_ids: Tensor) -> RecordedPrompt:
        """Prefills one prompt.

        Args:
            input_ids: ``[1, tokens]``, at least one token and no more than the model's context.
        """
        ids = input_ids[0].tolist()
        shared = self._shared_with_last(ids)
        if self._cache is None or shared == 0:
            self._cache = RecordingCache(self.model, self.selectors, self.observers)
            shared = 0
        self._cache.cut(shared)
        with torch.inference_mode():
            output = self.model(
                input_ids[:, shared:].to(self.model.device),
                **self._cache.as_argument,
                use_cache=True,
                logits_to_keep=1,
            )
        self._last = ids
        self.tokens_seen += len(ids)
        self.tokens_computed += len(ids) - shared
        return RecordedPrompt(self._cache, len(ids), output.logits[0, -1].float())

    def _shared_with_last(self, ids: list[int]) -> int:
        if self._observed is None:
            return 0
        limit = min(len(ids) - max(1, self._observed), len(self._last))
        shared = next((i for i in range(max(0, limit)) if ids[i] != self._last[i]), max(0, limit))
        return shared if shared >= _MIN_SHARED else 0
