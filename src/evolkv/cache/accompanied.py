"""A cache whose layers read what a companion model chooses: SmallKV.

Zhao et al. 2025, arXiv 2508.02751. See `evolkv.selectors.smallkv`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from evolkv.cache.by_group import ByGroupLayer
from evolkv.cache.companion import CompanionCache, attention_received, companion_of, matching_heads
from evolkv.cache.costs import CacheCosts
from evolkv.cache.hooked import HookedCache
from evolkv.cache.masks import real_tokens
from evolkv.cache.math import LogitTerms, attention
from evolkv.cache.rows import RowGroup, rows_of
from evolkv.errors import RunError, UsageError
from evolkv.selectors import PromptAttention
from evolkv.selectors.smallkv import SmallKV, Split


class AccompaniedLayer(ByGroupLayer):
    """A layer that holds every token, and of which each new token reads what a companion chooses.

    Budgets say how much of the prompt is read. A layer with a sliding window is read whole.

    Attributes:
        companion: the cache of the companion; set before each call.
        heads: the companion's head that stands for each query head, ``[batch, heads]``; None where nobody chooses.
    """

    selector: SmallKV
    companion: CompanionCache
    unsaved = (
        "the cache needs what a companion model holds of the same text, which a file does not have; use another "
        "selector than smallkv, or read the text again"
    )

    def _clear(self) -> None:
        super()._clear()
        self.heads: Tensor | None = None

    @classmethod
    def merge(cls, layers: Sequence[Self], room: int = 0) -> Self:
        """See `CompressedLayer.merge`."""
        merged = super().merge(layers, room)
        if heads := [layer.heads for layer in layers if layer.heads is not None]:
            merged.heads = torch.cat(heads)
        return merged

    def check_crop(self, count: int) -> None:
        """Refuse to take tokens back."""
        raise RunError(
            "cannot take tokens back from a cache with a companion model, which has added up what they attend to; use "
            "plain greedy search, sampling or beam search"
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `CompressedLayer.batch_select_indices`."""
        super().batch_select_indices(indices)
        if self.heads is not None:
            self.heads = self.heads[indices.to(self.heads.device)]

    def bytes_by_row(self) -> tuple[Tensor, Tensor]:
        """See `CompressedLayer.bytes_by_row`; of a marginal entry the value alone is read."""
        held, read = [], []
        for group, split in self._read_ways():
            keys, values = group.keys[0].nbytes, group.values[0].nbytes
            entries, exact, weighted = group.keys.shape[1], group.keys.shape[1], 0
            if split is not None:
                exact, weighted = entries - split.older + split.critical, split.marginal
            held.append(keys + values)
            read.append((exact * keys + (exact + weighted) * values) // entries)
        return rows_of(self.groups, held), rows_of(self.groups, read)

    def store_prompt(self, prompt: PromptAttention, padding: Tensor | None) -> None:
        """See `CompressedLayer.store_prompt`; query heads find their companion's heads."""
        super().store_prompt(prompt, padding)
        if self.is_sliding:
            return
        sequences = prompt.sequences(real_tokens(padding, prompt.key))
        pairs = zip(sequences, self.companion.first_received, strict=True)
        with torch.no_grad():
            self.heads = torch.stack(
                [
                    matching_heads(attention_received(one, theirs.shape[1])[0], theirs.to(one.key.device))
                    for one, theirs in pairs
                ]
            )

    def _way_of(self, row: int, group: RowGroup) -> Split | None:
        sequence, head = divmod(row, self.num_kv_heads)
        budget = self.budgets[head] if self.budgets.ndim == 1 else self.budgets[sequence, head]
        return self.selector.split(int(budget), self.prompt_lengths[sequence])

    def _attend_group(self, number: int, query: Tensor, visible: Tensor | None, terms: LogitTerms) -> Tensor:
        group, split = self.groups[number], self._ways[number]
        received, latest = self._companions_view(group, split.older)
        ranked = received.mean(dim=1).argsort(dim=1, descending=True, stable=True)
        rows = torch.arange(len(group.rows), device=ranked.device)[:, None]
        critical, marginal = ranked[:, : split.critical], ranked[:, split.critical : split.critical + split.marginal]
        keys = torch.cat([group.keys[rows, critical], group.keys[:, split.older :]], dim=1)
        values = torch.cat([group.values[rows, critical], group.values[:, split.older :]], dim=1)
        if visible is not None:
            visible = visible[..., split.older - split.critical :]
        output = attention(query, keys, values, visible, terms)
        weights = latest.gather(2, marginal[:, None].expand(-1, query.shape[1], -1))
        exact = 1 - weights.sum(dim=2, keepdim=True)
        return (output * exact + weights @ group.values[rows, marginal].float()).to(query.dtype)

    def _companions_view(self, group: RowGroup, older: int) -> tuple[Tensor, Tensor]:
        """Return what the first entries of rows have received, and from the last token: ``[rows, queries, older]``."""
        assert self.heads is not None
        assert self.companion.received is not None
        assert self.companion.latest is not None
        theirs = self.heads.view(self.batch * self.num_kv_heads, -1)[group.rows]
        sequences = (group.rows // self.num_kv_heads)[:, None]
        device, own = self.companion.latest.device, group.keys.device
        where = sequences.to(device), theirs.to(device), slice(older)
        return self.companion.received[where].to(own), self.companion.latest[where].to(own)


class Accompanied(CacheCosts, HookedCache):
    """A cache that may have a companion, to which it passes on what happens to its sequences."""

    def read_ahead(self, arguments: Mapping[str, Any]) -> None:
        """See `HookedCache.read_ahead`; the companion reads each token before the large model does."""
        if isinstance(self.kv_layers[0], AccompaniedLayer):
            self._have_companion_read(self.kv_layers[0].selector, arguments)

    @torch.compiler.disable
    def _have_companion_read(self, selector: SmallKV, arguments: Mapping[str, Any]) -> None:
        if self.companion is None:
            model = companion_of(self.model(), selector)
            assert model is not None
            self.companion = CompanionCache(model, selector.match)
        for layer in self.kv_layers:
            assert isinstance(layer, AccompaniedLayer)
            layer.companion = self.companion
        self.companion.read(arguments)
        # If the model fails now, the two differ in what they have read.
        self.unfinished = True

    @torch.compiler.disable
    def end_call(self, arguments: Mapping[str, Any], states: Tensor) -> Tensor:
        """See `HookedCache.end_call`."""
        states = super().end_call(arguments, states)
        if self.companion is not None:
            self.companion.forget_call()
        return states

    @property
    def most_tokens(self) -> int | None:
        """See `HookedCache.most_tokens`; after the prompt each token comes alone."""
        alone = isinstance(self.kv_layers[0], AccompaniedLayer) and self.get_seq_length() > 0
        return 1 if alone else super().most_tokens

    def release(self) -> None:
        """See `HookedCache.release`; the companion's attention is given back, too."""
        super().release()
        if self.companion is not None:
            self.companion.release()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these numbers, in that order; a number may occur several times."""
        super().batch_select_indices(indices)
        if self.companion is not None:
            self.companion.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens, which must have come after the prompt.

        Raises:
            UsageError: for a positive number, which transformers refuses, too.
            RunError: if a layer cannot; then none does.
        """
        if tokens_to_remove > 0:
            raise UsageError(
                f"crop({tokens_to_remove}) does not say what to take back; give crop(-{tokens_to_remove}) to take back "
                f"{tokens_to_remove} tokens, or crop(length - cache.get_seq_length()) to keep `length`"
            )
        if count := -tokens_to_remove:
            for layer in self.kv_layers:
                layer.check_crop(count)
            if not all(state.record_past for state in self.state_layers):
                raise RunError(
                    f"cannot take back {count} tokens from recurrent states; use plain greedy search, sampling or beam "
                    "search"
                )
        super().crop(-count)

    def reset(self) -> None:
        """See `CompressedCache.reset`."""
        super().reset()
        self.companion = None
