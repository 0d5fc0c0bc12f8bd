"""SmallKV: a small model that reads along says which tokens the large one needs, at every step anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import Tensor

from evolkv.errors import UsageError
from evolkv.selectors.base import Selector
from evolkv.selectors.prompt import PromptAttention


@dataclass(frozen=True)
class Split:
    """A KV head's entries of a prompt, as a new token reads them; those in none of these classes do not count.

    Args:
        older: entries before the recent ones; critical and marginal ones are chosen among them.
        critical: entries of which keys and values are read.
        marginal: entries of which values alone are read.
    """

    older: int
    critical: int
    marginal: int


@dataclass(frozen=True)
class SmallKV(Selector):
    """Has a small companion model choose, at every step, which tokens the large one reads exactly, or by value alone.

    The companion keeps its full cache and reads each token before the large model does. Each query head of the large
    model is matched with one of the companion's: on the first `match` tokens of a prompt, the tokens to which both pay
    the most attention have the greatest Jaccard index. The attention that an entry has received from all tokens so far
    in a companion's head, averaged over the query heads that share a KV head, ranks the entries. The first are
    critical: the large model attends to them as always. The next are marginal: only their values are read, weighted by
    the companion's attention. The last tokens of the prompt, and all that come after it, are read like critical ones.

    Nothing is dropped: the large model's cache is held whole, because what counts as critical changes. The budget is
    what a step needs of the prompt, in entries: a marginal one takes half an entry. `critical`, `recent` and `marginal`
    say how the budget is shared out.

    Zhao et al. 2025, "SmallKV: Small Model Assisted Compensation of KV Cache Compression for Efficient LLM Inference",
    arXiv 2508.02751. Its equation 6 adds the marginal part to the attention among the rest. Here that attention is
    first scaled by 1 minus the marginal attention, which makes the sum exact where the companion attends as the model
    does. The paper leaves open what follows. Of the tokens on which heads are matched, a tenth counts as those with the
    most attention. Of equal indices the head wins whose sums are nearest. Short prompts are matched on what they have.

    Tokens after the prompt are read whole on top of the budget, as under every selector here; the paper has them share
    it. A call of several tokens after the prompt is read token by token. Layers with a sliding window are read whole.

    Args:
        model: the companion, as `load_model` takes it. It must have the model's vocabulary.
        critical, recent, marginal: parts of the budget, in proportion.
        match: number of first prompt tokens on which heads are matched.
    """

    name: ClassVar[str] = "smallkv"
    layer: ClassVar[str | None] = "evolkv.cache.accompanied:AccompaniedLayer"
    model: str = ""
    critical: int = 2
    recent: int = 1
    marginal: int = 2
    match: int = 200

    def __post_init__(self) -> None:
        for field, least in (("critical", 0), ("recent", 0), ("marginal", 0), ("match", 1)):
            if (value := getattr(self, field)) < least:
                raise UsageError(f"smallkv: {field} is {value}; it must be {least} or more")
        if not self.critical + self.recent + self.marginal:
            raise UsageError("smallkv: critical, recent and marginal are all 0; give at least one a part of the budget")

    @property
    def budgets_cut(self) -> bool:
        """False: every token is held."""
        return False

    def held_under(self, budgets: np.ndarray) -> np.ndarray:
        """See `Selector.held_under`: more than any prompt has."""
        return np.full_like(budgets, np.iinfo(np.int64).max)

    @property
    def observed_queries(self) -> int:
        """0, because nothing is cut."""
        return 0

    @property
    def companion(self) -> str:
        """See `Selector.companion`."""
        return self.model

    def check_drafts(self) -> None:
        """See `Selector.check_drafts`."""
        raise UsageError(
            f"selector {self.name!r} adds up what a companion model attends to, which cannot be taken back, and "
            "assisted decoding takes drafts back; generate without assistance, or choose another selector"
        )

    def score(self, prompt: PromptAttention) -> Tensor:
        """Position of each token, ``[batch, kv_heads, tokens]``: it drops nothing but what leaves a sliding window."""
        return prompt.places.float()

    def split(self, budget: int, tokens: int) -> Split | None:
        """Return how a head is read; None where the budget covers its prompt, so that all is read exactly.

        Args:
            budget: entries that a step may need of the prompt.
            tokens: length of the prompt.
        """
        if budget >= tokens:
            return None
        # Twice the shares, in which a marginal entry is a whole number.
        shares = 2 * self.critical + 2 * self.recent + self.marginal
        recent = max(1, 2 * self.recent * budget // shares) if self.recent else 0
        # With more of them, entries would be left over that the budget has room for.
        marginal = 2 * min(self.marginal * budget // shares, tokens - budget)
        return Split(tokens - recent, budget - recent - marginal // 2, marginal)


def with_companion(selector: Selector, model: str | None) -> Selector:
    """Return a selector with a companion model, where it takes one.

    Args:
        selector: any selector; one that takes no companion is returned as it is.
        model: the companion, as `load_model` takes it; None for the selector's own.

    Raises:
        UsageError: if it needs a companion and has none.
    """
    if not isinstance(selector, SmallKV):
        return selector
    named = replace(selector, model=model) if model else selector
    if not named.model:
        raise UsageError(
            "selector 'smallkv' needs a small model that reads along; name it with --companion MODEL, or "
            "smallkv:model=MODEL"
        )
    return named
