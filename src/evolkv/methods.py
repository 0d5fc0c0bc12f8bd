"""Read what a method's name stands for, and lay out its budgets for a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from evolkv.allocators import ALLOCATORS, layout
from evolkv.allocators.adaptive import ADAPTIVE, HeadAllocator, LayerAllocator, get_adaptive
from evolkv.allocators.adaptive.base import Observations, Observer
from evolkv.budgets import SHARE_DIGITS, Budget, BudgetSpec, Share, read_budget
from evolkv.errors import BudgetError, UsageError
from evolkv.models import model_facts
from evolkv.models.facts import ModelFacts
from evolkv.profile import BudgetProfile
from evolkv.registry import unknown_name
from evolkv.selectors import METHOD_ALIASES, SELECTORS, Selector, get_selector, spec_names
from evolkv.specs import format_spec, parse_spec

#: Allocators whose lowest layers may get more than a prompt has.
_STEEP = ("pyramid", "cosine")


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
        share: the mean budget as a share of each prompt, where it is one; see `budgets_at`.
    """

    name: str
    selector: Selector | None = None
    allocator: str | None = None
    profile: BudgetProfile | None = None
    profiles: str | None = None
    layers: LayerAllocator | None = None
    heads: HeadAllocator | None = None
    share: Share | None = None

    @classmethod
    def of_profile(cls, profile: BudgetProfile | str | os.PathLike[str], name: str | None = None) -> Method:
        """Return the method that a profile, or the file of one, stands for.

        Args:
            profile: the profile, its path, or its address on the Hub.
            name: default: its path, or "profile".

        Raises:
            ProfileError: for a file that is no profile.
        """
        if isinstance(profile, BudgetProfile):
            return cls(name or "profile", get_selector(profile.selector), profile=profile, share=profile.share)
        return cls.of_profile(BudgetProfile.load(profile), name or os.fspath(profile))

    @property
    def target(self) -> Budget | None:
        """The budget that the method brings itself: a profile's, or the share that its name gives; else None."""
        return self.share if self.profile is None else self.profile.target

    def at(self, budget: Budget) -> Method:
        """Return the method at a budget: where there is a profile for each budget, with that of this one.

        Args:
            budget: mean cache entries per KV head, or a share of each prompt.

        Raises:
            ProfileError: if there is none, or it is no profile.
            UsageError: if it was made for another budget, or its name gives another.
            BudgetError: a budget that the selector cannot serve.
        """
        method = self
        if self.profiles is not None:
            path = self.profiles.replace("{}", str(budget))
            profile = BudgetProfile.load(path)
            if profile.target != budget:
                raise UsageError(f"method {self.name!r}: {path} has the budget {profile.target}, not {budget}")
            method = Method.of_profile(profile, self.name)
        if method.profile is None and method.share not in (None, budget):
            raise UsageError(
                f"method {self.name!r} keeps {method.share} of each prompt, but the budget is {budget}; leave out one "
                "of them"
            )
        if isinstance(budget, Share):
            return method if method.is_full else replace(method, share=budget)
        if method.share is not None:
            method = replace(method, share=None)
        if method.selector is not None and budget < method.selector.min_budget:
            raise BudgetError(
                f"the budget is {budget}, but {self.name} always keeps {method.selector.min_budget} tokens; "
                f"use {method.selector.min_budget} or more"
            )
        return method

    def files(self, budgets: Sequence[Budget]) -> list[str]:
        """Return the paths of the profiles that the method reads at some budgets."""
        if self.profiles is not None:
            return [self.profiles.replace("{}", str(budget)) for budget in budgets]
        return [] if self.profile is None else [self.name]

    @property
    def is_full(self) -> bool:
        """True if the method evicts nothing."""
        return self.selector is None and self.profiles is None

    @property
    def observers(self) -> list[Observer]:
        """The allocators that have to see a prompt."""
        if self.selector is None:
            return []
        return [(each, self.selector) for each in (self.layers, self.heads) if each is not None]

    @property
    def is_steep(self) -> bool:
        """True if the allocator may give the lowest layers more than a short prompt has, whose budgets then differ."""
        return self.allocator in _STEEP

    def budgets_for(self, observed: Sequence[Observations], budgets: np.ndarray, ceilings: np.ndarray) -> np.ndarray:
        """Return the budgets for one prompt, ``[layers, kv_heads]``; no layer gets more than the prompt has.

        Args:
            observed: what each of `observers` saw in each layer.
            budgets: as `resolve` returns them.
            ceilings: the most entries that a head of each layer can hold of the prompt, ``[layers]``.
        """
        if self.selector is None:
            return budgets
        floor = self.selector.min_budget
        total = int(budgets[:, 0].sum())
        if self.layers is not None or self.is_steep:
            if total >= ceilings.sum():
                row = ceilings
            elif self.layers is not None:
                seen = [layer[self.layers, self.selector] for layer in observed]
                row = self.layers.layers(seen, total // len(budgets), floor, ceilings)
            else:
                row = self._by_layer(self.selector, total // len(budgets), ceilings)
            budgets = np.repeat(row[:, None], budgets.shape[1], axis=1)
        if self.heads is not None:
            seen = [layer[self.heads, self.selector] for layer in observed]
            budgets = self.heads.heads(seen, budgets[:, 0], floor, ceilings)
        return budgets

    def budgets_at(self, facts: ModelFacts, tokens: int) -> np.ndarray:
        """Return the budgets of a prompt of so many tokens, at the method's `share`: ``[layers, kv_heads]``.

        Their total is exactly round(share · tokens) · L · H, as far as the prompt and the model's windows can hold
        that, and no head gets less than the selector always keeps. These budgets are what `budgets_for` starts from.

        Args:
            facts: of the model.
            tokens: length of the prompt.
        """
        assert self.selector is not None
        assert self.share is not None
        most = facts.most_held(tokens)
        if self.profile is not None:
            return self.profile.budgets_at(tokens, most, self.share)
        budget = max(self.share.of(tokens), self.selector.min_budget)
        by_layer = self._by_layer(self.selector, budget, most)
        return np.repeat(by_layer[:, None], facts.num_kv_heads, axis=1)

    def resolve(self, model: PreTrainedModel, budget: Budget | None = None) -> tuple[Method, np.ndarray]:
        """Return the method at a budget, and its budgets for a model, ``[layers, kv_heads]``.

        These budgets are what `budgets_for` starts from. A profile that was found at another budget is expanded to this
        one. Entries that a sliding-window layer cannot hold go to the others, as far as these can hold them, so that
        the memory is the same. Where the method that is returned has a `share`, the budgets are those of a prompt that
        fills the model's context, and `budgets_at` has those of others.

        Args:
            model: the model that is to run under them.
            budget: mean cache entries per KV head, or a share of each prompt. Default: the method's own.

        Raises:
            UsageError: no budget for a method that has none of its own, or one that it evicts nothing at.
            ProfileError: a profile of another model, or no profile for this budget.
            BudgetError: a budget that the selector cannot serve.
        """
        method = self if budget is None else self.at(budget)
        profile, selector = method.profile, method.selector
        if selector is None and self.profiles is None:
            raise UsageError(f"method {self.name!r} evicts nothing; call the model without a compressed cache")
        facts = model_facts(model)
        if profile is not None:
            profile.check_model(model)
        if method.share is not None:
            return method, method.budgets_at(facts, facts.max_context)
        if budget is None and profile is not None:
            budget = profile.budget
        if not isinstance(budget, int) or selector is None:
            raise UsageError(f"method {self.name!r} needs a budget; add budget=128")
        if profile is not None and budget == profile.budget:
            return method, profile.budgets
        ceilings = facts.most_held(facts.max_context)
        if profile is not None:
            if budget <= ceilings.mean():
                return method, profile.expand(budget, ceilings).budgets
            return method, np.maximum(profile.expand(budget).budgets, ceilings[:, None])
        by_layer = method._by_layer(selector, budget, ceilings)
        return method, np.repeat(by_layer[:, None], facts.num_kv_heads, axis=1)

    def _by_layer(self, selector: Selector, budget: int, ceilings: np.ndarray) -> np.ndarray:
        """Return the layers' budgets, ``[layers]``, of which none can hold more than `ceilings`."""
        return layout(self.allocator or "uniform", (len(ceilings),), budget, selector, ceilings)


#: One method, as `get_method` takes it.
MethodSpec = str | os.PathLike[str] | Mapping[str, Any] | Selector | BudgetProfile | Method


def get_method(spec: MethodSpec) -> Method:
    """Return the method that a spec stands for.

    Args:
        spec: a text: ``full``; a selector, alone (uniform budgets) or with parameters (``snapkv:gqa=max``); allocators
            and a selector (``pyramid+snapkv``, ``cake+chunkkv``, ``cake:window=8+adakv+snapkv``); ``pyramidkv``
            (= ``pyramid+snapkv``, whose parameters may follow); any of these with kvpress's compression ratio among
            the parameters (``snapkv:ratio=0.9``: a budget of 10% of each prompt); the path of a profile, or its address
            on the Hub (``hf://org/name``); or, with ``{}`` in place of the budget, that of one profile for each budget
            (``profile-{}.json``). Or a profile, its path, a selector, or a selector's name and parameters as a mapping;
            a method is returned as it is.

    Raises:
        UsageError: for what is none of these.
        ProfileError: for a file that is no profile.
    """
    if isinstance(spec, Method):
        return spec
    if isinstance(spec, BudgetProfile):
        return Method.of_profile(spec)
    if isinstance(spec, (Selector, Mapping)):
        ratio = spec.get("ratio") if isinstance(spec, Mapping) else None
        if isinstance(spec, Mapping) and ratio is not None:
            spec = {key: value for key, value in spec.items() if key != "ratio"}
        selector = get_selector(spec)
        return Method(selector.spec, selector, "uniform", share=None if ratio is None else _kept(str(ratio)))
    if isinstance(spec, os.PathLike):
        return _of_path(os.fspath(spec))
    if isinstance(spec, str):
        return _of_text(spec)
    raise UsageError(f"{spec!r} is no method; give a profile, its path, or a name such as 'snapkv'")


def chosen_method(
    profile: str | os.PathLike[str] | BudgetProfile | None, method: str | None, budget: BudgetSpec | None
) -> Method:
    """Return the method that a profile, or else a method's name, stands for at a budget; "full" where neither is given.

    Raises:
        UsageError: for settings that do not go together, or as `get_method`.
        ProfileError, BudgetError: as `Method.at`.
    """
    if profile is not None and method is not None:
        raise UsageError(f"profile {profile} and method {method} are both given; give one of them")
    chosen = get_method(method or "full") if profile is None else Method.of_profile(profile)
    if budget is None:
        if not chosen.is_full and chosen.target is None:
            raise UsageError(f"method {chosen.name!r} needs a budget; add a budget, such as 128")
        return chosen
    if chosen.is_full:
        raise UsageError(f"budget {budget} says nothing about what to keep; add a profile, or a method such as snapkv")
    return chosen.at(read_budget(budget))


def get_methods(specs: MethodSpec | Iterable[MethodSpec]) -> list[Method]:
    """Return the methods that one spec, or several, stand for; see `get_method`."""
    if isinstance(specs, Iterable) and not isinstance(specs, (str, Mapping)):
        return [get_method(each) for each in specs]
    return [get_method(specs)]


def _of_path(path: str) -> Method:
    return Method(path, profiles=path) if "{}" in path else Method.of_profile(path)


def _of_text(name: str) -> Method:
    alias, colon, parameters = name.partition(":")
    spec = f"{METHOD_ALIASES[alias]}{colon}{parameters}" if alias in METHOD_ALIASES else name
    if alias == "full":
        if colon:
            raise UsageError(f"method {name!r}: full keeps everything and takes no parameters; leave them out")
        return Method(name)
    *allocators, selector = spec.split("+")
    every_allocator = {*ALLOCATORS, *ADAPTIVE}
    named = [each.partition(":")[0] for each in allocators]
    if selector.partition(":")[0] in SELECTORS and every_allocator.issuperset(named):
        plain, ratio = _without_ratio(selector)
        combined = _combined(name, allocators, get_selector(plain))
        return combined if ratio is None else replace(combined, share=_kept(ratio))
    if "{}" in spec or os.sep in spec or spec.endswith(".json") or os.path.exists(spec):
        return _of_path(spec)
    if "lukv" in (*named, alias):
        raise UsageError(
            f"method {name!r}: lukv is calibrated on examples; make a profile of it with evolkv search MODEL --task "
            "TASK --budget C --selector S --strategy start --start lukv -o lukv.json, and give lukv.json as the method"
        )
    for each in named:
        if each not in every_allocator:
            raise unknown_name("allocator", each, every_allocator)
    if allocators:
        raise unknown_name("selector", selector.partition(":")[0], SELECTORS)
    if alias in every_allocator:
        raise UsageError(f"{alias!r} is an allocator, which needs a selector; write for example {name}+snapkv")
    names = ["full", *SELECTORS, *METHOD_ALIASES]
    unknown = unknown_name("method", alias, names)
    raise UsageError(f"{unknown}; ALLOCATOR+SELECTOR, or the path of a profile")


def _without_ratio(selector: str) -> tuple[str, str | None]:
    """Return the spec of a selector without kvpress's compression ratio, and that ratio if it is there."""
    if "ratio" not in selector:
        return selector, None
    name, values = parse_spec(selector, "selector", names=spec_names())
    ratio = values.pop("ratio", None)
    return (selector, None) if ratio is None else (format_spec(name, values), ratio)


def _kept(ratio: str) -> Share:
    """Return the share of a prompt that is left after a ratio of it, such as ``0.9``, was evicted."""
    try:
        # A ratio that was computed, such as 1 / 3, has more digits than a share.
        return Share(f"{round(100 * (1 - Decimal(ratio.strip())), SHARE_DIGITS):f}%")
    except (ArithmeticError, BudgetError):
        raise UsageError(
            f"ratio is {ratio}; expected the share of each prompt to evict, above 0 and below 1: ratio=0.9 keeps 10%"
        ) from None


def _combined(name: str, allocators: list[str], selector: Selector) -> Method:
    """Return the method of at most one allocator for the layers, then at most one for the heads."""
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
    if selector.layer is not None and (heads is not None or isinstance(layers, LayerAllocator)):
        raise UsageError(
            f"method {name!r}: selector {selector.name!r} needs budgets that are fixed before the prompt, because its "
            f"caches have layers of their own; leave the allocator out, or use pyramid+{selector.name} or a profile"
        )
    if isinstance(layers, LayerAllocator):
        return Method(name, selector, "uniform", layers=layers, heads=heads)
    return Method(name, selector, layers, heads=heads)
