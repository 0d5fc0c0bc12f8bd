"""The backend of a search, by name; and one backend for several searches in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from evolkv.evaluation.local import LocalBackend
from evolkv.evaluation.shards import Backend, Request, Sharing
from evolkv.evolution.config import SearchConfig
from evolkv.selectors import Selector


def make_backend(model: PreTrainedModel, tokenizer: Any, config: SearchConfig) -> Backend:
    """Return the backend that a search asks for."""
    if callable(config.backend):
        return config.backend()
    if config.backend == "local":
        return LocalBackend(model, tokenizer, config.workers)
    from evolkv.evaluation.on_ray import RayBackend

    return RayBackend(model, tokenizer, config.workers)


class SharedBackend:
    """A backend that several searches on the same examples use in turn: each prompt is prefilled once for all.

    Args:
        make: makes the backend when it is first needed.
        selectors: under which the searches run.
    """

    def __init__(self, make: Callable[[], Backend], selectors: Sequence[Selector]):
        self._make, self._selectors = make, tuple(selectors)

    @cached_property
    def _backend(self) -> Backend:
        return self._make()

    def sharing(self, shards: Sequence[Sequence[int]]) -> Sharing:
        """Say who shares the memory of a machine or device; of each shard the lengths of its prompts are given."""
        return self._backend.sharing(shards)

    def run(self, requests: Sequence[Request], on_step: Callable[[], None] | None = None) -> list[np.ndarray]:
        """Answer requests, and have their prompts ranked by all selectors at once."""
        shared = [replace(each, shard=replace(each.shard, rankings=self._selectors)) for each in requests]
        return self._backend.run(shared, on_step)

    def forget(self, keys: Sequence[str]) -> None:
        """Free the prefill of shards."""
        self._backend.forget(keys)

    def close(self) -> None:
        """Do nothing: the next search goes on with it."""

    def end(self) -> None:
        """End the workers."""
        if "_backend" in self.__dict__:
            self._backend.close()
