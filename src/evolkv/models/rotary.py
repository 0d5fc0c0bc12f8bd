"""A model's rotary position embedding (RoPE), and queries and keys before it and after it."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evolkv.errors import ModelError


class Rotary:
    """The rotary embedding of one layer.

    It turns pairs of channels of a query or key by angles that grow with its position: ``x · cos + rotate(x) · sin``
    over the first channels, the others staying as they are where the embedding is partial.

    Args:
        module: the model's own embedding; left as it is.
        rotate: the model's own `rotate_half`.
        settings: further arguments of the embedding (the kind of layer, where kinds differ).
    """

    def __init__(self, module: nn.Module, rotate: Callable[[Tensor], Tensor], settings: dict[str, Any]):
        self._of_model, self._rotate, self._settings = module, rotate, settings

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
        return cos[0].float(), sin[0].float()

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
        ModelError: the model has none, or not one that Transformers' models have in common.
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
    return Rotary(module, rotate, settings)


def stretching(config: Any) -> list[tuple[str, int]]:
    """Return the kinds of rotary embedding that use other angles beyond a length, each with that length in tokens.

    ``longrope`` has a second set of angles for longer texts, ``dynamic`` one for each length.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = []
    # One kind for all layers, or one for each type of layer.
    for each in (parameters, *(part for part in parameters.values() if isinstance(part, dict))):
        kind = str(each.get("rope_type"))
        if kind == "longrope":
            kinds.append((kind, int(each["original_max_position_embeddings"])))
        elif "dynamic" in kind:
            kinds.append((kind, int(config.max_position_embeddings)))
    return kinds
