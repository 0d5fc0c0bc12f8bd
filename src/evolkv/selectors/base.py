"""The base of every selector."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from evolkv.errors import RunError, UsageError
from evolkv.selectors.prompt import PromptAttention
from evolkv.specs import format_spec


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
        raise UsageError(
            f"selector {self.name!r} {reason}; add --engine naive, which reads each prompt for each candidate"
        )

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
