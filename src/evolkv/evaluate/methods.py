"""The methods that an evaluation compares: what each keeps, at a given budget."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from evolkv.allocators import ALLOCATORS, complete, pyramid, uniform
from evolkv.cache.compressed import sliding_windows
from evolkv.errors import BudgetError, UsageError
from evolkv.models import describe_model
from evolkv.profile import BudgetProfile
from evolkv.registry import unknown_name
from evolkv.selectors import SELECTORS, Selector, get_selector

_ALIASES = {"pyramidkv": "pyramid+snapkv"}


@dataclass(frozen=True)
class Method:
    """One way to spend a budget.

    Args:
        name: as it was asked for.
        selector: which tokens are kept; None for the full cache.
        allocator: name of the allocator, or None for a profile or the full cache.
        profile: the profile, or None.
    """

    name: str
    selector: Selector | None = None
    allocator: str | None = None
    profile: BudgetProfile | None = None

    def budgets(self, model: PreTrainedModel, budget: int) -> np.ndarray:
        """The allocation at a mean budget, ``[layers, kv_heads]``.

        A profile that was found at another budget is expanded to this one.

        Raises:
            BudgetError: for a budget that the selector cannot serve.
        """
        assert self.selector is not None
        if budget < self.selector.min_budget:
            raise BudgetError(
                f"the budget is {budget}, but {self.name} always keeps {self.selector.min_budget} tokens; "
                f"use {self.selector.min_budget} or more"
            )
        if self.profile is not None:
            profile = self.profile if budget == self.profile.budget else self.profile.expand(budget)
            return profile.budgets
        info = describe_model(model)
        ceilings = np.array([w if w is not None else info.max_context for w in sliding_windows(model)])
        if self.allocator == "pyramid":
            window = min(getattr(self.selector, "window", 0), budget - 1)
            layers = pyramid(info.num_layers, budget, window=window, ceiling=info.max_context)
        else:
            layers = uniform(info.num_layers, budget)
        if budget <= ceilings.mean():
            # Entries that a sliding-window layer could not hold go to the others: the memory is the same.
            layers = complete(layers, budget * info.num_layers, self.selector.min_budget, ceilings)
        return np.repeat(np.asarray(layers)[:, None], info.num_kv_heads, axis=1)


def get_method(name: str) -> Method:
    """The method that a name stands for.

    Args:
        name: ``full``; a selector (uniform budgets); ``allocator+selector``; ``pyramidkv`` (= ``pyramid+snapkv``); or
            the path of a profile.

    Raises:
        UsageError: for a name that is none of these.
        ProfileError: for a file that is no profile.
    """
    spec = _ALIASES.get(name, name)
    if spec == "full":
        return Method(name)
    if spec in SELECTORS:
        return Method(name, get_selector(spec), "uniform")
    allocator, plus, selector = spec.partition("+")
    if plus and allocator in ALLOCATORS:
        return Method(name, get_selector(selector), allocator)
    if os.sep in spec or spec.endswith(".json") or Path(spec).exists():
        profile = BudgetProfile.load(spec)
        return Method(name, get_selector(profile.selector), profile=profile)
    if plus:
        raise unknown_name("allocator", allocator, ALLOCATORS)
    known = ["full", *SELECTORS, *_ALIASES, *(f"{a}+{s}" for a in ALLOCATORS for s in SELECTORS)]
    raise UsageError(f"{unknown_name('method', name, known)}; or give the path of a profile")
