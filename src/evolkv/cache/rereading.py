"""Reading a prompt again, for selectors that rank by what its entries receive meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evolkv.cache.hook import AttendingLayer, Attention
from evolkv.cache.hooked import HookedCache, layer_contexts
from evolkv.cache.layer import CompressedLayer
from evolkv.cache.masks import padding_of
from evolkv.cache.math import continue_prompt, extra_term
from evolkv.errors import TaskError, UsageError
from evolkv.models import model_facts
from evolkv.models.chat import around_message
from evolkv.models.forward import input_device
from evolkv.models.loading import tokenizer_of
from evolkv.selectors import LayerContext, Passage, PromptAttention, Selector, Words

# The wording of the paper (section 3.2).
_FIRST = "\n\nRepeat the previous context exactly."
_LATER = "\n\nRepeat the part of the previous context exactly, starting with"

_words: weakref.WeakKeyDictionary[nn.Module, Words] = weakref.WeakKeyDictionary()


def words_of(model: PreTrainedModel, selector: Selector) -> Words:
    """Return the words that a selector asks a model with, in its tokens; the answer begins as its chat template has it.

    Raises:
        UsageError: if the model's tokenizer is not known, and cannot be loaded; or if its chat template cannot be used.
    """
    if (known := _words.get(model)) is not None:
        return known
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise UsageError(
            f"selector {selector.name!r} asks the model in words to repeat the prompt, and the tokenizer of this model "
            f"is not known; load the model with evolkv.load_model, or leave out the words with "
            f"{selector.name}:words=false"
        )
    answer = "\n"
    if getattr(tokenizer, "chat_template", None):
        try:
            _, answer = around_message(tokenizer, enable_thinking=False)
        except TaskError as error:
            reason, _, _ = str(error).partition(";")
            raise UsageError(
                f"selector {selector.name!r} asks the model in words, and {reason}; leave out the words with "
                f"{selector.name}:words=false"
            ) from None
    ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (_FIRST, _LATER, answer))
    return _words.setdefault(model, Words(*ids))


def check_rereading(model: PreTrainedModel, selector: Selector) -> None:
    """Raise `UsageError` if a model cannot read a prompt again as a selector wants it."""
    if not selector.rereads:
        return
    if any(place.states for place in model_facts(model).other_layers):
        raise UsageError(
            f"selector {selector.name!r} has the model read each prompt again behind itself, and the recurrent states "
            f"of {type(model).__name__} cannot be taken back afterwards; use another selector, such as keydiff"
        )
    if selector.asks_in_words:
        words_of(model, selector)


class _RereadLayer(AttendingLayer):
    """Holds one prompt, which it shows to passages that are read behind it, and notes what the entries receive.

    Args:
        key: ``[1, kv_heads, tokens, head_dim]``.
        value: ``[1, kv_heads, tokens, value_dim]``.
        sliding_window: how many tokens a query sees, or None for all.
        context: where the layer is.
    """

    def __init__(self, key: Tensor, value: Tensor, sliding_window: int | None, context: LayerContext):
        super().__init__(sliding_window)
        self.is_initialized = True
        self.key, self.value, self.context = key, value, context
        self.repeated = key.new_zeros(key.shape[:3], dtype=torch.float32)
        self.selector: Selector | None = None
        self.passage: Passage | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the prompt and the passage, which is not kept."""
        key, value = torch.cat([self.key, key_states], dim=2), torch.cat([self.value, value_states], dim=2)
        return self.send(key, value)

    def get_seq_length(self) -> int:
        """Return the tokens of the prompt."""
        return self.key.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes for the prompt and a passage."""
        return self.key.shape[2] + query_length, 0

    def attend(
        self, own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the model's own attention, and note what the part of the prompt receives."""
        assert self.selector is not None
        assert self.passage is not None
        reading = self.inputs(query, key, value, kwargs)
        part = slice(self.passage.start, self.passage.stop)
        self.repeated[..., part] = self.selector.received(reading, self.passage)
        if extra_term(kwargs) is not None:
            return own(module, query, key, value, mask, **kwargs)
        return continue_prompt(reading), None


def check_prompts(model: PreTrainedModel, layers: Sequence[CompressedLayer], arguments: Mapping[str, Any]) -> None:
    """Check that a model can read the prompts of a call again, before it reads them.

    Args:
        model: the model.
        layers: all layers of a cache, which are empty.
        arguments: of the decoder's call.

    Raises:
        UsageError: as `store_reread`.
    """
    selector, ids, mask = layers[0].selector, arguments.get("input_ids"), arguments.get("attention_mask")
    given = arguments.get("inputs_embeds") if ids is None else ids
    if not selector.rereads or given is None or all(layer.covers(given.shape[1]) for layer in layers):
        return
    padding = padding_of(mask) if isinstance(mask, Tensor) else None
    for _, real, position in _real_tokens(selector, ids, padding, arguments):
        _passages(model, selector, range(len(real)), position)


def _real_tokens(
    selector: Selector, ids: Tensor | None, padding: Tensor | None, arguments: Mapping[str, Any]
) -> Iterator[tuple[int, Tensor, int]]:
    """Yield the number, the real columns and the position that follows of each prompt that is not padding alone."""
    if ids is None:
        raise UsageError(
            f"selector {selector.name!r} has the model read each prompt again, for which it needs token ids, but this "
            "call brings inputs_embeds; give input_ids, or use another selector, such as keydiff"
        )
    positions = arguments.get("position_ids")
    for i, row in enumerate(ids):
        real = torch.arange(len(row)) if padding is None else padding[min(i, len(padding) - 1)].nonzero()[:, 0].cpu()
        if len(real):
            last = real[-1] if positions is None else positions[min(i, len(positions) - 1), real[-1]]
            yield i, real, int(last) + 1


def tokens_read_again(model: PreTrainedModel, selector: Selector, ids: Sequence[int]) -> int:
    """Return how many tokens a model reads behind a prompt of these token ids, for one of its selectors."""
    return sum(len(each.ids) for each in _said(model, selector, ids)) if selector.rereads else 0


def _said(model: PreTrainedModel, selector: Selector, ids: Sequence[int]) -> list[Passage]:
    words = words_of(model, selector) if selector.asks_in_words else None
    return list(selector.passages(ids, words))


def _passages(model: PreTrainedModel, selector: Selector, ids: Sequence[int], position: int) -> list[Passage]:
    """Return what a model reads behind a prompt that ends before a position; see `reread` for errors."""
    passages = _said(model, selector, ids)
    longest, limit = max(len(each.ids) for each in passages), model_facts(model).max_context
    if position + longest > limit:
        raise UsageError(
            f"selector {selector.name!r} has the model read up to {longest:,} tokens behind a prompt of {position:,}, "
            f"which are more than the {limit:,} that it can read; repeat fewer at a time, such as "
            f"{selector.name}:chunk=256, or give a shorter prompt"
        )
    return passages


def reread(
    model: PreTrainedModel,
    selector: Selector,
    ids: Sequence[int],
    keys_values: Sequence[tuple[Tensor, Tensor]],
    position: int | None = None,
) -> tuple[list[Tensor], int]:
    """Have a model read a prompt again, behind itself.

    Args:
        model: the model.
        selector: says what is read, and what counts.
        ids: token ids of the prompt.
        keys_values: by layer with keys and values, what it holds of the prompt: ``[1, kv_heads, tokens, dim]`` each.
        position: of the first token behind the prompt. Default: the prompt's length.

    Returns:
        By layer what each entry received, ``[1, kv_heads, tokens]``, and how many tokens were read.

    Raises:
        UsageError: if prompt and passages are together longer than the model can read.
    """
    first = len(ids) if position is None else position
    passages = _passages(model, selector, ids, first)
    windows = model_facts(model).sliding_windows
    layers = [
        _RereadLayer(key, value, window, context)
        for (key, value), window, context in zip(keys_values, windows, layer_contexts(model), strict=True)
    ]
    cache = HookedCache(model, layers)
    device = input_device(model)
    try:
        for passage in passages:
            for layer in layers:
                layer.selector, layer.passage = selector, passage
            places = torch.arange(first, first + len(passage.ids), device=device)
            read = torch.tensor([[*passage.ids]], device=device)
            # The decoder alone, which computes no logits.
            with torch.no_grad():
                model.get_decoder()(read, position_ids=places[None], use_cache=True, cache=cache)
    finally:
        cache.release()
    return [layer.repeated for layer in layers], sum(len(passage.ids) for passage in passages)


def store_reread(model: PreTrainedModel, layers: Sequence[CompressedLayer], arguments: Mapping[str, Any]) -> float:
    """Have a model read the prompts again that layers wait with, and let the layers store what they keep.

    Args:
        model: the model.
        layers: all layers of a cache.
        arguments: of the decoder's call that read the prompts.

    Returns:
        How many tokens were read in all for each of the prompts'.

    Raises:
        UsageError: as `reread`; or if the prompts came as embeddings.
    """
    waiting = [layer.awaiting for layer in layers if layer.awaiting is not None]
    prompts, padding, factor = [prompt for prompt, _ in waiting], waiting[0][1], 1.0
    if not all(layer.covers(prompts[0].num_tokens) for layer in layers):
        repeated, factor = _reread_batch(model, layers[0].selector, prompts, padding, arguments)
        prompts = [replace(prompt, repeated=part) for prompt, part in zip(prompts, repeated, strict=True)]
    for layer, prompt in zip(layers, prompts, strict=True):
        layer.awaiting = None
        layer.store_prompt(prompt, padding)
    return factor


def _reread_batch(
    model: PreTrainedModel,
    selector: Selector,
    prompts: Sequence[PromptAttention],
    padding: Tensor | None,
    arguments: Mapping[str, Any],
) -> tuple[list[Tensor], float]:
    """Return what each entry received, by layer ``[batch, kv_heads, tokens]``, and the factor; see `store_reread`.

    One prompt comes after another, each on its real tokens alone; nothing is read of one that is padding alone.
    """
    ids = arguments.get("input_ids")
    repeated = [torch.zeros_like(prompt.key[..., 0], dtype=torch.float32) for prompt in prompts]
    seen = again = 0
    for i, real, position in _real_tokens(selector, ids, padding, arguments):
        assert ids is not None
        held = [(each.key, each.value) for each in (x.of_sequence(i, real.to(x.key.device)) for x in prompts)]
        received, read = reread(model, selector, ids[i, real.to(ids.device)].tolist(), held, position)
        for whole, part in zip(repeated, received, strict=True):
            whole[i : i + 1, :, real.to(whole.device)] = part
        seen, again = seen + len(real), again + read
    return repeated, 1 + again / max(1, seen)
