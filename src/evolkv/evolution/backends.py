"""Where replay runs, by name; and one backend for several searches in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from evolkv.errors import UsageError
from evolkv.evaluation.local import LocalBackend
from evolkv.evaluation.shards import Backend, Request, Sharing
from evolkv.numbers import is_whole
from evolkv.registry import unknown_name
from evolkv.selectors import Selector

BackendName = Literal["local", "ray"]


def backend_maker(
    model: PreTrainedModel, tokenizer: Any, name: BackendName | Callable[[], Backend], workers: int | None, engine: str
) -> Callable[[], Backend]:
    """What makes the backend of a search when it is first needed; arguments as for `evolkv.search`.

    Raises:
        UsageError: for an unknown name, or settings that do not go together.
    """
    if workers is not None and (not is_whole(workers) or workers < 1):
        raise UsageError(f"--workers is {workers!r}; use a whole number, at least one")
    if name == "local":
        return lambda: LocalBackend(model, tokenizer, workers)
    if name != "ray" and not callable(name):
        raise unknown_name("backend", name, ("local", "ray"))
    if engine == "naive":
        raise UsageError("engine 'naive' runs on the local backend only; use --engine replay with --backend ray")
    if callable(name):
        return name
    from evolkv.evaluation.on_ray import RayBackend

    return lambda: RayBackend(model, tokenizer, workers)


class SharedBackend:
    """A backend that several searches on the same examples use in turn: each prompt is prefilled once for all.

    A search closes what it was lent; `close` ends the backend itself.

    Args:
        make: makes the backend when it is first needed.
        selectors: under which the searches run.
    """

    def __init__(self, make: Callable[[], Backend], selectors: Sequence[Selector]):
        self._make, self._selectors = make, tuple(selectors)
        self._backend: Backend | None = None

    def lend(self) -> Backend:
        """The backend, for one of the searches."""
        if self._backend is None:
            self._backend = self._make()
        return _Lent(self._backend, self._selectors)

    def close(self) -> None:
        """Ends the workers."""
        if self._backend is not None:
            self._backend.close()


class _Lent:
    def __init__(self, backend: Backend, selectors: tuple[Selector, ...]):
        self._backend, self._selectors = backend, selectors

    def sharing(self, shards: int) -> Sharing:
        return self._backend.sharing(shards)

    def run(self, requests: Sequence[Request], on_step: Callable[[], None] | None = None) -> list[np.ndarray]:
        shared = [replace(each, shard=replace(each.shard, rankings=self._selectors)) for each in requests]
        return self._backend.run(shared, on_step)

    def forget(self, keys: Sequence[str]) -> None:
        self._backend.forget(keys)

    def close(self) -> None:
        """Nothing: the next search goes on with it."""
