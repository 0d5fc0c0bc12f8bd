"""Layers of a hybrid model without keys and values; EvolKV does not compress their states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DummyLayer, LinearAttentionLayer

from evolkv.models import model_facts

#: The kinds of state.
_KINDS = ("conv", "recurrent")


class StateLayer(LinearAttentionLayer):
    """The recurrent states of a layer (linear attention, state-space model, short convolution), a row per sequence.

    It is transformers' own layer. Its sequences can be selected and merged, too, as those of a `CompressedLayer`.
    """

    def reset(self) -> None:
        """Empty the layer, so that it can read another prompt, of any number of sequences."""
        self.__init__(self.number_of_states)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these numbers, in that order; a number may occur several times."""
        for states, at, state in self._held():
            states[at] = state[indices.to(state.device)]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all states."""
        return sum(state.nbytes for _, _, state in self._held())

    @classmethod
    def merge(cls, layers: Sequence[StateLayer]) -> StateLayer:
        """Return one layer with copies of the sequences of several layers; a layer may occur several times."""
        first = layers[0]
        merged = cls(first.number_of_states)
        merged.device, merged.dtype, merged.record_past = first.device, first.dtype, first.record_past
        for name in (
            "is_conv_states_initialized",
            "is_recurrent_states_initialized",
            "has_previous_state",
            "conv_kernel_size",
        ):
            setattr(merged, name, dict(getattr(first, name)))
        for kind in _KINDS:
            name = f"{kind}_states"
            for at, state in getattr(first, name).items():
                if state is not None:
                    getattr(merged, name)[at] = torch.cat([getattr(layer, name)[at] for layer in layers])
        return merged

    def copy(self) -> StateLayer:
        """Return a layer that holds the same, in memory of its own: states are overwritten in place."""
        return self.merge([self])

    def parts(self) -> dict[str, Tensor]:
        """Return the states that the next token needs, by number and kind: ``0.conv``, ``0.recurrent``."""
        found = {f"{at}.recurrent": state for at, state in self.recurrent_states.items() if state is not None}
        for at, state in self.conv_states.items():
            if state is not None:
                # Where `crop` may take tokens back, a state holds more columns than the kernel needs.
                found[f"{at}.conv"] = state[..., -self.conv_kernel_size[at] :]
        return found

    def restore(self, parts: Mapping[str, Tensor], updated: Sequence[bool]) -> None:
        """Set the states to the `parts` of another layer; `updated` says which of them have seen tokens.

        Raises:
            ValueError: a part is not one of this layer.
        """
        for name, part in parts.items():
            at, _, kind = name.partition(".")
            if kind not in _KINDS or at not in map(str, range(self.number_of_states)):
                raise ValueError(name)
            self.lazy_initialization(**{f"{kind}_states": part}, state_idx=int(at))
            getattr(self, f"{kind}_states")[int(at)].copy_(part)
        self.has_previous_state = dict(zip(range(self.number_of_states), updated, strict=True))

    def _held(self) -> list[tuple[dict[int, Tensor | None], int, Tensor]]:
        """Return each state, with the dictionary and the number under which it is held."""
        both = (self.conv_states, self.recurrent_states)
        return [(states, at, state) for states in both for at, state in states.items() if state is not None]


def arrange(model: PreTrainedModel, kept: Sequence[Any], states: Sequence[StateLayer]) -> list[Any]:
    """Return all layers of a cache in the decoder's order, given those with keys and values and those with states."""
    facts = model_facts(model)
    placed: dict[int, Any] = {layer.index: DummyLayer() for layer in facts.other_layers}
    placed |= {layer.index: own for layer, own in zip(facts.kv_layers, kept, strict=True)}
    with_state = (layer for layer in facts.other_layers if layer.states)
    placed |= {layer.index: own for layer, own in zip(with_state, states, strict=True)}
    return [placed[index] for index in sorted(placed)]


def empty_states(model: PreTrainedModel) -> list[StateLayer]:
    """Return new, empty layers, one for each layer of the model that keeps states."""
    return [StateLayer(place.states) for place in model_facts(model).other_layers if place.states]
