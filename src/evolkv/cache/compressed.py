"""The compressed cache, and the ``with`` block that gives it to a model."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from evolkv.budgets import BudgetSpec, read_budget
from evolkv.cache.adaptive import AdaptiveLayer
from evolkv.cache.hook import attach, check_arrival, forget_sent, wrap_again
from evolkv.cache.layer import CompressedLayer
from evolkv.cache.reeviction import ReevictingLayer, Reeviction
from evolkv.cache.state import StateLayer, arrange, empty_states
from evolkv.errors import UsageError
from evolkv.methods import MethodSpec, get_method
from evolkv.models import cached_layers, sliding_windows
from evolkv.models.forward import by_name, cache_keyword, given_cache, input_device
from evolkv.models.layers import continues_by_token
from evolkv.models.rotary import Rotary, rotary_of
from evolkv.numbers import is_whole
from evolkv.selectors import LayerContext, Selector


def layer_contexts(model: PreTrainedModel) -> list[LayerContext]:
    """For each layer of a new cache with keys and values, where it is; all share one memory."""
    memory: dict[Any, Any] = {}
    # A cache must not keep its model alive. Who asks is the model, at work.
    reference = weakref.ref(model)

    def rotary(index: int) -> Rotary:
        held = reference()
        assert held is not None
        return rotary_of(held, index)

    places, _ = cached_layers(model)
    return [
        LayerContext(row, functools.partial(rotary, place.index), memory, last=row == len(places) - 1)
        for row, place in enumerate(places)
    ]


class _Block:
    """A `compress` block."""

    is_open = True


class HookedCache(Cache):
    """A cache of layers that compute their own attention.

    The model's attention hook is in place while such a cache lives (or until `release`).

    Args:
        model: the model the cache is for.
        kv_layers: one cache layer for each decoder layer that has keys and values, the rows of the budgets.
        states: what the other layers of a hybrid model start from. Default: nothing.

    Attributes:
        states_of_chunks: what has been computed of a call that is read in pieces; see `evolkv.cache.chunks`.
        kv_layers: the layers with keys and values; in a hybrid model `layers` has the others too.
        state_layers: the layers with a recurrent state.
        block: the `compress` block that made the cache; None where it was made explicitly.
        unfinished: whether some layers have read tokens of a forward call that has not ended.
    """

    states_of_chunks: list[Tensor] | None = None
    block: _Block | None = None
    unfinished: bool = False
    #: The layer whose keys and values were the last to be sent to attention.
    _sent: Any = None

    def __init__(self, model: PreTrainedModel, kv_layers: list[Any], states: Sequence[StateLayer] | None = None):
        self.kv_layers: list[Any] = kv_layers
        self.state_layers = empty_states(model) if states is None else list(states)
        super().__init__(layers=arrange(model, kv_layers, self.state_layers))
        # A cache must not keep its model alive.
        self._model = weakref.ref(model)
        self._keyword = cache_keyword(model)
        self._by_token = bool(self.state_layers) and continues_by_token(model)
        self._detach = weakref.finalize(self, attach(model))

    def __bool__(self) -> bool:
        """Whether a `compress` block that is still open made the cache, and would make another in its place.

        Phi-3 leaves out a cache that is true, and not longer than the limit of its short rotary embedding, to read a
        longer text anew: with a cache of transformers', unless there is such a block.
        """
        return self.block is not None and self.block.is_open

    def release(self) -> None:
        """Gives the model's attention back now rather than when this object goes."""
        self._detach()

    def model(self) -> PreTrainedModel:
        """The model the cache is for."""
        model = self._model()
        if model is None:
            raise UsageError("the model that this cache is for has been deleted; keep it for as long as the cache")
        return model

    @torch.compiler.disable
    def begin_call(self, decoder: nn.Module) -> None:
        """What the decoder does before it reads a call.

        Raises:
            UsageError: if the call before this one failed half-way, or the decoder is not that of the cache's model.
            ModelError: if an attention implementation was chosen meanwhile that cannot be wrapped.
        """
        self.check_finished()
        if decoder is not self.model().get_decoder():
            raise UsageError("this cache was made for another model; make one for the model that is called")
        # Of a call that failed there may be some left.
        self.states_of_chunks = None
        wrap_again(self.model())

    @torch.compiler.disable
    def end_call(self) -> None:
        """What the decoder does after it has read a call.

        Raises:
            ModelError: if keys and values did not reach attention.
        """
        if self._sent is not None:
            check_arrival(self._sent)
        self.unfinished = False

    def check_finished(self) -> None:
        """Raises `UsageError` if a call failed half-way, so that layers differ in what they have read."""
        if self.unfinished:
            raise UsageError(
                "a forward call failed half-way, and only some layers of this cache have read its tokens; reset() the "
                "cache, or make a new one, and read the whole text again"
            )

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands new keys and values on to attention, for a layer.

        Raises:
            ModelError: if those of the layer before did not get there.
        """
        if self._sent is not None:
            check_arrival(self._sent)
        sent = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._sent, self.unfinished = self.layers[layer_idx], True
        return sent

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `Cache.update_conv_state`."""
        self.unfinished = True
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `Cache.update_recurrent_state`."""
        self.unfinished = True
        return super().update_recurrent_state(*args, **kwargs)

    def reset(self) -> None:
        """Empties the cache, which is then ready for another prompt, also after a call that failed half-way."""
        super().reset()
        self.unfinished, self._sent = False, None
        for layer in self.kv_layers:
            forget_sent(layer)

    @property
    def as_argument(self) -> dict[str, Any]:
        """This cache under the name that the model's forward call has for it: ``model(ids, **cache.as_argument)``."""
        return {self._keyword: self}

    @property
    def most_tokens(self) -> int | None:
        """The most tokens that the decoder reads at once with this cache; longer calls are read in pieces. Or None."""
        return 1 if self._by_token and self.get_seq_length() > 0 else None

    @property
    def is_compileable(self) -> bool:
        """False: the shapes change with every prompt."""
        return False


class CompressedCache(HookedCache):
    """A key-value cache that keeps, of each prompt, only what a profile allows.

    Pass it to ``generate(cache=...)`` (``past_key_values=`` before transformers 5.24) or to a forward call. The first
    forward call is the prompt: it attends to all of itself and is then cut down layer by layer, so that its full keys
    and values never exist for more than one layer at a time. Later tokens are appended. `reset` makes it ready for
    another prompt. With `prefill_chunk`, `evict` or `evict_every` it evicts again after the first call
    (docs/inference.md).

    `prefill` has a prompt read without an answer; `followed_by` says what `generate` needs to go on from there; `copy`
    branches off; `save` and `load` carry what was read to another day.

    Attributes:
        input_ids: ids of the text so far, ``[batch, tokens]``, padding included: all tokens seen, and perhaps some that
            are still to be read. Known after `prefill` and `load`; after ``output = generate(...)`` set it to `output`,
            unless that was beam search. None where nobody said.

    Args:
        model: a transformers decoder-only model.
        profile: budgets and selector, belonging to the model; or another method, in any form that
            `evolkv.methods.get_method` takes, such as ``"adakv+snapkv"``.
        budget: mean cache entries per KV head of a method; a profile is expanded to it. Default: the profile's own.
        prefill_chunk: tokens of the chunks in which a prompt is read, evicting after each, so that a head never holds
            more than its budget and a chunk. The prompt may come in several forward calls; it goes on until the first
            call of a single token, or `end_prompt`. None (default) for all at once, in the first call.
        evict: "once" (default): tokens after the prompt are kept. "again": after each later call of several tokens (a
            second turn's prompt), everything held is ranked with its queries and cut to the budgets.
        evict_every: number of tokens after which, while they are generated too, everything held is ranked with the
            latest queries and cut to the budgets. None (default) for never.

    Raises:
        ProfileError: if the profile is for another model.
        ModelError: if the model's cache cannot be compressed.
        UsageError: for an unknown method, or one without a budget; for a method that cannot evict again, where it
            should.
    """

    kv_layers: list[CompressedLayer]
    input_ids: Tensor | None = None
    _searched: bool = False

    def __init__(
        self,
        model: PreTrainedModel,
        profile: MethodSpec,
        budget: BudgetSpec | None = None,
        *,
        prefill_chunk: int | None = None,
        evict: Literal["once", "again"] = "once",
        evict_every: int | None = None,
    ):
        super().__init__(model, _LayerMaker(model, profile, budget, Reeviction(prefill_chunk, evict, evict_every))())

    @classmethod
    def _with_layers(
        cls, model: PreTrainedModel, kv_layers: list[CompressedLayer], states: Sequence[StateLayer] | None = None
    ) -> CompressedCache:
        """A cache of given layers, for a model that is known to fit them."""
        cache = cls.__new__(cls)
        HookedCache.__init__(cache, model, kv_layers, states)
        return cache

    @classmethod
    def prefill(
        cls,
        model: PreTrainedModel,
        profile: MethodSpec,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        budget: BudgetSpec | None = None,
        *,
        prefill_chunk: int | None = None,
        evict: Literal["once", "again"] = "once",
        evict_every: int | None = None,
    ) -> CompressedCache:
        """A cache that holds what a profile, or another method, keeps of some prompts.

        Args:
            model: as for the class.
            profile: as for the class.
            input_ids: the prompts, ``[batch, tokens]``.
            attention_mask: ``[batch, tokens]``, 0 for padding; None where there is none.
            budget: as for the class.
            prefill_chunk: as for the class.
            evict: as for the class.
            evict_every: as for the class.

        Raises:
            ProfileError, ModelError, UsageError: as for the class; UsageError also for another shape.
        """
        cache = cls(model, profile, budget, prefill_chunk=prefill_chunk, evict=evict, evict_every=evict_every)
        _check_ids(input_ids)
        if not input_ids.numel():
            raise UsageError(f"input_ids is empty, of shape {list(input_ids.shape)}; give at least one token to read")
        if attention_mask is not None:
            _check_mask(attention_mask, {input_ids.shape: "that of input_ids"})
        ids = input_ids.to(input_device(model)).long()
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids.device)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        decoder = model.get_decoder()
        # The decoder alone, which computes no logits.
        with torch.no_grad():
            decoder(ids, attention_mask=mask, position_ids=places, use_cache=True, **{cache_keyword(decoder): cache})
        cache.end_prompt()
        cache.input_ids = ids
        return cache

    def followed_by(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        """What `generate` needs to go on from here: ``model.generate(**cache.followed_by(question), ...)``.

        The tokens that the cache has seen are not computed again. What they and the answer add is kept whole (unless
        the cache evicts again); to ask another question of the same text, ask a `copy`.

        Args:
            input_ids: what is read next, ``[batch, tokens]``; or one row, for every sequence.
            attention_mask: 0 for padding, for what is read next, in the shape of `input_ids`; or for the whole text, as
                `generate` takes it. Default: nothing of what is read next is padding. Of the text so far that is known
                where calls had a mask; and where `generate` filled up the rows of a batch that ended before others with
                the model's pad token (that of its `generation_config`).

        Raises:
            UsageError: if the text so far is not known, or not all of it; for another number of sequences; or after
                beam search.
        """
        _check_ids(input_ids)
        seen, known = self.get_seq_length(), 0 if self.input_ids is None else self.input_ids.shape[1]
        if not seen:
            raise UsageError("the cache holds nothing yet; read a text with CompressedCache.prefill first")
        if self.input_ids is None or known < seen:
            raise UsageError(
                f"the cache has seen {seen} tokens and knows the ids of {known}; set cache.input_ids to the text so "
                "far, such as what generate() returned"
            )
        self._check_text()
        if known == seen and input_ids.numel() == 0:
            raise UsageError("input_ids has no tokens, and all of the text was read; give at least one token to read")
        if len(input_ids) not in (1, self.num_rows):
            raise UsageError(
                f"the shape of input_ids is {list(input_ids.shape)}; expected [{self.num_rows}, tokens] or [1, tokens]"
                "; repeat what the cache holds with cache.batch_repeat_interleave(n) for several questions"
            )
        new = input_ids.to(self.input_ids.device).expand(self.num_rows, -1)
        ids = torch.cat([self.input_ids, new], dim=1)
        after = self.kv_layers[0].prompt_width
        mask = torch.ones_like(ids)
        mask[:, :seen] = self.kv_layers[0].real_tokens().to(ids.device)
        mask[:, after:known] *= ~_filled_up(self.model(), self.input_ids)[:, after:]
        if attention_mask is not None:
            shapes = {ids.shape: "the whole text", new.shape: "all rows", input_ids.shape: "that of input_ids"}
            _check_mask(attention_mask, shapes)
            mask[:, -attention_mask.shape[1] :] = attention_mask.to(mask)
        for layer in self.kv_layers:
            layer.note_padding(mask[:, after:seen].bool())
        return {"input_ids": ids, "attention_mask": mask, **self.as_argument}

    def _check_text(self) -> None:
        """Raises `UsageError` if `input_ids` cannot be what the rows hold."""
        if self._searched:
            raise UsageError(
                "beam search has been through the cache: its rows are the last beams, not what generate() returned; go "
                "on from a cache.copy() made before, or read the text with CompressedCache.prefill"
            )
        if self.input_ids is not None and self.num_rows and len(self.input_ids) != self.num_rows:
            raise UsageError(
                f"cache.input_ids has {len(self.input_ids)} rows, but the cache holds {self.num_rows} sequences; set "
                "it to the text of each"
            )

    def copy(self) -> CompressedCache:
        """A cache that holds the same and goes its own way.

        Both share the memory of the keys and values held now, so a copy costs nothing until it grows (`kv_bytes` counts
        what is shared for each); recurrent states are copied. `copy.copy` and `copy.deepcopy` do the same.

        Raises:
            UsageError: if a call failed half-way.
        """
        self.check_finished()
        model = self.model()
        layers: list[CompressedLayer] = []
        for layer, context in zip(self.kv_layers, layer_contexts(model), strict=True):
            layers.append(layer.copy(layers, context))
        twin = CompressedCache._with_layers(model, layers, [state.copy() for state in self.state_layers])
        twin.input_ids, twin._searched = self.input_ids, self._searched
        return twin

    def __copy__(self) -> CompressedCache:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        # What is shared is never written to.
        return self.copy()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what the cache holds to a file, with `input_ids` where they are known; see `load`.

        A cache that evicts again is written with its settings and what the next cut will need.

        Raises:
            UsageError: if there is nothing to write yet, a call failed half-way, or no file can be at `path`; if
                `input_ids` has another number of rows than there are sequences; or after beam search.
            RunError: if the file cannot be written.
        """
        self.check_finished()
        from evolkv.cache.files import write_cache

        self._check_text()
        write_cache(path, self.model(), self.kv_layers, self.state_layers, self.input_ids)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel) -> CompressedCache:
        """Reads what `save` wrote: a cache that gives the same tokens, bit for bit, on the same machine.

        Args:
            path: the file. It is parsed, never run.
            model: the model that the cache was made with.

        Raises:
            CacheFileError: if the file is missing, no cache, damaged, of another version, or made with another model.
        """
        from evolkv.cache.files import read_cache

        stored = read_cache(path, model)
        layers = _layers(model, stored.budgets, stored.selector, stored.reeviction)
        stored.fill(layers)
        cache = cls._with_layers(model, layers, stored.states)
        cache.input_ids = stored.input_ids
        return cache

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, in that order; an index may occur several times.

        Args:
            indices: whole numbers, negative ones from the end, or one truth value for each sequence.

        Raises:
            UsageError: for indices of sequences that there are not.
        """
        rows = self.num_rows if self.get_seq_length() else 0
        if indices.dtype == torch.bool:
            fits = indices.shape == (rows,)
        else:
            fits = indices.ndim == 1 and bool(((indices >= -rows) & (indices < rows)).all())
            indices = indices.where(indices >= 0, indices + rows)
        if rows and not fits:
            raise UsageError(
                f"{indices.tolist()} does not choose among {rows} sequences; expected numbers from 0 to {rows - 1}"
            )
        super().batch_select_indices(indices)
        if self.input_ids is not None:
            self.input_ids = self.input_ids[indices.to(self.input_ids.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """What beam search asks for: makes sequence ``i`` a copy of the present sequence ``beam_idx[i]``."""
        super().reorder_cache(beam_idx)
        self._searched = True

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times.

        Raises:
            UsageError: unless `repeats` is a positive whole number.
        """
        if not is_whole(repeats) or repeats < 1:
            raise UsageError(f"repeats is {repeats!r}; expected a whole number from 1")
        super().batch_repeat_interleave(repeats)
        if self.input_ids is not None:
            self.input_ids = self.input_ids.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        """Empties the cache, which is then ready for another prompt."""
        super().reset()
        self.input_ids, self._searched = None, False

    def activate_past_recording(self) -> None:
        """What assisted decoding asks for before its first call, which brings drafted tokens along with the prompt.

        Raises:
            UsageError: if the cache holds a prompt, since transformers would bring it again.
        """
        if self.get_seq_length():
            raise UsageError(
                "assisted decoding cannot go on from a cache that holds a prompt, since transformers would read it a "
                "second time; pass a new CompressedCache, or generate without assistance"
            )
        super().activate_past_recording()
        reference = weakref.ref(self)

        def find_drafted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache, (_, drafting) = reference(), given_cache(kwargs)
            if cache is not None and drafting is not cache:
                return
            handle.remove()
            kept = kwargs.get("logits_to_keep")
            # A call that is not generate's has no drafts: generate may have failed before its first.
            if cache is not None and isinstance(kept, int) and kept > 1:
                for layer in cache.kv_layers:
                    # transformers wants logits of the last prompt token and of each draft.
                    layer.drafted = kept - 1

        # `generate` of a compiled model calls the one within.
        model = self.model()
        handle = getattr(model, "_orig_mod", model).register_forward_pre_hook(find_drafted, with_kwargs=True)

    @property
    def reeviction(self) -> Reeviction:
        """When the cache evicts again."""
        layer = self.kv_layers[0]
        return layer.reeviction if isinstance(layer, ReevictingLayer) else Reeviction()

    @property
    def prefill_chunk(self) -> int | None:
        """Tokens of the chunks in which calls are read, or None."""
        return self.reeviction.prefill_chunk

    @property
    def evicts_later(self) -> bool:
        """Whether a later call may evict something: of a prompt that goes on, or after it."""
        return any(isinstance(layer, ReevictingLayer) and layer.evicts_later for layer in self.kv_layers)

    @property
    def most_tokens(self) -> int | None:
        """See `HookedCache.most_tokens`."""
        return self.prefill_chunk or super().most_tokens

    def end_prompt(self) -> None:
        """Says that a prompt which may come in several calls is complete; a call of a single token says so too."""
        for layer in self.kv_layers:
            if isinstance(layer, ReevictingLayer):
                layer.end_prompt()

    @property
    def num_rows(self) -> int:
        """Sequences held."""
        return self.kv_layers[0].batch

    @property
    def kv_bytes(self) -> int:
        """Bytes held by keys and values, reserved room included; the states of other layers do not count."""
        return sum(layer.kv_bytes for layer in self.kv_layers)

    @property
    def positions(self) -> list[list[Any]]:
        """Prompt positions held, by layer (those with keys and values) and KV head.

        ``positions[layer][head]`` is an ascending LongTensor for a batch of one, otherwise a list of such, one per
        sequence. Positions count a sequence's real tokens from 0; padding has none. Where the cache has evicted again,
        all tokens up to the last cut count as the prompt. Tokens after it are held, every one, and not listed.
        """
        return [
            [
                layer.kept_positions(0, head)
                if layer.batch == 1
                else [layer.kept_positions(i, head) for i in range(layer.batch)]
                for head in range(layer.num_kv_heads)
            ]
            for layer in self.kv_layers
        ]

    @property
    def kv_bytes_by_sequence(self) -> list[int]:
        """Bytes held by keys and values of each sequence of the batch, reserved room not included."""
        totals = torch.zeros(self.kv_layers[0].batch, dtype=torch.long)
        for layer in self.kv_layers:
            for group in layer.groups:
                rows = torch.bincount(group.rows.cpu() // layer.num_kv_heads, minlength=len(totals))
                totals += rows * (group.keys[0].nbytes + group.values[0].nbytes)
        return totals.tolist()

    @classmethod
    def from_rankings(
        cls,
        model: PreTrainedModel,
        keys_values: list[tuple[Tensor, Tensor]],
        rankings: list[Tensor],
        budgets: np.ndarray,
        selector: Selector,
        room: int = 0,
        states: Sequence[StateLayer] = (),
    ) -> CompressedCache:
        """One prompt under several budgets, a sequence for each, from a prefill that was recorded.

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
        cache = cls._with_layers(model, _layers(model, np.moveaxis(budgets, 1, 0), selector, Reeviction()), repeated)
        for layer, (key, value), ranking in zip(cache.kv_layers, keys_values, rankings, strict=True):
            layer.store_ranked(key, value, ranking, room)
        return cache

    @classmethod
    def merge(cls, model: PreTrainedModel, caches: list[CompressedCache], room: int = 0) -> CompressedCache:
        """The sequences of several caches, each right after its prompt, in one, with `room` for new tokens.

        The caches must not be used afterwards: the new one shares memory with them.

        Raises:
            UsageError: for caches that may evict again. One whose prompt was read in chunks does not, once `end_prompt`
                has said that it is complete.
        """
        if any(other.evicts_later for other in caches):
            raise UsageError(
                "caches that evict again cannot be merged; leave out evict and evict_every, and call end_prompt() "
                "after a prompt that was read in chunks"
            )
        columns = zip(*(other.kv_layers for other in caches), strict=True)
        states = zip(*(other.state_layers for other in caches), strict=True)
        return cls._with_layers(
            model,
            [CompressedLayer.merge(list(column), room) for column in columns],
            [StateLayer.merge(column) for column in states],
        )


def _filled_up(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What `generate` put behind the rows of a batch that ended before others, ``[batch, tokens]``."""
    settings = model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    # What generate() takes, too.
    pad = settings.pad_token_id if settings.pad_token_id is not None else ends[0]
    # Nothing is put behind the longest row, and so behind a single one.
    if pad is None or len(ids) == 1:
        return torch.zeros_like(ids, dtype=torch.bool)
    run = (ids == pad).flip(1).cumprod(dim=1).flip(1).bool()
    if pad in ends:
        # The first of the run is the row's own end.
        run = run & F.pad(run[:, :-1], (1, 0))
    return run


def _check_ids(input_ids: Any) -> None:
    """Raises `UsageError` for what is no tensor of token ids."""
    if isinstance(input_ids, Tensor):
        if input_ids.ndim == 2 and not (input_ids.is_floating_point() or input_ids.is_complex()):
            return
        found = f"a tensor of {input_ids.dtype} and shape {list(input_ids.shape)}"
    else:
        found = type(input_ids).__name__
    raise UsageError(
        f"input_ids is {found}; expected a tensor of token ids [batch, tokens], as tokenizer(text, "
        "return_tensors='pt').input_ids is"
    )


def _check_mask(attention_mask: Any, shapes: Mapping[torch.Size, str]) -> None:
    """Raises `UsageError` unless a mask has one of some shapes, which are named in words."""
    found = attention_mask.shape if isinstance(attention_mask, Tensor) else None
    if found not in shapes:
        expected = " or ".join(f"{list(shape)} ({name})" for shape, name in shapes.items())
        given = type(attention_mask).__name__ if found is None else f"of shape {list(found)}"
        raise UsageError(f"attention_mask is {given}; expected a tensor of shape {expected}")


def _places(model: PreTrainedModel, budgets: Any) -> Iterator[tuple[np.ndarray, int | None, LayerContext]]:
    return zip(budgets, sliding_windows(model), layer_contexts(model), strict=True)


def _layers(model: PreTrainedModel, budgets: Any, selector: Selector, reeviction: Reeviction) -> list[CompressedLayer]:
    if reeviction.wanted:
        return [
            ReevictingLayer(reeviction, row, selector, window, context)
            for row, window, context in _places(model, budgets)
        ]
    return [CompressedLayer(row, selector, window, context) for row, window, context in _places(model, budgets)]


class _LayerMaker:
    """Makes the layers of new caches, for settings that have been checked."""

    def __init__(
        self,
        model: PreTrainedModel,
        profile: MethodSpec,
        budget: BudgetSpec | None,
        reeviction: Reeviction,
    ):
        self.model, self.reeviction = model, reeviction
        at = None if budget is None else read_budget(budget)
        method, self.budgets = get_method(profile).resolve(model, at)
        assert method.selector is not None
        self.method, self.selector = method, method.selector
        if reeviction.wanted and method.observers:
            raise UsageError(
                f"method {method.name!r} lays out budgets once, for the whole prompt, and cannot evict again; leave "
                f"out prefill_chunk, evict and evict_every, or use fixed budgets: {method.selector.name!r} or a profile"
            )
        reeviction.check_selector(method.selector)
        if (reeviction.prefill_chunk is not None or reeviction.evict == "again") and continues_by_token(model):
            raise UsageError(
                f"{type(model).__name__} goes on from its recurrent states by one token at a time, so that several "
                "tokens cannot be read, and cut, as one call; leave out prefill_chunk and evict='again', or give "
                "evict_every"
            )

    def __call__(self) -> list[Any]:
        if not self.method.observers:
            return _layers(self.model, self.budgets, self.selector, self.reeviction)
        layers: list[AdaptiveLayer] = []
        for row, window, context in _places(self.model, self.budgets):
            layers.append(AdaptiveLayer(self.method, row, layers, window, context))
        return layers


@contextmanager
def compress(
    model: PreTrainedModel,
    profile: MethodSpec,
    budget: BudgetSpec | None = None,
    *,
    prefill_chunk: int | None = None,
    evict: Literal["once", "again"] = "once",
    evict_every: int | None = None,
) -> Iterator[None]:
    """Runs every `generate` and forward call inside the ``with`` block under a profile, or another method.

    Each prompt gets a fresh `CompressedCache`, which the output holds as ``cache`` (``past_key_values`` before
    transformers 5.24). Calls that pass a cache which already holds tokens, or ``use_cache=False``, go on as they
    would. Blocks may be nested; the inner profile counts. On leaving the block the model is as it was, also after an
    exception.

    The block switches the model, for all threads that call it: have one block per model at a time. Where requests come
    from several threads, give each call a cache of its own, ``generate(cache=CompressedCache(model, profile))``.

    Args:
        model: a transformers decoder-only model.
        profile: as for `CompressedCache`.
        budget: as for `CompressedCache`.
        prefill_chunk: as for `CompressedCache`.
        evict: as for `CompressedCache`.
        evict_every: as for `CompressedCache`.

    Raises:
        ProfileError: if the profile is for another model.
        ModelError: if the model's cache cannot be compressed.
        UsageError: as for `CompressedCache`; inside the block, if a call asks for another kind of
            cache (static, quantized, offloaded).

    Example:
        >>> with evolkv.compress(model, profile):
        ...     model.generate(**inputs)
    """
    make_layers = _LayerMaker(model, profile, budget, Reeviction(prefill_chunk, evict, evict_every))
    block = _Block()
    replaced: weakref.WeakSet[DynamicCache] = weakref.WeakSet()

    def inject(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        kwargs = by_name(module, args, kwargs)
        name, given = given_cache(kwargs)
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = model.config.get_text_config(decoder=True).use_cache
        if isinstance(given, HookedCache) or not (use_cache or given is not None):
            return None
        if given is not None and given.get_seq_length() > 0:
            return None
        # transformers drafts with the first layers alone (assistant_early_exit), and does not restore their number if
        # that raises. The call that brings the drafts is refused below.
        if len(cached_layers(model)[0]) < len(make_layers.budgets):
            return None
        if given is not None and (type(given) is not DynamicCache or given.offloading):
            raise UsageError(
                f"compress() replaces the default cache, but this call brings a {type(given).__name__}; "
                "call it without cache_implementation and without a cache"
            )
        kept = kwargs.get("logits_to_keep")
        if given is not None and isinstance(kept, int) and kept > 1:
            raise UsageError(
                "assisted decoding brings drafts along with the prompt, and compress() cannot tell where they begin; "
                "give generate() an empty CompressedCache(model, profile) as its cache"
            )
        if given is not None and given in replaced:
            raise UsageError(
                "this call brings a cache that stayed empty, since compress() has put one of its own in its place "
                f"before; go on with the one that the model's output holds (output.{name}), or give each prompt a "
                "new cache; a model whose output holds none cannot be compressed in a block"
            )
        cache = CompressedCache._with_layers(model, make_layers())
        cache.block = block
        if given is not None:
            replaced.add(given)
        kwargs[name or cache_keyword(module)] = cache
        kwargs["use_cache"] = True
        return (), kwargs

    detach = attach(model)
    # First in line: of nested blocks the innermost one must be the first to bring its cache.
    targets: list[nn.Module] = list(dict.fromkeys([model, model.get_decoder()]))
    handles = [target.register_forward_pre_hook(inject, prepend=True, with_kwargs=True) for target in targets]
    try:
        yield
    finally:
        block.is_open = False
        for handle in handles:
            handle.remove()
        detach()
