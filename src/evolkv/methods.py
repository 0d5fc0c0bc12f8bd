"""Methods: what each keeps of a prompt, at a given budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from evolkv.allocators import ALLOCATORS, complete, pyramid
from evolkv.allocators.adaptive import (
    ADAPTIVE,
    HeadAllocator,
    LayerAllocator,
    Observations,
    Observer,
    get_adaptive,
)
from evolkv.errors import BudgetError, UsageError
from evolkv.models import model_facts
from evolkv.profile import BudgetProfile
from evolkv.registry import unknown_name
from evolkv.selectors import SELECTORS, Selector, get_selector, parse_selector

_ALIASES = {"pyramidkv": "pyramid+snapkv"}


@dataclass(frozen=True)
class Method:
    """One way to spend a budget.

    Args:
        name: as it was asked for.
        selector: which tokens are kept; None for the full cache.
        allocator: name of the allocator that lays out the layers' budgets, the same for every prompt; None for a
            profile or the full cache.
        profile: the profile, or None.
        profiles: path of the profiles of several budgets, with ``{}`` where the budget stands, or None; see `at`.
        layers: an allocator that does it for each prompt instead, starting from nothing.
        heads: an allocator that shares each layer's budget out among its heads, for each prompt.
    """

    name: str
    selector: Selector | None = None
    allocator: str | None = None
    profile: BudgetProfile | None = None
    profiles: str | None = None
    layers: LayerAllocator | None = None
    heads: HeadAllocator | None = None

    @classmethod
    def of_profile(cls, profile: BudgetProfile | str | os.PathLike[str], name: str | None = None) -> Method:
        """The method that a profile, or the file of one, stands for.

        Args:
            profile: the profile, its path, or its address on the Hub.
            name: default: its path, or "profile".

        Raises:
            ProfileError: for a file that is no profile.
        """
        if isinstance(profile, BudgetProfile):
            return cls(name or "profile", get_selector(profile.selector), profile=profile)
        return cls.of_profile(BudgetProfile.load(profile), name or os.fspath(profile))

    def at(self, budget: int) -> Method:
        """The method at a budget: where there is a profile for each budget, with that of this one.

        Raises:
            ProfileError: if there is none, or it is no profile.
            UsageError: if it was made for another budget.
        """
        if self.profiles is None:
            return self
        path = self.profiles.replace("{}", str(budget))
        profile = BudgetProfile.load(path)
        if profile.budget != budget:
            raise UsageError(f"method {self.name!r}: {path} has the budget {profile.budget}, not {budget}")
        return Method.of_profile(profile, self.name)

    def files(self, budgets: Sequence[int]) -> list[str]:
        """Paths of the profiles that it reads at some budgets."""
        if self.profiles is not None:
            return [self.profiles.replace("{}", str(budget)) for budget in budgets]
        return [] if self.profile is None else [self.name]

    @property
    def is_full(self) -> bool:
        """Whether nothing is evicted."""
        return self.selector is None and self.profiles is None

    @property
    def observers(self) -> list[Observer]:
        """The allocators that have to see a prompt."""
        if self.selector is None:
            return []
        return [(each, self.selector) for each in (self.layers, self.heads) if each is not None]

    def budgets_for(self, observed: Sequence[Observations], budgets: np.ndarray, ceilings: np.ndarray) -> np.ndarray:
        """The allocation for a prompt, ``[layers, kv_heads]``: a pyramid leaves no layer more than the prompt has.

        Args:
            observed: what each of `observers` saw in each layer.
            budgets: as `budgets` returns them.
            ceilings: the most entries that a head of each layer can hold of the prompt, ``[layers]``.
        """
        if self.selector is None:
            return budgets
        floor = self.selector.min_budget
        total = int(budgets[:, 0].sum())
        if (self.layers is not None or self.allocator == "pyramid") and total < ceilings.sum():
            if self.layers is not None:
                seen = [layer[self.layers, self.selector] for layer in observed]
                row = self.layers.layers(seen, total // len(budgets), floor, ceilings)
            else:
                row = self._by_layer(total // len(budgets), ceilings)
            budgets = np.repeat(row[:, None], budgets.shape[1], axis=1)
        if self.heads is not None:
            seen = [layer[self.heads, self.selector] for layer in observed]
            budgets = self.heads.heads(seen, budgets[:, 0], floor, ceilings)
        return budgets

    def budgets(self, model: PreTrainedModel, budget: int) -> np.ndarray:
        """The allocation at a mean budget, ``[layers, kv_heads]``; what `budgets_for` starts from.

        A profile that was found at another budget is expanded to this one. Entries that a sliding-window layer could
        not hold go to the others, as far as these can hold them: the memory is the same.

        Raises:
            BudgetError: for a budget that the selector cannot serve.
        """
        assert self.selector is not None
        if budget < self.selector.min_budget:
            raise BudgetError(
                f"the budget is {budget}, but {self.name} always keeps {self.selector.min_budget} tokens; "
                f"use {self.selector.min_budget} or more"
            )
        if self.profile is not None and budget == self.profile.budget:
            return self.profile.budgets
        facts = model_facts(model)
        ceilings = np.array([facts.max_context if w is None else w for w in facts.sliding_windows])
        if self.profile is not None:
            return self.profile.expand(budget, ceilings if budget <= ceilings.mean() else None).budgets
        return np.repeat(self._by_layer(budget, ceilings)[:, None], facts.num_kv_heads, axis=1)

    def _by_layer(self, budget: int, ceilings: np.ndarray) -> np.ndarray:
        """The layers' budgets, ``[layers]``, of which none can hold more than `ceilings`."""
        assert self.selector is not None
        count = len(ceilings)
        if self.allocator == "pyramid":
            window = min(getattr(self.selector, "window", 0), budget - 1)
            layers = pyramid(count, budget, window=window, ceiling=max(budget, int(ceilings.max())))
        else:
            name = self.allocator or "uniform"
            layers = np.asarray(ALLOCATORS[name](count, budget))
            if layers.shape != (count,):
                raise UsageError(
                    f"allocator {name!r} gave {layers.shape} budgets; expected one for each of {count} layers"
                )
        if budget <= ceilings.mean():
            layers = complete(layers, budget * count, self.selector.min_budget, ceilings)
        return np.asarray(layers)


def get_method(name: str) -> Method:
    """The method that a name stands for.

    Args:
        name: ``full``; a selector, alone (uniform budgets) or with parameters (``snapkv:gqa=max``); allocators and a
            selector (``pyramid+snapkv``, ``cake+chunkkv``, ``cake:window=8+adakv+snapkv``); ``pyramidkv``
            (= ``pyramid+snapkv``, whose parameters may follow); the path of a profile, or its address on the Hub
            (``hf://org/name``); or, with ``{}`` in place of the budget, that of one profile for each budget
            (``profile-{}.json``).

    Raises:
        UsageError: for a name that is none of these.
        ProfileError: for a file that is no profile.
    """
    alias, colon, parameters = name.partition(":")
    spec = f"{_ALIASES[alias]}{colon}{parameters}" if alias in _ALIASES else name
    if spec == "full":
        return Method(name)
    *allocators, selector = spec.split("+")
    known = {*ALLOCATORS, *ADAPTIVE}
    named = [each.partition(":")[0] for each in allocators]
    if selector.partition(":")[0] in SELECTORS and known.issuperset(named):
        return _combined(name, allocators, get_selector(parse_selector(selector)))
    if "{}" in spec:
        return Method(name, profiles=spec)
    if os.sep in spec or spec.endswith(".json") or os.path.exists(spec):
        return Method.of_profile(spec)
    for each in named:
        if each not in known:
            raise unknown_name("allocator", each, known)
    if allocators:
        raise unknown_name("selector", selector.partition(":")[0], SELECTORS)
    if alias in known:
        raise UsageError(f"{alias!r} is an allocator, which needs a selector; write for example {name}+snapkv")
    names = ["full", *SELECTORS, *_ALIASES]
    raise UsageError(f"{unknown_name('method', name, names)}; ALLOCATOR+SELECTOR, or the path of a profile")


def _combined(name: str, allocators: list[str], selector: Selector) -> Method:
    """At most one allocator for the layers, then at most one for the heads."""
    chosen: list[Any] = []
    for each in allocators:
        if each.partition(":")[0] in ADAPTIVE:
            chosen.append(get_adaptive(each))
        elif each in ALLOCATORS:
            chosen.append(each)
        else:
            raise UsageError(f"method {name!r}: allocator {each.partition(':')[0]} takes no parameters; leave them out")
    heads = chosen.pop() if chosen and isinstance(chosen[-1], HeadAllocator) else None
    layers = chosen.pop() if chosen else "uniform"
    if chosen or isinstance(layers, HeadAllocator):
        raise UsageError(
            f"method {name!r} has more than one allocator of a kind; give at most one for the layers, then at most one "
            "for the heads, such as cake+adakv+snapkv"
        )
    if isinstance(layers, LayerAllocator):
        return Method(name, selector, "uniform", layers=layers, heads=heads)
    return Method(name, selector, layers, heads=heads)
