"""The base of all caches whose layers compute attention themselves: it holds the hooks and watches each call."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from evolkv.cache.hook import AttendingLayer, attach, hook_model, wrap_again
from evolkv.cache.state import StateLayer, arrange, empty_states
from evolkv.errors import ModelError, UsageError
from evolkv.models import model_facts
from evolkv.models.forward import offset_keeper
from evolkv.models.identity import AdaptersInUse, adapters_in_use
from evolkv.models.layers import continues_by_token
from evolkv.models.rotary import Rotary, rotary_of, stretching
from evolkv.selectors import LayerContext


def layer_contexts(model: PreTrainedModel) -> list[LayerContext]:
    """Return where each layer with keys and values of a new cache is; all share one memory."""
    memory: dict[Any, Any] = {}
    # A cache must not keep its model alive. Who asks is the model, at work.
    reference = weakref.ref(model)

    def rotary(index: int) -> Rotary:
        held = reference()
        assert held is not None
        keeper: Any = offset_keeper(held)
        if keeper is not None and keeper.rope_deltas is not None and bool(keeper.rope_deltas.any()):
            raise ModelError(
                f"images in the text move the positions of its tokens in {type(held).__name__}, which the selector "
                "would undo as if there were none; choose another selector, such as snapkv"
            )
        return rotary_of(held, index)

    places = model_facts(model).kv_layers
    return [
        LayerContext(row, functools.partial(rotary, place.index), memory, last=row == len(places) - 1)
        for row, place in enumerate(places)
    ]


class Block:
    """A `compress` block, as its caches know it."""

    is_open = True


class HookedCache(Cache):
    """A cache of layers that compute their own attention.

    The model's attention hook is in place while such a cache lives (or until `release`).

    Args:
        model: the model the cache is for.
        kv_layers: one cache layer for each decoder layer that has keys and values, the rows of the budgets.
        states: what the other layers of a hybrid model start from. Default: nothing.
        by_layer: whether `enter_layer` gives each decoder layer its arguments.

    Attributes:
        states_of_chunks: what has been computed of a call that is read in pieces; see `evolkv.cache.chunks`.
        kv_layers: the layers with keys and values; in a hybrid model `layers` has the others too.
        state_layers: the layers with a recurrent state.
        block: the `compress` block that made the cache; None where it was made explicitly.
        unfinished: whether some layers have read tokens of a forward call that has not ended.
        adapters: those that the model computed with when it began to read; None if it has not.
    """

    states_of_chunks: list[Tensor] | None = None
    block: Block | None = None
    unfinished: bool = False
    adapters: AdaptersInUse | None = None
    #: The layer whose keys and values were the last to be sent to attention.
    _sent: AttendingLayer | None = None
    #: Tokens seen when `generate` was given the cache; None if it never was.
    _seen_before_generate: int | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        kv_layers: list[Any],
        states: Sequence[StateLayer] | None = None,
        *,
        by_layer: bool = False,
    ):
        self.kv_layers: list[Any] = kv_layers
        self.state_layers = empty_states(model) if states is None else list(states)
        super().__init__(layers=arrange(model, kv_layers, self.state_layers))
        # A cache must not keep its model alive.
        decoder = model.get_decoder()
        self._model, self._decoder = weakref.ref(model), weakref.ref(decoder)
        keeper = offset_keeper(model)
        self._offset_keeper = None if keeper is None else weakref.ref(keeper)
        #: See `stretching`.
        self.rotary_limits = stretching(decoder.config)
        self._by_token = bool(self.state_layers) and continues_by_token(model)
        #: Whether layers let only some tokens of a prompt enter the next one; see `evolkv.cache.pruning`.
        self._prunes = any(hasattr(layer, "enter") for layer in kv_layers)
        self._detach = weakref.finalize(self, attach(model, by_layer=by_layer or self._prunes))
        if self._prunes:
            hook_model(model)

    def __bool__(self) -> bool:
        """True, except where a `compress` block that is closed made the cache.

        Phi-3 leaves out a cache that is true, and not longer than the limit of its short rotary embedding, to read a
        longer text anew. Only an open block would put another compressed cache in its place.
        """
        return self.block is None or self.block.is_open

    @property
    def _is_user_defined(self) -> bool:
        # transformers says so when `generate` begins with a cache that it was given.
        return self._seen_before_generate is not None

    @_is_user_defined.setter
    def _is_user_defined(self, given: bool) -> None:
        self._seen_before_generate = self.get_seq_length() if given else None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(
            f"a {type(self).__name__} belongs to its model and cannot be pickled; write it with cache.save(path) and "
            "read it with CompressedCache.load(path, model)"
        )

    def release(self) -> None:
        """Give the model's attention back now rather than when this object goes."""
        self._detach()

    def model(self) -> PreTrainedModel:
        """Return the model the cache is for."""
        model = self._model()
        if model is None:
            raise UsageError("the model that this cache is for has been deleted; keep it for as long as the cache")
        return model

    @property
    def model_offsets(self) -> Tensor | None:
        """How far images moved the positions of the text that the model read last; see `offset_keeper`."""
        keeper: Any = None if self._offset_keeper is None else self._offset_keeper()
        return None if keeper is None else keeper.rope_deltas

    @model_offsets.setter
    def model_offsets(self, offsets: Tensor | None) -> None:
        keeper: Any = None if self._offset_keeper is None else self._offset_keeper()
        if keeper is not None:
            keeper.rope_deltas = offsets

    @torch.compiler.disable
    def begin_call(self, decoder: nn.Module, kwargs: dict[str, Any]) -> None:
        """Check that a call can begin; the decoder asks for it.

        Raises:
            UsageError: if the call before this one failed half-way, the decoder is not that of the cache's model, or it
                asks for what a layer cannot give.
            ModelError: if an attention implementation was chosen meanwhile that cannot be wrapped.
        """
        self.check_finished()
        if decoder is not self._decoder():
            raise UsageError("this cache was made for another model; make one for the model that is called")
        if self.get_seq_length() == 0:
            self.adapters = adapters_in_use(self.model())
            if self._prunes:
                for layer in self.kv_layers:
                    layer.begin_prompt(self.model(), kwargs)
        # Of a call that failed there may be some left.
        self.states_of_chunks = None
        wrap_again(decoder)

    def read_ahead(self, arguments: Mapping[str, Any]) -> None:
        """Do what comes before the decoder reads a call, or a piece of one; `arguments` are its own, by name.

        Raises:
            UsageError: if a companion model cannot read it.
        """

    @torch.compiler.disable
    def end_call(self, arguments: Mapping[str, Any], states: Tensor) -> Tensor:
        """Check that all keys of a call reached attention, and do what comes after; the decoder asks for it.

        Args:
            arguments: of the call, by name.
            states: the last hidden states of the decoder.

        Returns:
            Those of all tokens of the call, ``[batch, tokens, dim]``: zeros where layers have dropped tokens.

        Raises:
            ModelError: if keys and values did not reach attention.
            UsageError: as `read_again`.
        """
        if self._sent is not None:
            self._sent.check_arrival()
        self.read_again(arguments)
        self.unfinished = False
        if self._prunes:
            states = self.kv_layers[-1].whole(states)
            for layer in self.kv_layers:
                layer.forget_call()
        return states

    def enter_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments of decoder layer `index` where its cache layer changes them."""
        if not self._prunes:
            return None
        changed: tuple[tuple[Any, ...], dict[str, Any]] | None = self.kv_layers[index].enter(
            self.kv_layers[index - 1] if index else None, module, args, kwargs
        )
        return changed

    def read_again(self, arguments: Mapping[str, Any]) -> None:
        """Have the model read a prompt again, where a selector needs that; `arguments` are those of the first call.

        Raises:
            UsageError: if the model cannot read it again.
        """

    def expect_answers(self, first: Sequence[int]) -> None:
        """Have tokens of the next call count as generated, each by itself, so that a given answer is scored as such.

        It matters only where a generated token reads less than is held (`Selector.layer`). Such a layer reads all of it
        for a call of several tokens, which may be a question.

        Args:
            first: of each row of the cache, the first token of the call that counts so.
        """
        for layer in self.kv_layers:
            layer.answers_from = first

    def check_finished(self) -> None:
        """Raise `UsageError` if a call failed half-way, so that layers differ in what they have read."""
        if self.unfinished:
            raise UsageError(
                "a forward call failed half-way, and only some layers of this cache have read its tokens; reset() the "
                "cache, or make a new one, and read the whole text again"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values on to attention, for a layer.

        Raises:
            ModelError: if those of the layer before did not get there.
        """
        # What a compiled model runs as it is costs a few calls, which a step of a plain model need not pay.
        if torch.compiler.is_compiling():
            return self._update_untraced(key_states, value_states, layer_idx)
        return self._update(key_states, value_states, layer_idx)

    def _update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        if self._sent is not None:
            self._sent.check_arrival()
        layer = self.layers[layer_idx]
        sent = layer.update(key_states, value_states)
        self._sent, self.unfinished = layer, True
        return sent

    _update_untraced = torch.compiler.disable(_update)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `Cache.update_conv_state`."""
        self.unfinished = True
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `Cache.update_recurrent_state`."""
        self.unfinished = True
        return super().update_recurrent_state(*args, **kwargs)

    def reset(self) -> None:
        """Empty the cache, which is then ready for another prompt, also after a call that failed half-way."""
        super().reset()
        self.unfinished, self._sent = False, None
        for layer in self.kv_layers:
            layer.on_the_way = False

    @property
    def most_tokens(self) -> int | None:
        """Return the most tokens that the decoder may read at once, or None; longer calls are read in pieces."""
        return 1 if self._by_token and self.get_seq_length() > 0 else None

    @property
    def is_compileable(self) -> bool:
        """False: the shapes change with every prompt."""
        return False
