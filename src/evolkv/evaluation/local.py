"""Shards on the threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from evolkv.evaluation.shards import Request, ShardServer, Sharing
from evolkv.evaluation.workers import Workers


class LocalBackend:
    """One replica of the model, and threads that share the cores.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        workers: number of threads; default: one per core that PyTorch uses.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, workers: int | None = None):
        self._server = ShardServer(model, tokenizer)
        self._workers = Workers(model.device, workers)

    def sharing(self, shards: Sequence[Sequence[int]]) -> Sharing:
        """Return that all shards share the memory, and each thread computes one."""
        return Sharing(tuple(chain(*shards)), threads=self._workers.count)

    def run(self, requests: Sequence[Request], on_step: Callable[[], None] | None = None) -> list[np.ndarray]:
        """Answer requests; see `Backend.run`."""
        return self._workers.run([partial(self._server.serve, request) for request in requests], on_step)

    def forget(self, keys: Sequence[str]) -> None:
        """Free the prefill of shards."""
        for key in keys:
            self._server.forget(key)

    def close(self) -> None:
        """End the threads."""
        self._workers.close()
