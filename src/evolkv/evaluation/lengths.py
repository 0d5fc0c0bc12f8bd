"""Candidates of a search at a share of each prompt: from the one length that they are for to every other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv.allocators import fit
from evolkv.budgets import Share


@dataclass(frozen=True)
class ByLength:
    """Carries candidates from one length of prompt to others, as a profile with a share carries its budgets.

    Args:
        shares: those that are searched at.
        tokens: length of the prompt that candidates are for.
        floor: the least that a head may get: what the selector always keeps.
        by_head: whether the heads of a layer may differ.
    """

    shares: tuple[Share, ...]
    tokens: int
    floor: int
    by_head: bool

    def carry(self, candidates: np.ndarray, tokens: int, ceilings: ArrayLike) -> NDArray[np.int64]:
        """Return candidates for a prompt of `tokens` tokens, in the same shape.

        Args:
            candidates: ``[candidates, layers, kv_heads]`` ints. One whose mean is that of a share gets exactly
                round(share · tokens) on average; one beside it, which only the strategy "evolkv" proposes, stays as far
                beside it in proportion.
            tokens: length of the prompt.
            ceilings: the most that a head of each layer can hold of it, ``[layers]``.
        """
        return np.stack([self._carried(candidate, tokens, ceilings) for candidate in candidates])

    def _carried(self, candidate: np.ndarray, tokens: int, ceilings: ArrayLike) -> NDArray[np.int64]:
        if (candidate >= self.tokens).all():
            # What holds all of its own prompt holds all of any prompt.
            return np.broadcast_to(np.asarray(ceilings)[:, None], candidate.shape)
        budgets = candidate if self.by_head else candidate[:, 0]
        mean = budgets.mean()
        share = min(self.shares, key=lambda each: abs(each.of(self.tokens) - mean))
        total = round(int(budgets.sum()) * share.of(tokens) / share.of(self.tokens))
        fitted = fit(budgets, total, self.floor, ceilings)
        return np.broadcast_to(fitted if self.by_head else fitted[:, None], candidate.shape)

    def carry_soft(self, budgets: np.ndarray, tokens: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return soft budgets for a prompt of `tokens` tokens, and their derivative with respect to those given.

        Args:
            budgets: ``[layers, kv_heads]`` floats.
            tokens: length of the prompt.
        """
        carried = budgets * (tokens / self.tokens)
        above = carried > self.floor
        return np.where(above, carried, self.floor), np.where(above, tokens / self.tokens, 0.0)
