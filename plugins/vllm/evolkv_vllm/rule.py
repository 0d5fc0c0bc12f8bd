"""The entries of a prompt that a layer gives back: one pure function, for the scheduler and for every worker.

The scheduler frees blocks and the workers move keys and values. They exchange no messages about it, because both
compute the same number from the prompt's length, the budgets and the block size.

A budget belongs to a *part*: a layer, or one KV head of it where budgets differ from head to head.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evolkv import BudgetProfile
from evolkv.budgets import Share, held_in_blocks
from evolkv.methods import Method, get_method
from evolkv.models import ModelFacts
from evolkv.models.layers import KVLayer
from evolkv.selectors import Selector, get_selector

#: Lengths of prompts whose budgets are remembered, for each rule and block size.
_LENGTHS = 1 << 16


@dataclass(frozen=True)
class BudgetRule:
    """The budgets of a method for each length of prompt.

    It travels between processes inside vLLM's specs and configuration, so it is a text that can be compared and hashed.

    Attributes:
        text: JSON, as `fixed` and `of_share` write it.
    """

    text: str

    @classmethod
    def fixed(
        cls,
        budgets: NDArray[np.int64],
        selector: Selector,
        windows: list[int | None],
        exact: bool = False,
        allocator: str = "uniform",
    ) -> BudgetRule:
        """Return the rule of budgets that are the same for every prompt, or every one that is long enough.

        Args:
            budgets: entries of each layer, ``[layers]``, or of each KV head, ``[layers, kv_heads]``.
            selector: chooses what is kept.
            windows: the sliding window of each layer in tokens, None where it sees everything.
            exact: whether budgets are kept to the entry; by default they are rounded up to where a block begins.
            allocator: where the budgets are from. A steep one lays them out anew for short prompts.
        """
        return cls._of(
            {
                "budgets": budgets.reshape(-1).tolist(),
                "method": f"{allocator}+{selector.spec}",
                "selector": selector.to_dict(),
                "windows": windows,
                "heads": budgets.shape[1] if budgets.ndim == 2 else 1,
                "exact": exact,
            }
        )

    @classmethod
    def of_share(
        cls, method: Method, windows: list[int | None], max_context: int, exact: bool = False, heads: int = 1
    ) -> BudgetRule:
        """Return the rule of a method whose budgets are a share of each prompt.

        Args:
            method: as `Method.resolve` returns it, with a `share`.
            windows: the sliding window of each layer in tokens, None where it sees everything.
            max_context: the longest context of the model, in tokens.
            exact: as for `fixed`.
            heads: parts of a layer: 1, or its KV heads.
        """
        assert method.selector is not None
        return cls._of(
            {
                "share": method.share,
                "profile": None if method.profile is None else method.profile.to_dict(),
                "method": f"{method.allocator}+{method.selector.spec}",
                "selector": method.selector.to_dict(),
                "windows": windows,
                "max_context": max_context,
                "heads": heads,
                "exact": exact,
            }
        )

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> BudgetRule:
        return cls(json.dumps(content, sort_keys=True))

    @property
    def selector(self) -> Selector:
        """The selector, which chooses the entries that are kept."""
        return _parsed(self.text).selector

    @property
    def num_layers(self) -> int:
        """Layers with keys and values."""
        return len(_parsed(self.text).windows)

    @property
    def heads(self) -> int:
        """Parts of a layer: 1, or its KV heads where budgets differ from head to head."""
        return _parsed(self.text).heads

    @property
    def classes(self) -> tuple[int, ...]:
        """The class of each part, ``[layers * heads]``: parts of one class have the same budgets for every prompt."""
        return _parsed(self.text).classes

    def evicts(self, tokens: int, block_size: int) -> NDArray[np.int64]:
        """Return the entries of a prompt that each class does without, ``[classes]``; 0 where it keeps all.

        The kept entries fill the last slots of the prompt. So a budget is rounded up, by less than a block, until
        they begin where a block begins: these slots are paid for anyway. An exact budget is not; its entries, and the
        tokens after them, begin at the same block and lie that much earlier than they would. Layers with a sliding
        window are vLLM's own, and keep all here.

        Args:
            tokens: length of the prompt.
            block_size: tokens of a block.
        """
        return _evicts(self.text, tokens, block_size)

    def any_evicts(self, tokens: int, block_size: int) -> bool:
        """Return whether any part does without entries of a prompt of so many tokens."""
        return bool(self.evicts(tokens, block_size).any())


class _Parsed:
    """The content of a rule's text, read once for each process."""

    def __init__(self, text: str):
        content = json.loads(text)
        self.selector = get_selector(content["selector"])
        self.heads: int = content["heads"]
        #: The sliding window of each layer.
        self.windows: list[int | None] = content["windows"]
        self.exact: bool = content["exact"]
        self._fixed = np.array(content["budgets"], dtype=np.int64) if "budgets" in content else None
        described = content.get("profile")
        self._method = get_method(content["method"] if described is None else BudgetProfile.from_dict(described))
        if self._fixed is None:
            self._method = self._method.at(Share(content["share"]))
        self._facts = ModelFacts(
            kv_layers=tuple(KVLayer(index, window) for index, window in enumerate(self.windows)),
            other_layers=(),
            num_kv_heads=1 if self._method.profile is None else self._method.profile.num_kv_heads,
            num_heads=1,
            head_dim=1,
            max_context=content.get("max_context", 0),
            model_type="",
        )
        self.classes = self._classes()

    def budgets_at(self, tokens: int) -> NDArray[np.int64]:
        """Return the budgets of a prompt by part."""
        if self._fixed is not None:
            by_layer = self._fixed.reshape(-1, self.heads)
            return self._method.budgets_for([], by_layer, self._facts.most_held(tokens)).reshape(-1)
        return np.asarray(self._method.budgets_at(self._facts, tokens)[:, : self.heads], dtype=np.int64).reshape(-1)

    def windows_by_part(self) -> list[int | None]:
        """Return the sliding window of each part's layer."""
        return [window for window in self.windows for _ in range(self.heads)]

    def _classes(self) -> tuple[int, ...]:
        profile = None if self._fixed is not None else self._method.profile
        if self._fixed is not None:
            weights = self._fixed.tolist()
        elif profile is not None:
            weights = profile.budgets[:, : self.heads].reshape(-1).tolist()
        else:
            # An allocator's proportions: those at a length that is long enough to tell layers apart.
            weights = self.budgets_at(min(self._facts.max_context, 1 << 20)).tolist()
        numbers: dict[tuple[int, int | None], int] = {}
        return tuple(numbers.setdefault(key, len(numbers)) for key in zip(weights, self.windows_by_part(), strict=True))


@functools.lru_cache(maxsize=16)
def _parsed(text: str) -> _Parsed:
    return _Parsed(text)


@functools.lru_cache(maxsize=_LENGTHS)
def _evicts(text: str, tokens: int, block_size: int) -> NDArray[np.int64]:
    parsed = _parsed(text)
    most = np.zeros(max(parsed.classes) + 1, dtype=np.int64)
    np.maximum.at(most, np.array(parsed.classes), np.minimum(parsed.budgets_at(tokens), tokens))
    for part_class, window in zip(parsed.classes, parsed.windows_by_part(), strict=True):
        if window is not None:
            most[part_class] = tokens
    evicted = tokens - (most if parsed.exact else held_in_blocks(most, tokens, block_size))
    evicted.flags.writeable = False
    return evicted
