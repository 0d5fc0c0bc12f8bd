"""The layers of a hybrid model that have no keys and values: nothing is compressed, they keep what they always keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DummyLayer, LinearAttentionLayer

from evolkv.models import cached_layers

#: What a state can consist of.
_KINDS = ("conv", "recurrent")


class StateLayer(LinearAttentionLayer):
    """The recurrent states of a layer (linear attention, state-space model, short convolution), a row per sequence.

    transformers' own layer, which can also have its sequences chosen, repeated and merged like those of the layers with
    keys and values.
    """

    def reset(self) -> None:
        """Empties the layer, which is then ready for another prompt, of any number of sequences."""
        self.__init__(self.number_of_states)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence `repeats` times."""
        for states, at, state in self._held():
            states[at] = state.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, in that order; an index may occur several times."""
        for states, at, state in self._held():
            states[at] = state[indices.to(state.device)]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(state.nbytes for _, _, state in self._held())

    @classmethod
    def merge(cls, layers: Sequence[StateLayer]) -> StateLayer:
        """Return the sequences of several layers in one, copied; a layer may occur several times."""
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
        """Return what going on needs, by the number of the state and its kind: ``0.conv``, ``0.recurrent``."""
        found = {f"{at}.recurrent": state for at, state in self.recurrent_states.items() if state is not None}
        for at, state in self.conv_states.items():
            if state is not None:
                # Where tokens may be taken back it holds more columns than that.
                found[f"{at}.conv"] = state[..., -self.conv_kernel_size[at] :]
        return found

    def restore(self, parts: Mapping[str, Tensor], updated: Sequence[bool]) -> None:
        """Takes over what another layer's `parts` were, and which of its states have seen tokens.

        Raises:
            ValueError: for a part that this layer cannot have.
        """
        for name, part in parts.items():
            at, _, kind = name.partition(".")
            if kind not in _KINDS or at not in map(str, range(self.number_of_states)):
                raise ValueError(name)
            self.lazy_initialization(**{f"{kind}_states": part}, state_idx=int(at))
            getattr(self, f"{kind}_states")[int(at)].copy_(part)
        self.has_previous_state = dict(zip(range(self.number_of_states), updated, strict=True))

    def _held(self) -> list[tuple[dict[int, Tensor | None], int, Tensor]]:
        """Return each state that there is, and where it is held."""
        both = (self.conv_states, self.recurrent_states)
        return [(states, at, state) for states in both for at, state in states.items() if state is not None]


def arrange(model: PreTrainedModel, kept: Sequence[Any], states: Sequence[StateLayer]) -> list[Any]:
    """Return all layers of a cache in the decoder's order, from those with keys and values and those with a state."""
    with_keys, others = cached_layers(model)
    placed = {place.index: layer for place, layer in zip(with_keys, kept, strict=True)}
    with_state = [place for place in others if place.states]
    placed |= {place.index: layer for place, layer in zip(with_state, states, strict=True)}
    placed |= {place.index: DummyLayer() for place in others if not place.states}
    return [layer for _, layer in sorted(placed.items(), key=lambda item: item[0])]


def empty_states(model: PreTrainedModel) -> list[StateLayer]:
    """Return layers for a new cache, one for each that keeps a state."""
    return [StateLayer(place.states) for place in cached_layers(model)[1] if place.states]
