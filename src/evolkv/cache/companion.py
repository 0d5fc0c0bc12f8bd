"""A small model that reads along with a large one: its full cache, and the attention that entries receive in it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from evolkv.cache.by_group import ByGroupLayer
from evolkv.cache.hook import Attention
from evolkv.cache.hooked import HookedCache, layer_contexts
from evolkv.cache.masks import real_tokens
from evolkv.cache.math import LogitTerms, attention_weights
from evolkv.cache.rows import RowGroup
from evolkv.cache.state import StateLayer
from evolkv.errors import UsageError
from evolkv.models import load_model, model_facts
from evolkv.models.forward import input_device
from evolkv.models.loading import loaded_from, tokenizer_of
from evolkv.selectors import PromptAttention, Selector, StreamingLLM
from evolkv.selectors.smallkv import with_companion

# Of the tokens on which heads are matched, a tenth are those with the most attention.
_TOP = 10

#: Companions by name, dtype and device; those of `register_companion` by name alone.
_companions: dict[Any, PreTrainedModel] = {}
#: The names of companions that are known to have a model's vocabulary.
_fitting: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def register_companion(name: str, model: PreTrainedModel) -> None:
    """Have a model that is loaded already serve as the companion of that name, in this process.

    Args:
        name: as in ``smallkv:model=NAME``.
        model: the model.
    """
    _companions[name] = model
    for names in _fitting.values():
        names.discard(name)


def companion_of(model: PreTrainedModel, selector: Selector) -> PreTrainedModel | None:
    """Return the companion that a selector names, loaded once in a process; None where it takes none.

    Raises:
        UsageError: if it needs one and names none; if that has another vocabulary than the model, or a sliding window
            in every layer.
        ModelError, RunError: if it cannot be loaded; see `load_model`.
    """
    if selector.companion is None:
        return None
    name = with_companion(selector, None).companion
    assert name is not None
    with _lock:
        key: Any = name
        if key not in _companions:
            key = (name, model.dtype, input_device(model))
        if key not in _companions:
            origin = loaded_from(model)
            trusted = origin is not None and origin.trust_remote_code
            _companions[key], _ = load_model(name, model.dtype, input_device(model), trust_remote_code=trusted)
        companion = _companions[key]
        if name not in (fitting := _fitting.setdefault(model, set())):
            _check(model, companion, name)
            fitting.add(name)
    return companion


def _check(model: PreTrainedModel, companion: PreTrainedModel, name: str) -> None:
    """Raise `UsageError` for a companion that cannot read a model's tokens, or sees too few of them."""
    pair = tokenizer_of(model), tokenizer_of(companion)
    if None in pair:
        sizes = [each.config.get_text_config(decoder=True).vocab_size for each in (model, companion)]
        differs = sizes[0] != sizes[1]
    else:
        vocabularies = [each.get_vocab() for each in pair]
        sizes, differs = [len(each) for each in vocabularies], vocabularies[0] != vocabularies[1]
    if differs:
        raise UsageError(
            f"companion {name!r} has another vocabulary than the model ({sizes[1]:,} tokens, the model {sizes[0]:,}); "
            "give a smaller model of the same family, whose tokens have the same ids"
        )
    if all(window is not None for window in model_facts(companion).sliding_windows):
        raise UsageError(
            f"companion {name!r} has a sliding window in every layer, and cannot tell what older tokens are worth; "
            "give a model that attends to all of them in some layer"
        )


def attention_received(prompt: PromptAttention, tokens: int) -> Tensor:
    """Return what each of the first tokens of a prompt receives from all of these, ``[batch, heads, tokens]`` float32.

    Args:
        prompt: the attention inputs, queries of all tokens included.
        tokens: how many of the first ones count.
    """
    total = prompt.key.new_zeros((*prompt.query.shape[:2], tokens), dtype=torch.float32)
    for block in prompt.blocks(0, tokens):
        total[..., : block.stop] += prompt.probabilities(block.start, block.stop).sum(dim=3).flatten(1, 2)
    return total


def matching_heads(own: Tensor, theirs: Tensor) -> Tensor:
    """Return for each head the companion's head with the most similar set of most attended tokens, ``[heads]`` int64.

    Args:
        own: attention that each token receives in the model's heads, ``[heads, tokens]``.
        theirs: the same in the companion's, ``[their heads, tokens]``.
    """
    tokens = own.shape[1]
    count = min(tokens, max(1, tokens // _TOP))
    sets = [torch.zeros_like(each).scatter_(1, each.topk(count).indices, 1) for each in (own, theirs)]
    # All sets have one size, so the Jaccard index grows with what two share. The distance is below 1: it decides ties.
    distance = torch.cdist(own, theirs, p=1) / (2 * tokens + 1)
    return (sets[0] @ sets[1].T - distance).argmax(dim=1)


class WatchingLayer(ByGroupLayer):
    """A layer of a companion's cache: it holds every token, and notes what the entries of the prompt receive.

    After the prompt, tokens come one by one. A layer with a sliding window notes nothing.

    Attributes:
        compared: number of first prompt tokens on which heads are matched.
        noted: the attention that the tokens of the last call paid to each entry of the prompt, ``[batch, heads,
            tokens]`` float32; shorter prompts have zeros behind.
        first_received: for each sequence, what its first tokens received from each other, ``[heads, compared]``.
    """

    compared: int = 1

    def _clear(self) -> None:
        super()._clear()
        self.noted: Tensor | None = None
        self.first_received: list[Tensor] = []

    def store_prompt(self, prompt: PromptAttention, padding: Tensor | None) -> None:
        """See `CompressedLayer.store_prompt`."""
        super().store_prompt(prompt, padding)
        if self.is_sliding:
            return
        noted, self.first_received = [], []
        for one in prompt.sequences(real_tokens(padding, prompt.key)):
            received = attention_received(one, one.num_tokens)[0]
            noted.append(F.pad(received, (0, max(self.prompt_lengths) - one.num_tokens)))
            self.first_received.append(attention_received(one, min(self.compared, one.num_tokens))[0])
        self.noted = torch.stack(noted)

    def _way_of(self, row: int, group: RowGroup) -> bool:
        return True

    def _decode(
        self, own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.is_sliding:
            return super()._decode(own, module, query, key, value, mask, **kwargs)
        batch, heads = query.shape[:2]
        rows = (batch * self.num_kv_heads, heads // self.num_kv_heads, max(self.prompt_lengths))
        self.noted = query.new_zeros(rows, dtype=torch.float32)
        output = super()._decode(own, module, query, key, value, mask, **kwargs)
        self.noted = self.noted.view(batch, heads, -1)
        if self.real is not None:
            self.noted = self.noted * self.real[:, -1:, None]
        return output

    def _attend_group(self, number: int, query: Tensor, visible: Tensor | None, terms: LogitTerms) -> Tensor:
        group = self.groups[number]
        weights = attention_weights(query, group.keys, visible, terms)
        prompt = group.keys.shape[1] - self.appended
        assert self.noted is not None
        self.noted[group.rows, :, :prompt] = weights[..., :prompt]
        return weights.to(query.dtype) @ group.values


class CompanionCache(HookedCache):
    """A companion's full cache of a text, with the attention that the prompt's entries have received in it.

    Its heads are those of all layers without a sliding window, in order.

    Args:
        model: the companion.
        compared: number of first prompt tokens on which heads are matched.
        layers, states: what it holds; default: nothing.

    Attributes:
        received: attention that the prompt's entries have received from all tokens so far, ``[batch, heads, tokens]``.
        latest: the same from the last token alone, while the large model reads that.
        first_received: for each sequence, what its first tokens received from each other, ``[heads, compared]``, while
            the large model reads the prompt.
    """

    kv_layers: list[WatchingLayer]

    def __init__(
        self,
        model: PreTrainedModel,
        compared: int,
        layers: list[WatchingLayer] | None = None,
        states: Sequence[StateLayer] | None = None,
    ):
        if layers is None:
            facts = model_facts(model)
            everything = np.full(facts.num_kv_heads, np.iinfo(np.int32).max)
            # It ranks the newest tokens first: those are what a layer with a sliding window still sees.
            places = zip(facts.sliding_windows, layer_contexts(model), strict=True)
            layers = [WatchingLayer(everything, StreamingLLM(), window, context) for window, context in places]
        for layer in layers:
            layer.compared = compared
        super().__init__(model, layers, states)
        self.compared = compared
        self.received: Tensor | None = None
        self.latest: Tensor | None = None
        self.first_received: list[Tensor] = []

    def read(self, arguments: Mapping[str, Any]) -> None:
        """Read the tokens of a call of the large model, of which `arguments` are those of its decoder.

        Raises:
            UsageError: if the call has embeddings or a prepared mask, or more tokens than the companion can read.
        """
        if arguments.get("input_ids") is None:
            raise UsageError(
                "a companion model reads token ids, but this call brings inputs_embeds; give input_ids, or use another "
                "selector than smallkv"
            )
        mask = arguments.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise UsageError(
                "a companion model needs an attention mask [batch, tokens], or none; this call brings a prepared one; "
                "leave it out, or use another selector than smallkv"
            )
        model = self.model()
        seen, limit = self.get_seq_length() + arguments["input_ids"].shape[1], model_facts(model).max_context
        if seen > limit:
            raise UsageError(
                f"the text has {seen:,} tokens by now, but the companion can read {limit:,}; stop before, or give a "
                "companion with a longer context"
            )
        names = ("input_ids", "attention_mask", "position_ids")
        given = {name: arguments[name].to(input_device(model)) for name in names if arguments.get(name) is not None}
        # The decoder alone, which computes no logits.
        with torch.no_grad():
            model.get_decoder()(**given, use_cache=True, cache=self)
        noted = [layer.noted for layer in self.kv_layers if layer.noted is not None]
        self.latest = torch.cat([each.to(noted[0].device) for each in noted], dim=1)
        if self.received is None:
            columns = zip(*(layer.first_received for layer in self.kv_layers if layer.first_received), strict=True)
            self.first_received = [torch.cat([each.to(noted[0].device) for each in column]) for column in columns]
        self.received = self.latest if self.received is None else self.received + self.latest
        for layer in self.kv_layers:
            layer.noted, layer.first_received = None, []

    def forget_call(self) -> None:
        """Forget what only the call at hand needs."""
        self.latest, self.first_received = None, []

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these numbers, in that order; a number may occur several times."""
        super().batch_select_indices(indices)
        if self.received is not None:
            # As wide as the longest prompt that is left.
            width = max(self.kv_layers[0].prompt_lengths)
            self.received = self.received[indices.to(self.received.device), :, :width]

    def copy(self) -> CompanionCache:
        """Return a cache that holds the same and goes its own way; see `CompressedCache.copy`."""
        model = self.model()
        layers: list[Any] = []
        for layer, context in zip(self.kv_layers, layer_contexts(model), strict=True):
            layers.append(layer.copy(layers, context))
        twin = CompanionCache(model, self.compared, layers, [state.copy() for state in self.state_layers])
        twin.received = self.received
        return twin

    @classmethod
    def merge(cls, caches: Sequence[CompanionCache], room: int = 0) -> CompanionCache:
        """Return one cache with the sequences of several, right after their prompts; see `CompressedCache.merge`."""
        columns = zip(*(each.kv_layers for each in caches), strict=True)
        layers: list[Any] = [WatchingLayer.merge(column, room) for column in columns]
        states = [StateLayer.merge(column) for column in zip(*(each.state_layers for each in caches), strict=True)]
        merged = cls(caches[0].model(), caches[0].compared, layers, states)
        parts = [each.received for each in caches if each.received is not None]
        width = max(part.shape[2] for part in parts)
        merged.received = torch.cat([F.pad(part, (0, width - part.shape[2])) for part in parts])
        return merged

    @property
    def nbytes(self) -> int:
        """Return the bytes of keys, values and received attention, reserved room included."""
        return sum(layer.kv_bytes for layer in self.kv_layers) + (0 if self.received is None else self.received.nbytes)

    @property
    def bytes_by_sequence(self) -> list[int]:
        """Return the same for each sequence, without the room."""
        by_row = [layer.bytes_by_row()[0].view(layer.batch, -1) for layer in self.kv_layers]
        held = torch.cat(by_row, dim=1).sum(dim=1) + (0 if self.received is None else self.received[0].nbytes)
        found: list[int] = held.tolist()
        return found
