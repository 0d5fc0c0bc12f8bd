"""Tokens that a layer drops from all deeper layers, while the prompt is read: the prefill itself becomes cheaper.

The decoder computes each of its layers on the tokens that are left. A hook on every layer takes their hidden states,
rotary embeddings, positions and masks out of what the layer is called with, whatever the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evolkv.cache.chunks import other_by_token, outputs_by_layer
from evolkv.cache.hook import own_attention
from evolkv.cache.layer import CompressedLayer
from evolkv.cache.masks import note_padding, real_tokens
from evolkv.errors import ModelError, UsageError
from evolkv.models import model_facts
from evolkv.models.forward import by_name
from evolkv.selectors import PromptAttention


@dataclass(frozen=True, eq=False)
class Survivors:
    """The tokens of a prompt that are left at some layer.

    Sequences of which fewer tokens are left than of others are filled up with columns that stand for none.

    Args:
        columns: of the call, ascending, ``[batch, left]``.
        positions: of each column among the real tokens of its sequence, ``[batch, left]``; -1 where it stands for none.
        lengths: real tokens of each sequence.
        tokens: columns of the call.
        masks: attention masks, by identity, each with what is left of it.
    """

    columns: Tensor
    positions: Tensor
    lengths: list[int]
    tokens: int
    masks: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    @classmethod
    def all_of(cls, key: Tensor, real: Tensor | None) -> Survivors:
        """Return all tokens of a call.

        Args:
            key: ``[batch, kv_heads, tokens, head_dim]``.
            real: which are no padding, ``[batch or 1, tokens]``; None where none is.
        """
        batch, _, tokens, _ = key.shape
        columns = torch.arange(tokens, device=key.device).expand(batch, -1)
        if real is None:
            return cls(columns, columns, [tokens] * batch, tokens)
        real = real.to(key.device).bool().expand(batch, -1)
        positions = (real.cumsum(dim=1) - 1).masked_fill(~real, -1)
        return cls(columns, positions, real.sum(dim=1).tolist(), tokens)

    @property
    def real(self) -> Tensor:
        """Return which columns stand for a token, ``[batch, left]``."""
        return self.positions >= 0

    def among(self, chosen: Tensor) -> tuple[Survivors, Tensor]:
        """Return those that are left of these, and the places of their columns among these, ``[batch, left]``.

        Args:
            chosen: which tokens stay, ``[batch, left]``.
        """
        width = int(chosen.sum(dim=1).max())
        # Padding fills up first: masks hide it anyway.
        order = (2 * chosen.byte() + (~self.real).byte()).argsort(dim=1, descending=True, stable=True)
        within = order[:, :width].sort(dim=1).values
        positions = self.positions.where(chosen, -1).gather(1, within)
        return Survivors(self.columns.gather(1, within), positions, self.lengths, self.tokens), within

    def of_mask(self, mask: Any) -> Any:
        """Return an attention mask over the tokens that are left."""
        if mask is None:
            if not bool(self.real.all()):
                raise UsageError(
                    "budgets differ between sequences of one length, which attention without a mask cannot tell apart; "
                    "make a new cache, or give generate() an attention_mask with padding"
                )
            return None
        if id(mask) not in self.masks:
            self.masks[id(mask)] = (mask, self._cut(mask))
        return self.masks[id(mask)][1]

    def _cut(self, mask: Tensor) -> Tensor:
        columns, real = self.columns.to(mask.device), self.real.to(mask.device)
        if mask.ndim == 2:
            cut = _taken(mask, columns, 1) * real
        else:
            rows = mask.expand(len(columns), -1, -1, -1)
            cut = torch.stack([row[:, at][:, :, at] for row, at in zip(rows, columns, strict=True)])
            if not bool(real.all()):
                hidden = False if cut.dtype == torch.bool else torch.finfo(cut.dtype).min
                cut = cut.masked_fill(~real[:, None, None], hidden)
        note_padding(cut, real)
        return cut


def _taken(value: Any, columns: Tensor, dim: int) -> Any:
    """Return what tensors have for some columns ``[batch, left]``, along the dimension after that of the batch."""
    if isinstance(value, (tuple, list)):
        return type(value)(_taken(each, columns, dim) for each in value)
    if not isinstance(value, Tensor):
        return value
    if value.ndim < 2:
        raise ModelError(f"a layer's argument has the shape {list(value.shape)}; expected [batch, tokens, ...]")
    dim %= value.ndim
    shape = [1] * value.ndim
    shape[dim - 1], shape[dim] = columns.shape
    wide = value.expand(*value.shape[: dim - 1], len(columns), *value.shape[dim:])
    index = columns.to(value.device).view(shape)
    return wide.gather(dim, index.expand(*wide.shape[:dim], -1, *wide.shape[dim + 1 :]))


def check_model(model: PreTrainedModel) -> None:
    """Raise `ModelError` for a model in which no tokens can be dropped from deeper layers, and say why."""
    facts, name, attention = model_facts(model), type(model).__name__, own_attention(model)
    windows = facts.sliding_windows
    if facts.other_layers:
        lacking = "has layers with a recurrent state, which reads all tokens in turn"
    elif not isinstance(getattr(model.get_decoder(), "layers", None), nn.ModuleList):
        lacking = "has a decoder without a list named layers, whose inputs could be cut"
    elif None not in windows:
        lacking = "has a sliding window in every layer, and such layers drop no tokens"
    elif attention == "flex_attention":
        lacking = "runs with flex_attention, whose masks are functions of consecutive tokens"
    elif "flash" in attention and any(windows):
        lacking = f"runs with {attention}, whose sliding windows count tokens and not positions"
    else:
        return
    advice = "; load it with attn_implementation='sdpa', or" if attention in lacking else ";"
    raise ModelError(f"{name} {lacking}, so no prefill can be pruned{advice} choose another selector, as snapkv")


class PruningLayer(CompressedLayer):
    """A layer that lets only what it holds of a prompt enter the next one; see `Selector.prunes_prefill`.

    All heads hold the same tokens. A layer with a sliding window lets all tokens pass. After the prompt it is like any
    other layer: each holds tokens of its own, at their true positions.
    """

    #: While a prompt is read: the tokens that enter this layer (None: all), those that enter the next one, and the
    #: places of these among those.
    entering: Survivors | None = None
    leaving: Survivors | None = None
    within: Tensor | None = None
    _flash = False

    def _clear(self) -> None:
        super()._clear()
        self.forget_call()

    def forget_call(self) -> None:
        """Forget which tokens a call has dropped."""
        self.entering = self.leaving = self.within = None

    def begin_prompt(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
        """Check the call of a decoder that brings the prompt.

        Raises:
            ModelError: as `check_model`, for an attention implementation that was chosen meanwhile.
            UsageError: if it asks for an output of each layer, or brings what has a place for each token and cannot
                be cut.
        """
        self.forget_call()
        check_model(model)
        self._flash = "flash" in own_attention(model)
        if (found := other_by_token(kwargs)) is not None:
            raise UsageError(
                f"selector {self.selector.name!r} cannot cut {found!r}, which has a place for each token (as images of "
                "Qwen3-VL have); leave it out, or choose another selector, such as snapkv"
            )
        for name in outputs_by_layer(model.get_decoder(), kwargs):
            raise UsageError(
                f"{name} cannot be had of a prompt under selector {self.selector.name!r}, because each layer reads "
                "other tokens; leave it out"
            )

    @torch.compiler.disable
    def enter(
        self, below: PruningLayer | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments of the decoder layer, cut to the tokens that are left; None where nothing changes.

        Args:
            below: the layer before this one.
            module: the decoder layer.
            args, kwargs: its arguments for all tokens of the call, with the hidden states that come out of the layer
                before.

        Raises:
            ModelError: for an argument with a place for each token that we do not know.
        """
        if self.is_initialized or below is None or below.leaving is None:
            return None
        self.entering, within = below.leaving, below.within
        kwargs = by_name(module, args, kwargs)
        left = self.entering
        cut = {}
        for name, value in kwargs.items():
            if name == "hidden_states":
                cut[name] = value if within is None else _taken(value, within, 1)
            elif name == "attention_mask":
                cut[name] = left.of_mask(value)
            elif name == "position_embeddings":
                cut[name] = _taken(value, left.columns, -2)
            elif name == "position_ids":
                # Flash attention takes gaps between positions for the ends of packed texts.
                cut[name] = None if self._flash else _taken(value, left.columns, -1)
            elif isinstance(value, Tensor) and left.tokens in value.shape[:2]:
                raise ModelError(
                    f"{type(module).__name__} takes {name!r} with a place for each token, which EvolKV does not know "
                    f"how to cut; selector {self.selector.name!r} cannot be used with it, choose another, as snapkv"
                )
            else:
                cut[name] = value
        return (), cut

    def whole(self, states: Tensor) -> Tensor:
        """Return the hidden states of all tokens of a call, ``[batch, tokens, dim]``: zeros where they were dropped.

        Args:
            states: those that came out of this layer.
        """
        left = self.entering
        if left is None or states.shape[1] == left.tokens:
            return states
        columns = left.columns.to(states.device)[..., None].expand_as(states)
        return states.new_zeros((len(states), left.tokens, states.shape[2])).scatter(1, columns, states)

    def store_prompt(self, prompt: PromptAttention, padding: Tensor | None) -> None:
        """See `CompressedLayer.store_prompt`; what is held is noted for the next layer."""
        present = self.entering or Survivors.all_of(prompt.key, padding)
        real = real_tokens(present.real, prompt.key)
        self._lay_out(present.lengths)
        rankings = self._rankings(prompt, present, real)
        self._store(prompt.key, prompt.value, rankings, real)
        if self.entering is not None:
            self._take_positions(present, real)
        last = self.context is not None and self.context.last
        self.leaving, self.within = self.entering, None
        if last or self.sliding_window is not None or all(ranking is None for ranking in rankings):
            return
        chosen = torch.zeros_like(present.real)
        for i, (ranking, count) in enumerate(zip(rankings, self._passing(present), strict=True)):
            tokens = torch.arange(chosen.shape[1], device=chosen.device) if real is None else real[i]
            chosen[i, tokens if ranking is None else tokens[ranking[0, 0, :count]]] = True
        if not bool((chosen == present.real).all()):
            self.leaving, self.within = present.among(chosen)

    def _rankings(
        self, prompt: PromptAttention, present: Survivors, real: list[Tensor] | None
    ) -> Sequence[Tensor | None]:
        """Return the ranking of each sequence, ``[1, kv_heads, tokens]``, or None where every token is kept anyway."""
        batch, heads = prompt.key.shape[:2]
        cut = self.entering is not None
        with torch.no_grad():
            if real is None and len(set(present.lengths)) == 1:
                if cut:
                    places = present.positions[:, None].expand(-1, heads, -1)
                    prompt = replace(prompt, positions=places, seen=present.lengths[0])
                ranking = self._rank(prompt)
                return [None] * batch if ranking is None else ranking.split(1)
            rankings = []
            for i, one in enumerate(prompt.sequences(real)):
                if cut:
                    places = present.positions[i] if real is None else present.positions[i, real[i]]
                    one = replace(one, positions=places.expand(1, heads, -1), seen=present.lengths[i])
                rankings.append(self._rank(one))
            return rankings

    def _rank(self, prompt: PromptAttention) -> Tensor | None:
        window = self.sliding_window
        # Of what is left some may be out of the window, however much of it the budget covers.
        in_reach = window is None or (prompt.positions is None and window >= prompt.num_tokens)
        if in_reach and int(self.budgets.min()) >= prompt.num_tokens:
            return None
        ranking = self.selector.rank(prompt)
        return ranking[:, :1].expand_as(ranking)

    def _lay_out(self, lengths: list[int]) -> None:
        super()._lay_out(lengths if self.entering is None else self.entering.lengths)

    def _counts(self, lengths: list[int]) -> np.ndarray:
        counts = super()._counts(lengths)
        if self.entering is None or self.sliding_window is None:
            return counts
        ends = torch.tensor(self.entering.lengths, device=self.entering.positions.device)[:, None]
        within = self.entering.real & (self.entering.positions >= ends - self.sliding_window)
        return np.minimum(counts, within.sum(dim=1).cpu().numpy().repeat(self.num_kv_heads))

    def _passing(self, present: Survivors) -> list[int]:
        """Return how many tokens of each sequence the layer holds, and lets pass."""
        left = present.real.sum(dim=1).cpu().numpy()
        return np.minimum(left, np.broadcast_to(self.budgets, (len(left), self.num_kv_heads))[:, 0]).tolist()

    def _take_positions(self, present: Survivors, real: list[Tensor] | None) -> None:
        """Note the true positions of what is held, and the length of the whole prompt."""
        for group in self.groups:
            sequences = (group.rows // self.num_kv_heads).tolist()
            rows = [present.positions[i] if real is None else present.positions[i, real[i]] for i in sequences]
            held = [row[places.long()] for row, places in zip(rows, group.positions, strict=True)]
            group.positions = torch.stack(held).to(torch.int32)
        self.prompt_lengths, self.prompt_width = list(present.lengths), present.tokens


def tokens_computed(layers: Sequence[CompressedLayer]) -> list[tuple[int, int]]:
    """Return the tokens that entered all layers, summed, and those of a plain prefill, for each sequence.

    Args:
        layers: of a cache that holds prompts, in order.
    """
    lengths = np.array(layers[0].prompt_lengths, dtype=np.int64)
    left, entered = lengths, np.zeros_like(lengths)
    for layer in layers:
        entered = entered + left
        if isinstance(layer, PruningLayer) and layer.sliding_window is None:
            budgets = np.broadcast_to(layer.budgets, (len(lengths), layer.num_kv_heads))[:, 0]
            left = np.minimum(left, budgets)
    return list(zip(entered.tolist(), (len(layers) * lengths).tolist(), strict=True))
