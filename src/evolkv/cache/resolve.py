"""From a profile, or a method and a budget, to the layers of a cache."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from evolkv.budgets import BudgetSpec, read_budget
from evolkv.cache.adaptive import AdaptiveLayer
from evolkv.cache.companion import companion_of
from evolkv.cache.hooked import layer_contexts
from evolkv.cache.layer import CompressedLayer
from evolkv.cache.pruning import check_model
from evolkv.cache.reeviction import ONCE, ReevictingLayer, Reeviction
from evolkv.cache.rereading import check_rereading
from evolkv.errors import UsageError
from evolkv.methods import MethodSpec, get_method
from evolkv.models import model_facts
from evolkv.models.layers import continues_by_token, looks_ahead
from evolkv.selectors import LayerContext, Selector

#: Lengths of text whose budgets a maker of layers remembers: each layer of a cache asks for the same.
_LENGTHS = 64


def _places(model: PreTrainedModel, budgets: Any) -> Iterator[tuple[np.ndarray, int | None, LayerContext]]:
    return zip(budgets, model_facts(model).sliding_windows, layer_contexts(model), strict=True)


def layer_class(selector: Selector) -> type[CompressedLayer]:
    """Return the class of a cache's layers under a selector; see `Selector.layer`."""
    found: type[CompressedLayer] = CompressedLayer if selector.layer is None else pkgutil.resolve_name(selector.layer)
    return found


def make_layers(
    model: PreTrainedModel, budgets: Any, selector: Selector, reeviction: Reeviction = ONCE
) -> list[CompressedLayer]:
    """Return empty layers for `budgets`, one row for each layer with keys and values."""
    if reeviction.wanted:
        return [
            ReevictingLayer(reeviction, row, selector, window, context)
            for row, window, context in _places(model, budgets)
        ]
    own = layer_class(selector)
    return [own(row, selector, window, context) for row, window, context in _places(model, budgets)]


class LayerMaker:
    """Makes the layers of new caches under a profile or method; its settings are checked once.

    Args, errors: see `CompressedCache`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        profile: MethodSpec,
        budget: BudgetSpec | None,
        reeviction: Reeviction,
    ):
        self.model, self.reeviction = model, reeviction
        at = None if budget is None else read_budget(budget)
        method, self.budgets = get_method(profile).resolve(model, at)
        assert method.selector is not None
        self._at: Callable[[int], np.ndarray] | None = None
        if method.share is not None:
            self._at = functools.lru_cache(_LENGTHS)(partial(method.budgets_at, model_facts(model)))
        self.method, self.selector = method, method.selector
        if reeviction.wanted and method.observers:
            raise UsageError(
                f"method {method.name!r} lays out budgets once, for the whole prompt, and cannot evict again; leave "
                f"out prefill_chunk, evict and evict_every, or use fixed budgets: {method.selector.name!r} or a profile"
            )
        reeviction.check_selector(method.selector)
        check_rereading(model, method.selector)
        # Loads it, and refuses one that does not fit.
        companion_of(model, method.selector)
        facts, budgets = model_facts(model), self.budgets
        method.selector.check_budgets(budgets, facts.sliding_windows)
        if method.selector.prunes_prefill:
            check_model(model)
        # The lowest layers get no more than the prompt has, so that the total is met.
        if self._at is None and method.is_steep:
            by_layer = replace(method, heads=None)
            # It must not keep the model alive, as `self` would.
            self._at = functools.lru_cache(_LENGTHS)(
                lambda tokens: by_layer.budgets_for([], budgets, facts.most_held(tokens))
            )
        if reeviction.prefill_chunk is not None and looks_ahead(model):
            raise UsageError(
                f"tokens of a prompt look ahead in {type(model).__name__}, so that it cannot be read in chunks; leave "
                "out prefill_chunk"
            )
        if (reeviction.prefill_chunk is not None or reeviction.evict == "again") and continues_by_token(model):
            raise UsageError(
                f"{type(model).__name__} goes on from its recurrent states by one token at a time, so that several "
                "tokens cannot be read, and cut, as one call; leave out prefill_chunk and evict='again', or give "
                "evict_every"
            )

    def __call__(self) -> list[Any]:
        """Return the empty layers of one cache."""
        layers: list[Any] = []
        if self.method.observers:
            for row, window, context in _places(self.model, self.budgets):
                layers.append(AdaptiveLayer(self.method, row, layers, window, context))
        else:
            layers = make_layers(self.model, self.budgets, self.selector, self.reeviction)
        if self._at is not None:
            for number, layer in enumerate(layers):
                layer.by_length = partial(_of_layer, self._at, number)
        return layers


def _of_layer(budgets_at: Callable[[int], np.ndarray], number: int, tokens: int) -> np.ndarray:
    return budgets_at(tokens)[number]
