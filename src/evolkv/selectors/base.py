"""The base of every selector: its inputs, its interface, and attention probabilities for scoring."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from evolkv.errors import RunError, UsageError
from evolkv.models.rotary import Rotary
from evolkv.specs import format_spec


@dataclass(frozen=True)
class LayerContext:
    """The place of a layer, for selectors that look beyond it.

    Args:
        index: its number in the model, from 0.
        rotary: gives its rotary position embedding; raises `ModelError` if it has none.
        memory: what selectors remember of the same prompt from layer to layer.
        last: whether no layer comes after it.
    """

    index: int
    rotary: Callable[[], Rotary]
    memory: dict[Any, Any] = field(default_factory=dict)
    last: bool = False

    def of_sequence(self, number: int) -> LayerContext:
        """Return the same for one sequence of a batch, with a memory of its own."""
        return replace(self, memory=self.memory.setdefault(number, {}))

    def leave(self) -> None:
        """Says that the layer has ranked the prompt; nobody remembers anything of it after the last one has."""
        if self.last:
            self.memory.clear()


@dataclass(frozen=True)
class PromptAttention:
    """One layer's attention inputs over a prompt, after RoPE and before any repetition of KV heads.

    Over what a cache still holds of the tokens seen so far, to be cut again, each head has entries of its own:
    `positions` tells which. The queries are then those of the newest tokens, all of which are held, so that they stand
    last in every head.

    Args:
        query: queries, ``[batch, heads, tokens, head_dim]``.
        key: keys, ``[batch, kv_heads, tokens, head_dim]``.
        value: values, ``[batch, kv_heads, tokens, value_dim]``.
        scaling: factor on the attention logits.
        softcap: Gemma 2's cap on the attention logits, or None.
        sinks: a logit for each query head that only enters the softmax's denominator (GPT-OSS), ``[heads]``, or None.
        sliding_window: how many tokens (itself included) a query of this layer sees, or None for all.
        first_query: position of the first query. Above 0 where the head of the prompt was computed earlier, for
            another prompt that shares it; the queries are then the last ``tokens - first_query``.
        layer: where the layer is in the model, if it is in one.
        positions: of each entry, ``[batch, kv_heads, tokens]``, ascending; None where every token of the prompt is
            there. A head with fewer entries than others has -1 in front, and zeros there for keys and values.
        seen: tokens seen so far, held or not; None where every one is there.
        received: what a selector that `accumulates` had found of each entry before these queries,
            ``[batch, kv_heads, tokens]``.
        repeated: what each entry received while the model read the prompt again, for a selector that `rereads`,
            ``[batch, kv_heads, tokens]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None = None
    sliding_window: int | None = None
    first_query: int = 0
    layer: LayerContext | None = None
    sinks: Tensor | None = None
    positions: Tensor | None = None
    seen: int | None = None
    received: Tensor | None = None
    repeated: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Entries of a head: the length of the prompt, or what is held of the tokens seen."""
        return self.key.shape[2]

    @property
    def length(self) -> int:
        """Tokens seen so far, and so the position of the next one."""
        return self.num_tokens if self.seen is None else self.seen

    @property
    def places(self) -> Tensor:
        """Position of each entry, ``[batch, kv_heads, tokens]``; negative where a head has none."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.num_tokens, device=self.key.device).expand(self.key.shape[:3])

    @property
    def most_held(self) -> int:
        """Tokens that the next query may see: all, or those in the sliding window."""
        return min(self.num_tokens, self.sliding_window or self.num_tokens)

    def without_queries(self) -> PromptAttention:
        """Return the same without the queries, which can take more memory than keys and values."""
        return replace(self, query=self.query.new_empty(self.query[:, :, :0].shape), first_query=self.num_tokens)

    def of_sequence(self, index: int, tokens: Tensor) -> PromptAttention:
        """Return one sequence of a padded batch, cut down to its real tokens."""
        at = slice(index, index + 1)
        asking = tokens[tokens >= self.first_query]
        return replace(
            self,
            query=self.query[at, :, asking - self.first_query],
            key=self.key[at, :, tokens],
            value=self.value[at, :, tokens],
            first_query=len(tokens) - len(asking),
            repeated=None if self.repeated is None else self.repeated[at, :, tokens],
            layer=None if self.layer is None else self.layer.of_sequence(index),
        )

    def sequences(self, real: Sequence[Tensor] | None) -> list[PromptAttention]:
        """Return each sequence of a batch by itself; `real` has the real tokens of each, or is None for all."""
        everything = torch.arange(self.num_tokens, device=self.key.device)
        return [self.of_sequence(i, everything if real is None else real[i]) for i in range(len(self.key))]

    def mean_over_heads(self, scores: Tensor) -> Tensor:
        """Return the scores of each token, averaged over the KV heads that hold it.

        Args:
            scores: ``[batch, kv_heads, tokens]``, the shape of the result.
        """
        if self.positions is None:
            return scores.mean(dim=1, keepdim=True).expand_as(scores)
        slots = (self.positions + 1).flatten(1)
        totals = scores.new_zeros((len(scores), self.length + 1)).scatter_add(1, slots, scores.flatten(1))
        heads = scores.new_zeros(totals.shape).scatter_add(1, slots, torch.ones_like(scores).flatten(1))
        return (totals / heads.clamp(min=1)).gather(1, slots).view_as(scores)

    def probabilities(self, start: int, stop: int) -> Tensor:
        """Return the attention of some queries to all entries, in float32.

        Args:
            start: the first entry whose query counts.
            stop: the entry after the last one.

        Returns:
            ``[batch, kv_heads, queries_per_kv_head, stop - start, stop]``: keys from ``stop`` on are
            invisible to these queries and left out. Where the model has sinks, a query's sum is below 1 by what
            goes to its sink, as in the model: a query that looks at nothing in particular says little.
        """
        batch, kv_heads, _, head_dim = self.key.shape
        group = self.query.shape[1] // kv_heads
        count = stop - start
        if start < self.first_query:
            raise UsageError(
                f"a selector asks for the query of entry {start}, but only those from {self.first_query} on are there; "
                "its observed_queries must be the number of last queries that it looks at, or None for all"
            )
        query = self.query[:, :, start - self.first_query : stop - self.first_query].float() * self.scaling
        query = query.reshape(batch, kv_heads, group * count, head_dim)
        logits = query @ self.key[:, :, :stop].float().transpose(2, 3)
        logits = logits.view(batch, kv_heads, group, count, stop)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        rows = torch.arange(start, stop, device=logits.device)[:, None]
        columns = torch.arange(stop, device=logits.device)
        # Only the square of keys that are younger than the first query can be in some query's future.
        logits[..., start:].masked_fill_(columns[start:] > rows, float("-inf"))
        if self.positions is None:
            if self.sliding_window is not None and stop > self.sliding_window:
                logits.masked_fill_(columns <= rows - self.sliding_window, float("-inf"))
        else:
            hidden = (self.positions < 0)[:, :, None, :stop]
            if self.sliding_window is not None:
                asking = self.positions[:, :, start:stop, None]
                hidden = hidden | (self.positions[:, :, None, :stop] <= asking - self.sliding_window)
            logits.masked_fill_(hidden[:, :, None], float("-inf"))
        sinks = None if self.sinks is None else self.sinks.view(kv_heads, group, 1)
        return softmax_with_sinks(logits, sinks)


@dataclass(frozen=True)
class Words:
    """Token ids of the words around what a model is to repeat.

    Args:
        first: ask for the beginning of the prompt.
        later: ask for a later part; the tokens that it follows come behind.
        answer: end the question, and begin the answer.
    """

    first: Sequence[int]
    later: Sequence[int]
    answer: Sequence[int]


@dataclass(frozen=True)
class Passage:
    """Tokens that a model reads behind a prompt, to repeat a part of it.

    Args:
        start, stop: the part of the prompt, in positions.
        ids: what the model reads.
    """

    start: int
    stop: int
    ids: Sequence[int]


def softmax_with_sinks(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys of ``[..., queries, keys]``, with a sink for each query, ``[..., queries]``, or none."""
    if sinks is None:
        return logits.softmax(dim=-1)
    sink = sinks.to(logits.dtype).unsqueeze(-1).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]


@dataclass(frozen=True)
class Selector(ABC):
    """Decides which tokens each KV head keeps, as one ranking that serves every budget.

    A subclass is a frozen dataclass whose fields are the method's hyper-parameters and which implements
    `score`. One that always keeps other tokens than a `window` of the last ones overrides `min_budget`.
    """

    name: ClassVar[str]
    #: Number of last prompt tokens that are always kept; they count in the budget.
    window = 0
    #: Whether the score is a sum over queries. Where a cache is cut again and again, it then goes on from the sum so
    #: far: such a selector implements `accumulated` and `protect`, of which `score` is made.
    accumulates: ClassVar[bool] = False
    #: The class of a cache's layers under this selector, written ``module:class``: a `CompressedLayer` that is made
    #: with the same arguments. None for `CompressedLayer` itself, which reads all that it holds.
    layer: ClassVar[str | None] = None
    #: The class that replays such layers for many candidates, written alike: a `ReplayLayer` that is made with the
    #: selector behind the same arguments. None where there is none.
    replay_layer: ClassVar[str | None] = None
    #: Whether the budgets decide what is computed of the prompt itself, so that each candidate has to read the prompt.
    #: A layer holds as many tokens as its budget, and only these enter the next one. Its heads have the same scores.
    prunes_prefill: ClassVar[bool] = False
    #: Whether the model has to read the prompt again for the score. Such a selector implements `passages` and
    #: `received`, and finds in `PromptAttention.repeated` what the passages gave.
    rereads: ClassVar[bool] = False

    @abstractmethod
    def score(self, prompt: PromptAttention) -> Tensor:
        """Return the importance of each token for each KV head; protected tokens score ``+inf``.

        Args:
            prompt: the layer's attention inputs.

        Returns:
            ``[batch, kv_heads, tokens]``; higher is kept first.
        """

    @property
    def min_budget(self) -> int:
        """Return the smallest budget this selector can serve: the number of tokens it always keeps, at least 1."""
        return max(1, self.window)

    @property
    def budgets_cut(self) -> bool:
        """Return whether the budgets say what a head holds (default), and so how far its ranking is cut."""
        return True

    @property
    def unit(self) -> str:
        """Return what a budget counts, as people read it."""
        return "cache entries" if self.budgets_cut else "entries read by a token"

    def held_under(self, budgets: np.ndarray) -> np.ndarray:
        """Return the entries that each head holds of a prompt that is long enough, in the shape of the budgets.

        Args:
            budgets: ``[layers, kv_heads]``.
        """
        return budgets

    @property
    def observed_queries(self) -> int | None:
        """Return how many of the prompt's last queries the score looks at; None (default) for all of them.

        A selector that says a number is given at least these, and is cheaper: prompts that begin alike are then
        prefilled once, and a cache that is cut again keeps no more queries.
        """
        return None

    @property
    def looks_at_other_layers(self) -> bool:
        """Return whether the score of a layer depends on that of another."""
        return False

    @property
    def companion(self) -> str | None:
        """Return the name of a model that reads along, as `load_model` takes it; None (default) where none does."""
        return None

    @property
    def reads_for_itself(self) -> bool:
        """Return whether each cache has to read a prompt itself, since none can be cut from another's prefill."""
        return self.prunes_prefill or self.companion is not None

    def check_replay(self) -> None:
        """Raise `UsageError` if one prefill cannot serve all candidates, so that only the engine "naive" can score."""
        if self.prunes_prefill:
            reason = "computes less of a prompt under smaller budgets, so no prefill serves two candidates"
        elif self.layer is not None and self.replay_layer is None:
            reason = "has cache layers of its own, and none to replay them"
        else:
            return
        raise UsageError(f"selector {self.name!r} {reason}; add --engine naive, which reads each prompt for each")

    def check_drafts(self) -> None:
        """Raise `UsageError` if drafts of assisted decoding cannot come along with the prompt."""
        if self.rereads:
            reason, advice = "cuts no layer before the model has read the prompt again", ""
        elif self.prunes_prefill:
            reason, advice = "drops tokens while it reads the prompt", ", or choose another selector"
        else:
            return
        raise UsageError(
            f"selector {self.name!r} {reason}, but assisted decoding brings drafts along with it; generate without "
            f"assistance{advice}"
        )

    def check_budgets(self, budgets: np.ndarray, sliding_windows: Sequence[int | None]) -> None:
        """Raise `UsageError` for budgets that cannot be kept to under this selector.

        Args:
            budgets: ``[layers, kv_heads]``.
            sliding_windows: of each layer, None where it sees everything.
        """
        if not self.prunes_prefill:
            return
        if (budgets != budgets[:, :1]).any():
            raise UsageError(
                f"selector {self.name!r} drops tokens from whole layers, so the heads of a layer must have one budget; "
                "use budgets by layer (--granularity layer)"
            )
        full = [(layer, int(row[0])) for layer, row in enumerate(budgets) if sliding_windows[layer] is None]
        for (lower, before), (layer, budget) in itertools.pairwise(full):
            if budget > before:
                raise UsageError(
                    f"selector {self.name!r} lets no token back that a layer has dropped, but the budgets rise from "
                    f"{before} in layer {lower} to {budget} in layer {layer}; use budgets that do not rise"
                )

    def accumulated(self, prompt: PromptAttention) -> Tensor:
        """Return the sum behind the score of a selector that `accumulates`, ``[batch, kv_heads, tokens]``.

        Args:
            prompt: the layer's attention inputs; `PromptAttention.received` has the sum so far.
        """
        raise NotImplementedError(f"{self.name} does not accumulate")

    def protect(self, scores: Tensor) -> Tensor:
        """Return the scores, with ``+inf`` for the tokens that a selector that `accumulates` always keeps.

        Args:
            scores: ``[batch, kv_heads, tokens]``.
        """
        raise NotImplementedError(f"{self.name} does not accumulate")

    @property
    def asks_in_words(self) -> bool:
        """Return whether `passages` needs words, and so the model's tokenizer."""
        return False

    def passages(self, ids: Sequence[int], words: Words | None) -> Iterator[Passage]:
        """Yield what the model reads behind a prompt, for a selector that `rereads`.

        Each passage stands directly behind the prompt, and together they cover it.

        Args:
            ids: token ids of the prompt.
            words: ids of the words to ask with; None where the selector asks without.
        """
        raise NotImplementedError(f"{self.name} does not have the model read a prompt again")

    def received(self, reading: PromptAttention, passage: Passage) -> Tensor:
        """Return what the entries of a passage's part of the prompt receive, ``[batch, kv_heads, stop - start]``.

        Args:
            reading: attention inputs over the prompt and the passage; the queries are the passage's.
            passage: the passage.
        """
        raise NotImplementedError(f"{self.name} does not have the model read a prompt again")

    def rank(self, prompt: PromptAttention) -> Tensor:
        """Return the order in which entries are kept.

        Ties go to the older token, always in the same way, so that budgets are nested. In a sliding-window layer
        the tokens that the next query no longer sees come last; so does what stands for no entry.

        Args:
            prompt: the layer's attention inputs.

        Returns:
            Numbers of the entries, from the first to be kept to the last, ``[batch, kv_heads, tokens]``.
        """
        return self.order(prompt, self.score(prompt))

    def order(self, prompt: PromptAttention, scores: Tensor) -> Tensor:
        """Return the ranking that follows from scores; see `rank`.

        Args:
            prompt: the layer's attention inputs.
            scores: as `score` returns them, ``[batch, kv_heads, tokens]``.

        Raises:
            UsageError: the scores of a selector, which may be another package's, are no tensor or have another shape.
            RunError: a score is not a number.
        """
        if not isinstance(scores, Tensor):
            raise UsageError(f"selector {self.name!r} gave scores as {type(scores).__name__}; expected a tensor")
        if scores.shape != prompt.key.shape[:3]:
            raise UsageError(
                f"selector {self.name!r} gave scores of shape {list(scores.shape)}; expected [batch, kv_heads, tokens] "
                f"= {list(prompt.key.shape[:3])}"
            )
        if bool(scores.isnan().any()):
            raise RunError(
                f"selector {self.name!r} gave a score that is not a number; correct the selector, or, if the model's "
                "own numbers are not, try --dtype float32 or --dtype bfloat16"
            )
        ranking = scores.argsort(dim=-1, descending=True, stable=True)
        window = prompt.sliding_window
        oldest = 0 if window is None else max(0, prompt.length - window)
        if prompt.positions is not None or oldest:
            outside = prompt.places.gather(-1, ranking) < oldest
            ranking = ranking.gather(-1, outside.byte().argsort(dim=-1, stable=True))
        return ranking

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters, as a profile records them."""
        return {"name": self.name, **asdict(self)}

    @property
    def spec(self) -> str:
        """Return the selector as a command line takes it, without what is default: ``snapkv:window=8``."""
        defaults = self.parameters()
        changed = {key: str(value) for key, value in asdict(self).items() if value != defaults[key]}
        return format_spec(self.name, changed)

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """Return the hyper-parameters and their defaults."""
        return {field.name: field.default for field in fields(cls)}
