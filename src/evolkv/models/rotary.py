"""A model's rotary position embedding (RoPE), and queries and keys before it and after it."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from evolkv.errors import ModelError
from evolkv.models.forward import execution_device, input_device, without_dropout

#: Where the layout of a turn is tried out, in tokens: far enough apart to tell layouts, and within any short text.
_PLACES = (0, 5, 10, 15)
#: How far keys may differ, in proportion, that are the same before their turn. Number formats make less of it.
_SAME = 0.05

#: Gives cosine and sine, as a layer uses them, of those that the embedding gives.
Layout = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A channel is turned with the one half a turn's channels away, as in Llama."""
    return cos, sin


def _neighbours(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A channel is turned with its neighbour, as in GLM."""
    cos, sin = (each[..., : each.shape[-1] // 2].repeat_interleave(2, dim=-1) for each in (cos, sin))
    return cos, sin


def _unturned(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The layer has no position embedding, as some of SmolLM3."""
    return torch.ones_like(cos), torch.zeros_like(sin)


_LAYOUTS = (_halves, _neighbours, _unturned)
#: Those of the layers that were asked for, by decoder and number of the layer.
_known: weakref.WeakKeyDictionary[nn.Module, dict[int, Layout]] = weakref.WeakKeyDictionary()


class Rotary:
    """The rotary embedding of one layer.

    It turns pairs of channels of a query or key by angles that grow with its position: ``x · cos + rotate(x) · sin``
    over the first channels, the others staying as they are where the embedding is partial.

    Args:
        module: the model's own embedding; left as it is.
        rotate: the model's own `rotate_half`.
        settings: further arguments of the embedding (the kind of layer, where kinds differ).
        layout: how the layer uses what the embedding gives.
    """

    def __init__(
        self,
        module: nn.Module,
        rotate: Callable[[Tensor], Tensor],
        settings: dict[str, Any],
        layout: Layout = _halves,
    ):
        self._of_model, self._rotate, self._settings, self.layout = module, rotate, settings, layout

    @functools.cached_property
    def _module(self) -> Callable[..., tuple[Tensor, Tensor]]:
        # A copy, because embeddings that stretch with the prompt remember the positions they are asked for.
        return copy.deepcopy(self._of_model)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine at some positions, ``[tokens, channels]`` float32.

        Ask for all tokens of a text at once: embeddings that stretch turn each by the length of the text.
        """
        like = torch.empty(1, device=positions.device, dtype=torch.float32)
        cos, sin = self._module(like, positions[None], **self._settings)
        return self.layout(cos[0].float(), sin[0].float())

    def undo(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return queries or keys as they were before the embedding, in float32.

        Args:
            states: ``[..., tokens, head_dim]``.
            positions: of the tokens, ``[tokens]``.
        """
        return self.undo_turn(states, *self.cos_sin(positions))

    def undo_turn(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return what queries or keys were before a turn of `cos_sin`, in float32."""
        states = states.float()
        turned, rest = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
        # Divided by the length of the turn, which is not 1 where the embedding also scales.
        back = (turned * cos - self._rotate(turned) * sin) / (cos.square() + sin.square())
        return torch.cat([back, rest], dim=-1)

    def mean_turn(self, positions: Tensor, head_dim: int) -> Tensor:
        """Return the matrix M that embeds a row vector x as ``x @ M``, averaged over positions."""
        cos, sin = self.cos_sin(positions)
        size = cos.shape[-1]
        matrix = torch.eye(head_dim, device=cos.device)
        one = torch.eye(size, device=cos.device)
        matrix[:size, :size] = one * cos.mean(dim=0) + self._rotate(one) * sin.mean(dim=0)
        return matrix


def rotary_of(model: PreTrainedModel, layer: int) -> Rotary:
    """Return the rotary embedding of a decoder layer.

    Raises:
        ModelError: the model has none, or not one that Transformers' models have in common, or the layer turns its
            keys in a way of its own.
    """
    decoder = model.get_decoder()
    module = getattr(decoder, "rotary_emb", None)
    rotate = getattr(sys.modules[type(decoder).__module__], "rotate_half", None)
    if module is None or rotate is None:
        raise ModelError(
            f"{type(model).__name__} has no rotary position embedding that EvolKV knows; "
            "choose a selector that does not need it, such as snapkv"
        )
    settings = {}
    if "layer_type" in inspect.signature(module.forward).parameters:
        settings["layer_type"] = model.config.get_text_config(decoder=True).layer_types[layer]
    known = _known.setdefault(decoder, {})
    if layer not in known:
        known[layer] = _layout_of(model, layer, [Rotary(module, rotate, settings, each) for each in _LAYOUTS])
    return Rotary(module, rotate, settings, known[layer])


def _layout_of(model: PreTrainedModel, layer: int, tried: Sequence[Rotary]) -> Layout:
    """Return the layout under which a layer's keys of one state are the same at all places, once they are undone.

    Nothing but the layer's own code says how it uses the embedding, so the layer is asked.

    Raises:
        ModelError: there is none.
    """
    keys, places = _keys_at_places(model, layer, tried[0])
    apart = []
    for rotary in tried:
        before = rotary.undo(keys, places)
        apart.append(float((before - before[..., :1, :]).norm() / before.norm()))
    least = min(apart)
    if not least < _SAME:
        raise _unknown(model, layer)
    return tried[apart.index(least)].layout


class _ReachedError(Exception):
    """Ends a call of attention as soon as its keys are there."""


class _Catch(DynamicCache):
    """A cache that raises the keys it is given."""

    def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise _ReachedError(key_states)


def _keys_at_places(model: PreTrainedModel, layer: int, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Return a layer's keys of one state at several places, ``[kv_heads, places, head_dim]``, and the places."""
    decoder = model.get_decoder()
    for attention in decoder.modules():
        if getattr(attention, "layer_idx", None) != layer:
            continue
        names = inspect.signature(attention.forward).parameters
        cache = next((name for name in ("cache", "past_key_values", "layer_past") if name in names), None)
        if cache is None or "position_embeddings" not in names:
            continue
        device = execution_device(attention, input_device(model))
        places = torch.tensor(_PLACES, device=device)
        state = torch.linspace(-1, 1, decoder.config.hidden_size, device=device, dtype=model.dtype)
        turn = tuple(each[None].to(model.dtype) for each in rotary.cos_sin(places))
        given = {"position_embeddings": turn, "attention_mask": None, cache: _Catch()}
        try:
            with torch.no_grad(), without_dropout(attention):
                attention(state.expand(1, len(places), -1), **given)
        except _ReachedError as reached:
            return reached.args[0][0], places
    raise _unknown(model, layer)


def _unknown(model: PreTrainedModel, layer: int) -> ModelError:
    return ModelError(
        f"layer {layer} of {type(model).__name__} uses positions in a way that EvolKV does not know; "
        "choose a selector that needs no rotary position embedding, such as snapkv"
    )


def kinds(config: Any) -> list[dict[str, Any]]:
    """Return the settings of a config's rotary embeddings: of one for all layers, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [each for each in (parameters, *parameters.values()) if isinstance(each, dict) and each.get("rope_type")]


def stretching(config: Any) -> list[tuple[str, int]]:
    """Return the kinds of rotary embedding that use other angles beyond a length, each with that length in tokens.

    ``longrope`` has a second set of angles for longer texts, ``dynamic`` one for each length.
    """
    found = []
    for each in kinds(config):
        if each["rope_type"] == "longrope":
            found.append((each["rope_type"], int(each["original_max_position_embeddings"])))
        elif "dynamic" in each["rope_type"]:
            found.append((each["rope_type"], int(config.max_position_embeddings)))
    return found
