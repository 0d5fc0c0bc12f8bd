"""The compressed cache."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.budgets import BudgetSpec
from evolkv.cache.accompanied import Accompanied
from evolkv.cache.companion import CompanionCache
from evolkv.cache.generate import check_ids, check_text, prompt_inputs, whole_text
from evolkv.cache.hook import hook_model
from evolkv.cache.hooked import HookedCache, layer_contexts
from evolkv.cache.layer import CompressedLayer
from evolkv.cache.reeviction import ONCE, ReevictingLayer, Reeviction
from evolkv.cache.rereading import check_prompts, store_reread
from evolkv.cache.resolve import LayerMaker, layer_class
from evolkv.cache.state import StateLayer
from evolkv.errors import UsageError
from evolkv.methods import MethodSpec
from evolkv.models.identity import adapters_in_use
from evolkv.numbers import is_whole


class CompressedCache(Accompanied):
    """A key-value cache that keeps, of each prompt, only what a profile allows.

    Pass it to ``generate(cache=...)`` or to a forward call. The first
    forward call is the prompt: it attends to all of itself and is then cut down layer by layer, so that its full keys
    and values never exist for more than one layer at a time. Later tokens are appended. `reset` makes it ready for
    another prompt. With `prefill_chunk`, `evict` or `evict_every` it evicts again after the first call
    (docs/generation.md).

    `prefill` has a prompt read without an answer; `followed_by` says what `generate` needs to go on from there; `copy`
    branches off; `save` and `load` carry what was read to another day.

    Attributes:
        input_ids: ids of the text so far, ``[batch, tokens]``, padding included: all tokens seen, and perhaps some that
            are still to be read. Known after `prefill` and `load`; after ``output = generate(...)`` set it to `output`,
            unless that was beam search. None where nobody said.
        image_offsets: how far images in the text move the positions of later tokens, ``[batch, 1]``, in models that
            keep that (Qwen-VL); else None.
        prefill_factor: how many tokens the model read for each of the prompt's: above 1 under a selector that has it
            read the prompt again (kvzip).

    Args:
        model: a transformers decoder-only model.
        profile: budgets and selector, belonging to the model; or another method, in any form that
            `evolkv.methods.get_method` takes, such as ``"adakv+snapkv"``.
        budget: mean cache entries per KV head of a method, or a share of each prompt, such as ``"10%"``; a profile is
            expanded to it. Default: the profile's own. Each sequence of a batch gets the share of its own length. Where
            the cache evicts again, the share is of all that the sequence has read when it is cut.
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
    _input_ids: Tensor | None = None
    image_offsets: Tensor | None = None
    prefill_factor: float = 1.0
    _searched: bool = False
    _awaits_drafts: bool = False

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
        super().__init__(model, LayerMaker(model, profile, budget, Reeviction(prefill_chunk, evict, evict_every))())

    @classmethod
    def with_layers(
        cls, model: PreTrainedModel, kv_layers: list[CompressedLayer], states: Sequence[StateLayer] | None = None
    ) -> CompressedCache:
        """Return a cache of layers that are known to fit the model."""
        cache = cls.__new__(cls)
        HookedCache.__init__(cache, model, kv_layers, states)
        return cache

    @property
    def input_ids(self) -> Tensor | None:
        """Ids of the text so far; see the class."""
        return self._input_ids

    @input_ids.setter
    def input_ids(self, input_ids: Tensor | None) -> None:
        if input_ids is not None:
            check_ids(input_ids)
        self._input_ids = input_ids

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
        """Read prompts and return a cache that holds what a profile, or another method, keeps of them.

        Args:
            model, profile, budget, prefill_chunk, evict, evict_every: as for the class.
            input_ids: the prompts, ``[batch, tokens]``.
            attention_mask: ``[batch, tokens]``, 0 for padding; None where there is none.

        Raises:
            ProfileError, ModelError, UsageError: as for the class; UsageError also for another shape, ModelError for
                ids that the model has no embeddings for.
        """
        cache = cls(model, profile, budget, prefill_chunk=prefill_chunk, evict=evict, evict_every=evict_every)
        inputs = prompt_inputs(model, input_ids, attention_mask)
        # Else the model would place what follows by the images of the text that it read before.
        cache.model_offsets = None
        # The decoder alone, which computes no logits.
        with torch.no_grad():
            model.get_decoder()(**inputs, use_cache=True, cache=cache)
        cache.end_prompt()
        cache.input_ids = inputs["input_ids"]
        return cache

    def followed_by(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        """Return what `generate` needs to go on: ``model.generate(**cache.followed_by(question), ...)``.

        The tokens that the cache has seen are not computed again. What they and the answer add is kept whole (unless
        the cache evicts again); to ask another question of the same text, ask a `copy`.

        Args:
            input_ids: what is read next, ``[batch, tokens]``; or one row, for every sequence.
            attention_mask: 0 for padding, for what is read next, in the shape of `input_ids`; or for the whole text, as
                `generate` takes it. Default: nothing of what is read next is padding. Of the text so far that is known
                where calls had a mask; and where `generate` filled up the rows of a batch that ended before others with
                the model's pad token (that of its `generation_config`).

        Raises:
            UsageError: if the text so far is not known, or not all of it; for another number of sequences; after beam
                search; or if other adapters are active now than when the text was read.
        """
        check_ids(input_ids)
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
        # generate() asks the model how far images moved positions; it may have read another text meanwhile.
        self.model_offsets = self.image_offsets
        layers = [*self.kv_layers, *(() if self.companion is None else self.companion.kv_layers)]
        ids, mask = whole_text(self.model(), layers, self.input_ids, input_ids, attention_mask)
        return {"input_ids": ids, "attention_mask": mask, "use_cache": True, "cache": self}

    def begin_generation(self, ids: Any, mask: Tensor | None, new: int | None) -> None:
        """Checks the text that `generate` goes on from, before its first forward call; see `check_text`.

        Raises:
            UsageError: for another text than the cache has read; for a prompt that comes in several calls to a cache
                that would cut the first alone.
        """
        seen, before = self.get_seq_length(), self._seen_before_generate
        in_pieces = seen and (before == 0 or (before is None and self.block is not None))
        if in_pieces and not (self.reeviction.prefill_chunk or self.reeviction.evict == "again"):
            raise UsageError(
                "generate(prefill_chunk_size=...) brings the prompt in several calls, of which only the first would be "
                "compressed; leave it out, or give the cache or compress() prefill_chunk=N to evict after each chunk"
            )
        if seen:
            self._check_adapters()
            check_text(self.input_ids, seen, ids, mask, new)

    def _check_adapters(self) -> None:
        """Raise `UsageError` if the model computes with other adapters than when it read the text."""
        if self.adapters is not None and self.adapters != adapters_in_use(self.model()):
            raise UsageError(
                "the cache holds what the model computed with other adapters than are active now; activate those it "
                "was read with, or read the text again"
            )

    def _check_text(self) -> None:
        """Raise `UsageError` if `input_ids` cannot be what the rows hold, or other adapters are active now."""
        self._check_adapters()
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
        """Return a cache that holds the same and goes its own way.

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
        twin = CompressedCache.with_layers(model, layers, [state.copy() for state in self.state_layers])
        twin.input_ids, twin._searched, twin.adapters = self.input_ids, self._searched, self.adapters
        twin.image_offsets, twin.prefill_factor = self.image_offsets, self.prefill_factor
        twin.companion = None if self.companion is None else self.companion.copy()
        return twin

    def __copy__(self) -> CompressedCache:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        # What is shared is never written to.
        return self.copy()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what the cache holds to a file, with `input_ids` where they are known; see `load`.

        A cache that evicts again is written with its settings and what the next cut will need.

        Args:
            path: the file; what was there is replaced.

        Raises:
            UsageError: if there is nothing to write yet, a call failed half-way, or no file can be at `path`; if
                `input_ids` has another number of rows than there are sequences; after beam search; or if other adapters
                are active now than when the text was read.
            RunError: if the file cannot be written.
        """
        self.check_finished()
        from evolkv.cache.files import write_cache

        self._check_text()
        text = {"input_ids": self.input_ids, "image_offsets": self.image_offsets}
        write_cache(path, self.model(), self.kv_layers, self.state_layers, text, self.prefill_factor)

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

        held = read_cache(path, model)
        cache = cls.with_layers(model, held.layers, held.states)
        cache.input_ids, cache.image_offsets, cache.prefill_factor = held.input_ids, held.offsets, held.prefill_factor
        cache.adapters = adapters_in_use(model)
        return cache

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keeps the sequences `indices`, in that order; an index may occur several times.

        Args:
            indices: a tensor or a list of whole numbers, negative ones from the end, or of one truth value for each
                sequence.

        Raises:
            UsageError: for indices of sequences that there are not.
        """
        indices = torch.as_tensor(indices)
        rows = self.num_rows if self.get_seq_length() else 0
        if indices.dtype == torch.bool:
            fits = indices.shape == (rows,)
        else:
            fits = indices.ndim == 1 and not indices.is_floating_point()
            fits = fits and bool(((indices >= -rows) & (indices < rows)).all())
            indices = indices.where(indices >= 0, indices + rows)
        if rows and not fits:
            raise UsageError(
                f"{indices.tolist()} does not choose among {rows} sequences; expected numbers from 0 to {rows - 1}"
            )
        self._select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence ``i`` a copy of the present sequence ``beam_idx[i]``; beam search asks for it.

        Args:
            beam_idx: numbers of sequences, ``[sequences]``.
        """
        super().batch_select_indices(beam_idx)
        self._searched = True

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence.

        Args:
            repeats: how many times.

        Raises:
            UsageError: unless `repeats` is a positive whole number.
        """
        if not is_whole(repeats) or repeats < 1:
            raise UsageError(f"repeats is {repeats!r}; expected a whole number from 1")
        self._select(torch.arange(self.num_rows).repeat_interleave(repeats))

    def _select(self, sequences: Tensor) -> None:
        """Keep sequences by number, ``[sequences]``, and what is known of their texts."""
        if not self.get_seq_length():
            return
        super().batch_select_indices(sequences)
        for name in ("input_ids", "image_offsets"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, held[sequences.to(held.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """See `Accompanied.crop`; `input_ids` end there, too."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.input_ids is not None:
            self.input_ids = self.input_ids[:, : self.get_seq_length()]

    def reset(self) -> None:
        """Empties the cache, which is then ready for another prompt.

        Raises:
            UsageError: if a file, or merged caches, gave it budgets that were laid out for their texts alone.
        """
        if any(layer.is_of_one_text for layer in self.kv_layers):
            raise UsageError("the cache has budgets for the texts that it holds alone; make a new CompressedCache")
        super().reset()
        self.input_ids = self.image_offsets = None
        self._searched, self.prefill_factor = False, 1.0

    def activate_past_recording(self) -> None:
        """Expect drafted tokens along with the prompt in the next call; assisted decoding asks for it.

        Raises:
            UsageError: if the cache holds a prompt, since transformers would bring it again.
        """
        if self.get_seq_length():
            raise UsageError(
                "assisted decoding cannot go on from a cache that holds a prompt, since transformers would read it a "
                "second time; pass a new CompressedCache, or generate without assistance"
            )
        self.kv_layers[0].selector.check_drafts()
        super().activate_past_recording()
        self._awaits_drafts = True
        hook_model(self.model())

    def note_call(self, kwargs: dict[str, Any]) -> None:
        """Takes note of the drafts in a call of the model, the first one since `activate_past_recording`.

        Raises:
            UsageError: for labels of a prompt of which tokens are dropped while it is read.
        """
        kept = kwargs.get("logits_to_keep")
        if self._prunes and kwargs.get("labels") is not None and not self.get_seq_length():
            raise UsageError(
                "labels cannot be scored over a prompt whose tokens are dropped while it is read; leave them out, or "
                "read the prompt first and give labels for what follows"
            )
        # A call that is not generate's has no drafts: generate may have failed before its first.
        if self._awaits_drafts and isinstance(kept, int) and kept > 1:
            for layer in self.kv_layers:
                # transformers wants logits of the last prompt token and of each draft.
                layer.drafted = kept - 1
        self._awaits_drafts = False

    def read_ahead(self, arguments: Mapping[str, Any]) -> None:
        """See `HookedCache.read_ahead`."""
        super().read_ahead(arguments)
        if not self.get_seq_length():
            check_prompts(self.model(), self.kv_layers, arguments)

    def read_again(self, arguments: Mapping[str, Any]) -> None:
        """See `HookedCache.read_again`."""
        if self.kv_layers[0].awaiting is not None:
            self.prefill_factor = store_reread(self.model(), self.kv_layers, arguments)

    @torch.compiler.disable
    def end_call(self, arguments: Mapping[str, Any], states: Tensor) -> Tensor:
        """See `HookedCache.end_call`."""
        states = super().end_call(arguments, states)
        offsets, rows = self.model_offsets, self.num_rows
        self.image_offsets = None
        if offsets is not None and rows % len(offsets) == 0:
            # generate() repeats sequences that it returns several times, but not what the model keeps of them.
            self.image_offsets = offsets.repeat_interleave(rows // len(offsets), dim=0)
        return states

    @property
    def reeviction(self) -> Reeviction:
        """Return the moments at which the cache evicts again."""
        layer = self.kv_layers[0]
        return layer.reeviction if isinstance(layer, ReevictingLayer) else ONCE

    @property
    def evicts_later(self) -> bool:
        """Return whether a later call may evict something: of a prompt that goes on, or after it."""
        return any(isinstance(layer, ReevictingLayer) and layer.evicts_later for layer in self.kv_layers)

    @property
    def most_tokens(self) -> int | None:
        """See `HookedCache.most_tokens`."""
        return self.reeviction.prefill_chunk or super().most_tokens

    def end_prompt(self) -> None:
        """Mark a prompt that may come in several calls as complete; a call of a single token does so too."""
        for layer in self.kv_layers:
            if isinstance(layer, ReevictingLayer):
                layer.end_prompt()

    @property
    def num_rows(self) -> int:
        """Sequences held."""
        return self.kv_layers[0].batch

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

    @classmethod
    def merge(cls, model: PreTrainedModel, caches: list[CompressedCache], room: int = 0) -> CompressedCache:
        """Return one cache with the sequences of several, each right after its prompt.

        The caches must not be used afterwards: the new one shares memory with them.

        Args:
            model: the model that all of them were made with.
            caches: at least one.
            room: new tokens to leave room for.

        Raises:
            UsageError: for caches that may evict again. One whose prompt was read in chunks does not, once `end_prompt`
                has said that it is complete. Also for caches that hold no prompt, or something after it, or of which a
                call failed half-way.
        """
        for other in caches:
            other.check_finished()
        if any(other.evicts_later for other in caches):
            raise UsageError(
                "caches that evict again cannot be merged; leave out evict and evict_every, and call end_prompt() "
                "after a prompt that was read in chunks"
            )
        if not caches or any(not other.num_rows or other.kv_layers[0].appended for other in caches):
            raise UsageError(
                "only caches that have read a prompt, and nothing after it, can be merged, at least one; merge them "
                "right after their prompts, or copies that were made then"
            )
        own = layer_class(caches[0].kv_layers[0].selector)
        columns = zip(*(other.kv_layers for other in caches), strict=True)
        states = zip(*(other.state_layers for other in caches), strict=True)
        merged = cls.with_layers(
            model,
            [own.merge(column, room) for column in columns],
            [StateLayer.merge(column) for column in states],
        )
        merged.adapters = caches[0].adapters
        lengths = [sum(other.kv_layers[0].prompt_lengths) for other in caches]
        read = sum(other.prefill_factor * length for other, length in zip(caches, lengths, strict=True))
        merged.prefill_factor = read / sum(lengths) if sum(lengths) else 1.0
        offsets = [other.image_offsets for other in caches if other.image_offsets is not None]
        if len(offsets) == len(caches):
            merged.image_offsets = torch.cat(offsets)
        if companions := [other.companion for other in caches if other.companion is not None]:
            merged.companion = CompanionCache.merge(companions, room)
        return merged
