"""The contenders of the inference benchmarks: plain transformers, and ours with budgets per layer and per head."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Cache, DynamicCache, PreTrainedModel

import evolkv
from evolkv.allocators import complete
from evolkv.cache.hook import attach

PLAIN = "plain transformers"
#: The least and the most that a head gets where heads differ, in entries.
_LEAST, _MOST = 33, 4096


@dataclass(frozen=True)
class Contender:
    """One way to run a model.

    Args:
        name: in tables.
        model: the model.
        profile: budgets, or None for plain transformers.
    """

    name: str
    model: PreTrainedModel
    profile: evolkv.BudgetProfile | None = None

    def new_cache(self) -> Cache:
        """An empty cache. The model's attention is its own until `call`."""
        if self.profile is None:
            return DynamicCache(config=self.model.config)
        cache = evolkv.CompressedCache(self.model, self.profile)
        cache.release()
        return cache

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Our hook, for ours only: plain transformers must not pay for it."""
        detach = contextlib.nullcontext if self.profile is None else attach(self.model)
        try:
            yield
        finally:
            detach()

    def call(self, ids: Tensor, cache: Cache) -> None:
        """A forward call, inside `running`: a prompt, or a decode step."""
        self.model(ids, cache=cache, use_cache=True, logits_to_keep=1)


def contenders(model: PreTrainedModel, budget: int, profile: str | None, seed: int) -> list[Contender]:
    """Plain transformers first, then ours: the same budget everywhere, and budgets per head with the same mean.

    Where no evolved profile is given, budgets per head are log-normal (sigma 1): spread about as evolved ones are.
    """
    config = model.config.get_text_config(decoder=True)
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    even = evolkv.BudgetProfile.uniform(model, budget, selector="snapkv")
    if profile is not None:
        uneven = evolkv.BudgetProfile.load(profile)
        uneven = uneven if uneven.budget == budget else uneven.expand(budget)
    else:
        drawn = np.random.default_rng(seed).lognormal(sigma=1.0, size=shape)
        budgets = complete(drawn, budget * drawn.size, min(_LEAST, budget), _MOST)
        uneven = evolkv.BudgetProfile.from_budgets(model, budgets, selector="snapkv")
    return [
        Contender(PLAIN, model),
        Contender("evolkv, per layer", model, even),
        Contender("evolkv, per head", model, uneven),
    ]


def under_method(model: PreTrainedModel, selector: str, budget: int) -> Contender:
    """Ours under another selector, with the same budget everywhere."""
    return Contender(f"evolkv, {selector}", model, evolkv.BudgetProfile.uniform(model, budget, selector=selector))


def held(cache: Cache) -> tuple[int, int]:
    """Bytes of the keys and values that a cache holds, and its entries, summed over sequences, layers and KV heads."""
    if isinstance(cache, evolkv.CompressedCache):
        return cache.kv_bytes, sum(g.keys.shape[:2].numel() for layer in cache.kv_layers for g in layer.groups)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in tensors), sum(layer.keys.shape[:3].numel() for layer in cache.layers)


def return_free_memory() -> None:
    """Has the C library give what was freed back to the system, so that the resident set says what is in use."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """The most memory in use inside the ``with`` block, in bytes beyond what was in use before it.

    On a GPU by the allocator's own count; on a CPU by the resident set, looked at every two milliseconds.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        return_free_memory()
        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self._most = self._process.memory_info().rss
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._done.is_set():
            self._most = max(self._most, self._process.memory_info().rss)
            time.sleep(0.002)

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._done.set()
        self._watch.join()
        self.bytes = max(self._most, self._process.memory_info().rss) - self._before


class PeakTensors(TorchDispatchMode):
    """The most bytes that tensors made inside the ``with`` block held at once, by their storages; free of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._alive = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given | self._storages:
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages.add(storage._cdata)
        self._alive += storage.nbytes()
        self.bytes = max(self.bytes, self._alive)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, storage: int, size: int) -> None:
        self._storages.discard(storage)
        self._alive -= size
