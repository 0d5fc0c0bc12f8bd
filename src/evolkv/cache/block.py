"""The ``with`` block that gives every call of a model a compressed cache."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from transformers import DynamicCache, PreTrainedModel

from evolkv.budgets import BudgetSpec
from evolkv.cache.compressed import CompressedCache
from evolkv.cache.hook import attach
from evolkv.cache.hooked import Block, HookedCache
from evolkv.cache.reeviction import Reeviction
from evolkv.cache.resolve import LayerMaker
from evolkv.errors import UsageError
from evolkv.methods import MethodSpec
from evolkv.models import model_facts
from evolkv.models.forward import by_name, given_cache


@contextmanager
def compress(
    model: PreTrainedModel,
    profile: MethodSpec,
    budget: BudgetSpec | None = None,
    *,
    prefill_chunk: int | None = None,
    evict: Literal["once", "again"] = "once",
    evict_every: int | None = None,
) -> Iterator[None]:
    """Runs every `generate` and forward call inside the ``with`` block under a profile, or another method.

    Each prompt gets a fresh `CompressedCache`, which the output holds as ``cache``. Calls that pass a cache which
    already holds tokens, or ``use_cache=False``, go on as they would. Blocks may be nested; the inner profile
    counts. On leaving the block the model is as it was, also after an exception; where a cache of the block is
    still held (by an output, say), so that it can be gone on from, the model's hooks stay until the last such cache
    goes or is `release`d. Copies and pickles of the model never have them.

    The block switches the model, for all threads that call it: have one block per model at a time. Where requests come
    from several threads, give each call a cache of its own, ``generate(cache=CompressedCache(model, profile))``.

    Args:
        model: a transformers decoder-only model.
        profile, budget, prefill_chunk, evict, evict_every: as for `CompressedCache`.

    Raises:
        ProfileError: if the profile is for another model.
        ModelError: if the model's cache cannot be compressed.
        UsageError: as for `CompressedCache`; inside the block, if a call asks for another kind of
            cache (static, quantized, offloaded).

    Example:
        >>> with evolkv.compress(model, profile):
        ...     model.generate(**inputs)
    """
    make_layers = LayerMaker(model, profile, budget, Reeviction(prefill_chunk, evict, evict_every))
    block = Block()
    replaced: weakref.WeakSet[DynamicCache] = weakref.WeakSet()

    def bring(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        kwargs = by_name(module, args, kwargs)
        given = given_cache(kwargs)
        use_cache = kwargs.get("use_cache")
        if isinstance(given, HookedCache):
            return None
        if use_cache is False and given is None:
            if getattr(getattr(model, "generation_config", None), "use_cache", True) is False:
                raise UsageError(
                    "the model's generation_config says use_cache=False, so that generate() keeps nothing to compress; "
                    "call generate(use_cache=True), or set model.generation_config.use_cache = True"
                )
            return None
        if given is not None and given.get_seq_length() > 0:
            return None
        # transformers drafts with the first layers alone (assistant_early_exit), and does not restore their number if
        # that raises. The call that brings the drafts is refused below.
        if len(model_facts(model).kv_layers) < len(make_layers.budgets):
            return None
        if given is not None and (type(given) is not DynamicCache or given.offloading):
            raise UsageError(
                f"compress() replaces the default cache, but this call brings a {type(given).__name__}; "
                "call it without a cache and without cache_implementation (if the model's generation_config has one, "
                "set model.generation_config.cache_implementation = None)"
            )
        kept = kwargs.get("logits_to_keep")
        if given is not None and isinstance(kept, int) and kept > 1:
            raise UsageError(
                "assisted decoding brings drafts along with the prompt, and compress() cannot tell where they begin; "
                "give generate() an empty CompressedCache(model, profile) as its cache"
            )
        if given is not None and given in replaced:
            raise UsageError(
                "this call brings a cache that stayed empty, since compress() has put one of its own in its place "
                "before; go on with the one that the model's output holds (output.cache), or give each prompt a "
                "new cache; a model whose output holds none cannot be compressed in a block"
            )
        cache = CompressedCache.with_layers(model, make_layers())
        cache.block = block
        if given is not None:
            replaced.add(given)
        kwargs.pop("past_key_values", None)
        return (), {**kwargs, "cache": cache, "use_cache": True}

    detach = attach(model, bring)
    try:
        yield
    finally:
        block.is_open = False
        detach()
