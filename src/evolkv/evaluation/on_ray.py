"""Shards on Ray workers: on this machine, or on a cluster."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from evolkv.cache.hook import own_attention
from evolkv.errors import EvolKVError, RunError, UsageError, is_out_of_memory
from evolkv.evaluation.shards import Request, Sharing
from evolkv.models.identity import weights_checksum
from evolkv.models.loading import Origin, loaded_from
from evolkv.numbers import is_whole

# How often a worker that has died is started again before the search gives up.
_RESTARTS = 8
_REACH_SECONDS = 10.0


class RayBackend:
    """Workers that each have a replica of the model, and share the shards among them.

    Nothing large crosses the network during a search: a worker prefills its shards itself, gets budgets and returns
    scores. A worker that dies is started again, prefills its shards again and answers what it was asked; its answers,
    and so the history of the search, are the same (as long as memory does not get short). Needs
    ``pip install evolkv[ray]``.

    Args:
        model: the model. If it came from `load_model`, each worker loads it by the same name or path, in the same
            dtype, and compares every weight by a checksum. The model is sent to the workers if it did not, or if what a
            worker loads is not the same (it was trained on, say, or an adapter merged).
        tokenizer: its tokenizer.
        workers: number of workers; default: one per GPU of the cluster, or one per core if it has none.
        address: of a running cluster, such as "auto" or "10.0.0.1:6379"; default: start one on this machine.
        cpus: cores per worker, which is also its number of threads.
        gpus: GPUs per worker, may be a fraction; default: 1 if the cluster has any, else 0.

    Raises:
        UsageError: if Ray is not installed, or for settings that the cluster cannot meet.
        RunError: if the cluster cannot be reached, or workers cannot load the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        workers: int | None = None,
        address: str | None = None,
        cpus: float = 1,
        gpus: float | None = None,
    ):
        self._ray = _import_ray()
        if workers is not None and (not is_whole(workers) or workers < 1):
            raise UsageError(f"--workers is {workers!r}; use a whole number, at least one")
        if cpus <= 0 or (gpus is not None and gpus < 0):
            raise UsageError(f"a worker cannot have {cpus} cores and {gpus} GPUs; give it more than 0 cores")
        self._started = not self._ray.is_initialized()
        #: Handles of the workers.
        self.actors: list[Any] = []
        try:
            if self._started:
                self._connect(address, math.ceil(cpus * workers) if workers else None)
            self._start(model, tokenizer, workers, cpus, gpus)
        except BaseException:
            self.close()
            raise

    def _connect(self, address: str | None, cpus: int | None) -> None:
        quiet = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
        try:
            if address is not None:
                _check_reachable(address)
            if address is None:
                self._ray.init(
                    address="local", num_cpus=max(cpus or 0, os.cpu_count() or 1), include_dashboard=False, **quiet
                )
            else:
                self._ray.init(address=address, **quiet)
        except self._ray.exceptions.AuthenticationError as error:
            raise RunError(
                "the cluster asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the one that "
                "`ray get-auth-token` prints on its head node"
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            where = f"the cluster at {address!r}" if address else "a local cluster"
            raise RunError(f"cannot connect to {where}: {_first_line(error)}; is it running (ray status)?") from error

    def _start(
        self, model: PreTrainedModel, tokenizer: Any, workers: int | None, cpus: float, gpus: float | None
    ) -> None:
        there = self._ray.cluster_resources()
        has_gpus = there.get("GPU", 0) > 0
        gpus = gpus if gpus is not None else (1.0 if has_gpus else 0.0)
        fitting = math.floor(there.get("GPU", 0) / gpus if gpus else there.get("CPU", 1) / cpus)
        count = workers if workers is not None else max(1, fitting)
        if count > fitting:
            raise UsageError(
                f"{count} workers with {cpus:g} cores and {gpus:g} GPUs each do not fit a cluster with "
                f"{there.get('CPU', 0):g} cores and {there.get('GPU', 0):g} GPUs; "
                f"use --workers {fitting}, or smaller ones"
            )
        options = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "max_restarts": _RESTARTS,
            "max_task_retries": _RESTARTS,
        }
        worker = self._ray.remote(_Worker).options(**options)
        place = ("cuda" if gpus else "cpu"), max(1, math.floor(cpus))
        # Held as long as the workers: one that is restarted needs them again.
        self._sent = [self._ray.put(tokenizer)]
        origin = loaded_from(model)
        checksum = None if origin is None else weights_checksum(model, own_attention(model))
        if checksum is not None:
            self.actors = [worker.remote(origin, checksum, self._sent, *place) for _ in range(count)]
            if not all(self._get([actor.is_same.remote() for actor in self.actors])):
                self._end_workers()
        if not self.actors:
            if model.device.type != "cpu":
                model = copy.deepcopy(model).to("cpu")
            self._sent = [*self._sent, self._ray.put(model)]
            self.actors = [worker.remote(None, None, self._sent, *place) for _ in range(count)]
        #: The node of each worker.
        self.nodes = self._get([actor.node.remote() for actor in self.actors])
        per_node = Counter(self.nodes)
        self._crowd = max(per_node.values()) if not gpus else max(1, round(1 / gpus))

    def sharing(self, shards: Sequence[Sequence[int]]) -> Sharing:
        """Return the prompts of the worker that holds most, and how many workers share its memory."""
        count = len(self.actors)
        return Sharing(max((tuple(chain(*shards[i::count])) for i in range(count)), key=sum), replicas=self._crowd)

    def run(self, requests: Sequence[Request], on_step: Callable[[], None] | None = None) -> list[np.ndarray]:
        """Answer requests; see `Backend.run`. Progress comes by whole shards."""
        pending = {self._actor(request.shard.key).serve.remote(request): i for i, request in enumerate(requests)}
        answers: list[np.ndarray | None] = [None] * len(requests)
        while pending:
            ready, _ = self._ray.wait(list(pending))
            place = pending.pop(ready[0])
            answers[place] = self._get(ready)[0]
            for _ in requests[place].shard.examples:
                if on_step is not None:
                    on_step()
        return [answer for answer in answers if answer is not None]

    def forget(self, keys: Sequence[str]) -> None:
        """Free the prefill of shards."""
        self._get([self._actor(key).forget.remote(key) for key in keys])

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        self._end_workers()
        if self._started:
            self._ray.shutdown()

    def _end_workers(self) -> None:
        for actor in self.actors:
            with contextlib.suppress(Exception):
                self._ray.kill(actor)
        self.actors = []

    def _actor(self, key: str) -> Any:
        """Return the worker of a shard: neighbours go to different ones."""
        number = int(key.rpartition("/")[2])
        return self.actors[number % len(self.actors)]

    def _get(self, references: Sequence[Any]) -> list[Any]:
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(list(references))
        except exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, EvolKVError) or is_out_of_memory(cause):
                raise cause from error
            raise RunError(f"a worker failed: {type(cause).__name__}: {_first_line(cause)}") from error
        except exceptions.RayActorError as error:
            raise RunError(
                f"a worker died and could not be brought back after {_RESTARTS} tries ({_first_line(error)}); "
                "if its machine ran out of memory, use fewer workers, examples, or a lower ceiling"
            ) from error
        except exceptions.RayError as error:
            raise RunError(f"Ray failed: {_first_line(error)}") from error


class _Worker:
    """A replica of the model on a worker, which serves shards.

    Args:
        origin: what to load; None if the model was sent.
        checksum: of the weights that loading must give, as of `weights_checksum`.
        sent: references to the tokenizer and, if it was sent, the model.
        device: where to compute.
        threads: how many cores to use.
    """

    def __init__(self, origin: Origin | None, checksum: str | None, sent: list[Any], device: str, threads: int):
        import ray
        import torch

        from evolkv.evaluation.shards import ShardServer

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._origin, self._same = origin, True
        if origin is None:
            tokenizer, model = ray.get(sent)
        else:
            # The tokenizer may need code that comes with the model.
            model, _ = origin.load(device)
            (tokenizer,) = ray.get(sent)
            self._same = weights_checksum(model, own_attention(model)) == checksum
        self._server = ShardServer(model.to(device), tokenizer)

    def is_same(self) -> bool:
        """Return whether the model is the one that is searched for."""
        return self._same

    def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def serve(self, request: Request) -> np.ndarray:
        if not self._same:
            assert self._origin is not None
            raise RunError(
                f"a worker that was started again loads other weights as {self._origin.name!r} than before; put the "
                "files back, or start the search again"
            )
        return self._server.serve(request, lambda: None)

    def forget(self, key: str) -> None:
        self._server.forget(key)


def _import_ray() -> Any:
    # Ray would otherwise report usage to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError("backend 'ray' needs Ray; install it with: pip install 'evolkv[ray]'") from error
    return ray


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()


def _first_line(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
