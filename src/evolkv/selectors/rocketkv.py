"""RocketKV: keeps what the end of the prompt attends to, and has each new token read a small part of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evolkv.errors import UsageError
from evolkv.selectors.base import Selector
from evolkv.selectors.prompt import PromptAttention
from evolkv.selectors.snapkv import check_votes

# The paper's split: of a compression by c = 2^x, stage 1 does r = min(0.2 + 0.06 x, 0.8) of the exponent.
_LEAST, _SLOPE, _MOST = 0.2, 0.06, 0.8
#: A token, and the extremes that it is found by.
_LEAST_READ = 2


@dataclass(frozen=True)
class Reading:
    """A new token's way to read a KV head: it chooses tokens by some channels of their pages' extremes.

    Args:
        tokens: that it attends to.
        page: neighbouring entries that share a score.
        channels: of the keys, that scores go by.
    """

    tokens: int
    page: int
    channels: int


@dataclass(frozen=True)
class RocketKV(Selector):
    """Keeps what the end of the prompt attends to, and reads of that only what each new token needs.

    Stage 1 ranks tokens by the attention of the window's queries, summed over the window and the query heads that share
    a KV head, then pooled (maximum) over neighbouring positions. The window is always kept. The budget is what a head
    holds. Stage 2 is hybrid sparse attention: a new token scores pages of entries by their keys' element-wise extremes
    in the channels where its queries are largest, and attends to the tokens of the best pages alone. It reads about as
    much memory as `read` entries take.

    With `held` every head holds that many entries, and the budget says what a new token reads. A search then evolves
    what is read. Without `held` it evolves what is held.

    Behnam et al. 2025, "RocketKV: Accelerating Long-Context LLM Inference via Two-Stage KV Cache Compression", arXiv
    2502.14051v3, sections 3.3 to 3.6. Three things are ours. The compression of stage 2 is that of what is held of the
    prompt (the paper counts the answer's tokens in). A head that holds no more than it may read is read whole. Equal
    scores go to the older page and token. A layer with a sliding window is read whole as well.

    Args:
        window: number of last prompt tokens that vote and are always kept (128 in the paper's runs of SCBench).
        kernel: width of the pooling over positions, odd; 1 turns it off.
        read: the paper's token budget: entries whose memory a new token may read in each KV head, at least 2. 0
            (default) derives it from budget and prompt length by the paper's split of the compression between stages.
        held: entries of the prompt that every KV head holds, more than the window; budgets then say what is read. 0
            (default): budgets say what is held.
    """

    name: ClassVar[str] = "rocketkv"
    layer: ClassVar[str | None] = "evolkv.cache.reading:ReadingLayer"
    replay_layer: ClassVar[str | None] = "evolkv.cache.replay_reading:ReadingReplayLayer"
    window: int = 32
    kernel: int = 63
    read: int = 0
    held: int = 0

    def __post_init__(self) -> None:
        check_votes(self.name, self.window, self.kernel)
        if self.held and self.held <= self.window:
            raise UsageError(
                f"{self.name}: held is {self.held}; expected more than the window of {self.window}, or 0 where budgets "
                "say what is held"
            )
        if self.held and self.read:
            raise UsageError(f"{self.name}: with held={self.held} budgets say what is read; leave out read={self.read}")
        if self.read < 0 or 0 < self.read < _LEAST_READ:
            raise UsageError(
                f"{self.name}: read is {self.read}; expected at least 2 entries, or 0 for what follows from the budget"
            )

    @property
    def min_budget(self) -> int:
        """The window; 2 where budgets say what is read, half of which goes to the pages' extremes."""
        return _LEAST_READ if self.held else super().min_budget

    @property
    def budgets_cut(self) -> bool:
        """Return whether budgets say what is held, not what is read."""
        return not self.held

    def held_under(self, budgets: np.ndarray) -> np.ndarray:
        """See `Selector.held_under`."""
        return np.full_like(budgets, self.held) if self.held else budgets

    @property
    def observed_queries(self) -> int:
        """The window."""
        return self.window

    def score(self, prompt: PromptAttention) -> Tensor:
        """Pooled sum of the window's attention, ``[batch, kv_heads, tokens]``."""
        tokens = prompt.num_tokens
        # A later turn may have fewer queries than the window.
        window = min(self.window, tokens - prompt.first_query)
        older = tokens - window
        votes = prompt.probabilities(older, tokens)[..., :older].sum(dim=3).sum(dim=2)
        if older and self.kernel > 1:
            votes = F.max_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
        return F.pad(votes, (0, window), value=torch.inf)

    def entries_read(self, held: int, tokens: int, budget: int) -> int:
        """Return the entries whose memory a new token reads, of a head that holds so many of a prompt of `tokens`."""
        if self.held:
            return budget
        if self.read or held >= tokens:
            return self.read or held
        # held = tokens / c^r for c = 2^x and r = min(0.2 + 0.06 x, 0.8), solved for x.
        exponent = math.log2(tokens / held)
        x = (math.sqrt(_LEAST**2 + 4 * _SLOPE * exponent) - _LEAST) / (2 * _SLOPE)
        if _LEAST + _SLOPE * x > _MOST:
            x = exponent / _MOST
        return max(_LEAST_READ, round(tokens / 2**x))

    def reading(self, held: int, tokens: int, head_dim: int, budget: int) -> Reading | None:
        """Return how new tokens read a head; None where they read all that it holds.

        Args:
            held: entries that it holds of the prompt.
            tokens: length of the prompt.
            head_dim: channels of its keys.
            budget: of the head.
        """
        read = self.entries_read(held, tokens, budget)
        if read >= held:
            return None
        compression = held / read
        page = math.ceil(math.sqrt(compression))
        page = 1 if page > compression else page
        return Reading(read // 2, page, max(1, int(head_dim * page / compression)))


@dataclass(frozen=True)
class RocketKVMultiTurn(RocketKV):
    """Keeps every token, and chooses after each turn anew what the tokens to come may read.

    The multi-turn variant of RocketKV: a later question may want what stage 1 leaves out, so nothing is dropped. The
    budget is what may be read. It is chosen by the last queries of the prompt, and anew by those of each later call of
    several tokens. Stage 2 goes on as under `RocketKV`. So it saves reading, and no memory: what may be read is held a
    second time.

    Behnam et al. 2025, arXiv 2502.14051v3, section 3.6 (RocketKV-MT).

    Args:
        window, kernel, read: see `RocketKV`; `held` is refused.
    """

    name: ClassVar[str] = "rocketkv_mt"
    layer: ClassVar[str | None] = "evolkv.cache.multi_turn:MultiTurnLayer"
    replay_layer: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held:
            raise UsageError(f"{self.name} holds every token; leave out held={self.held}, or use rocketkv")

    @property
    def budgets_cut(self) -> bool:
        """False: every token is held."""
        return False
