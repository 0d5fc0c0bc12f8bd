"""Replay over shards of the examples: what is computed together, whoever computes it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedModel

from evolkv.evaluation.engine import Engine, Progress
from evolkv.evaluation.lengths import ByLength
from evolkv.evaluation.memory import USABLE, free_memory
from evolkv.evaluation.prefill import RecordingStore
from evolkv.evaluation.replay_engine import ReplayEngine
from evolkv.selectors import Selector
from evolkv.tasks import Example, fingerprint

# Examples of a shard. It decides which examples are prefilled and decoded together, and with that the last bits of
# every score: these are the same wherever the shards are, and however many workers share them, unless memory is so
# short that not all candidates fit into one batch.
SHARD_SIZE = 3


@dataclass(frozen=True)
class Shard:
    """Examples that are prefilled and decoded together, and how; see `ReplayEngine`.

    Args:
        key: names the shard among all those that a backend serves; ends in its number.
        examples: what to score on.
        selector: ranks the tokens.
        metric: of all examples; None for each example's own.
        ceiling: the largest budget that will be asked for.
        hold: whether to keep the prefill for further calls.
        rankings: selectors under which the same examples are searched, one after the other, if there are several: each
            prompt is then prefilled once for all of them.
        lengths: carries candidates to each prompt's length; None where they are the same for every prompt.
    """

    key: str
    examples: tuple[Example, ...]
    selector: Selector
    metric: str | None
    ceiling: int
    hold: bool
    rankings: tuple[Selector, ...] = ()
    lengths: ByLength | None = None


@dataclass(frozen=True)
class Sharing:
    """Sharers of the memory of a machine or device.

    Args:
        tokens: lengths of the prompts that a replica of the model holds, the one that holds most.
        replicas: how many replicas of the model.
        threads: how many shards a replica computes at once.
    """

    tokens: tuple[int, ...] = ()
    replicas: int = 1
    threads: int = 1


@dataclass(frozen=True)
class Request:
    """A shard to prefill (`budgets` is None), to score, to take the slope of (there is a `sharpness`), or to calibrate.

    Args:
        shard: the shard.
        sharing: who shares the memory with it.
        budgets: the candidates, ``[candidates, layers, kv_heads]``, or the soft budgets of each column,
            ``[columns, layers, kv_heads]``.
        columns: which of the shard's examples to score on.
        sharpness: of the soft cuts.
        utility: whether to return the calibration on all examples, whatever else is said.
    """

    shard: Shard
    sharing: Sharing
    budgets: np.ndarray | None = None
    columns: tuple[int, ...] = ()
    sharpness: float | None = None
    utility: bool = False


class ShardServer:
    """One replica of the model, and the prefill of the shards it has been asked for.

    Args:
        model: the model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self._memory = int(USABLE * free_memory(model))
        self._held: dict[str, ReplayEngine] = {}
        self._store: RecordingStore | None = None
        self._lock = threading.Lock()

    def serve(self, request: Request, step: Callable[[], None]) -> np.ndarray:
        """Answer a request; call `step` after each prefill.

        Returns:
            Scores ``[candidates, columns]`` (no candidates if none were sent); of a slope, each column's loss and
            derivatives, ``[columns, 1 + layers * kv_heads]``; of a calibration, ``[layers, kv_heads, ceiling]``.
        """
        shard = request.shard
        engine = self._held.get(shard.key)
        with self._lock:
            if shard.rankings and self._store is None:
                # Every prompt is there twice then, as recorded and in the order of one ranking.
                self._memory //= 2
                self._store = RecordingStore(self._memory)
        if engine is None:
            engine = ReplayEngine(
                self.model,
                self.tokenizer,
                shard.examples,
                shard.selector,
                shard.metric,
                shard.ceiling,
                memory_limit=self._for_prompts(request.sharing) if shard.hold else self._left(request.sharing),
                hold=shard.hold,
                beside=request.sharing.tokens,
                on_progress=lambda done, total: step(),
                rankings=shard.rankings,
                store=None if self._store is None else (self._store, fingerprint(shard.examples)),
                lengths=shard.lengths,
            )
            if shard.hold:
                self._held[shard.key] = engine
        if shard.hold and (request.utility or request.budgets is not None):
            engine.room = self._left(request.sharing)
        if request.utility:
            return engine.utility()
        if request.budgets is None:
            return np.empty((0, 0))
        if request.sharpness is not None:
            losses, slopes = engine.slope(request.budgets, request.sharpness, request.columns)
            return np.column_stack([losses, slopes.reshape(len(losses), -1)])
        return engine.score(request.budgets, request.columns)

    def _for_prompts(self, sharing: Sharing) -> int:
        """Return the bytes for the ranked entries of all prompts; how long references are is known as they come."""
        references = sum(engine.reference_bytes for engine in list(self._held.values()))
        return self._memory // sharing.replicas - references

    def _left(self, sharing: Sharing) -> int:
        """Return the bytes for the candidates of one shard: all snapshots stay, and each thread computes one shard."""
        held = sum(engine.held_bytes for engine in list(self._held.values()))
        return (self._memory // sharing.replicas - held) // sharing.threads

    def forget(self, key: str) -> None:
        """Frees a shard's prefill."""
        self._held.pop(key, None)


class Backend(Protocol):
    """Threads or processes that compute shards."""

    def sharing(self, shards: Sequence[Sequence[int]]) -> Sharing:
        """Return who shares the memory of a machine or device; of each shard the lengths of its prompts are given."""
        ...

    def run(self, requests: Sequence[Request], on_step: Callable[[], None] | None = None) -> list[np.ndarray]:
        """Answer requests, side by side where possible; call `on_step` once per example that was prefilled."""
        ...

    def forget(self, keys: Sequence[str]) -> None:
        """Free the prefill of shards."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


class ShardedEngine(Engine):
    """Scores candidates by replay, shard by shard, on a backend.

    Args:
        backend: where the shards are computed.
        examples: what to score on.
        selector: ranks the tokens.
        metric: of all examples; None for each example's own.
        ceiling: the largest budget that will be asked for.
        hold: whether to prefill now and hold the result for any number of `score` calls.
        on_progress: called with (done, total) after each example that was prefilled.
        shard_size: examples of a shard.
        tokens: length of each prompt, by which the first one read tells whether all fit into memory. Default: each
            shard goes by its own prompts.
        lengths: carries candidates to each prompt's length; None where they are the same for every prompt.

    Raises:
        UsageError: as `ReplayEngine`.
        RunError: if the snapshots do not fit into memory, or workers are lost.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        backend: Backend,
        examples: Sequence[Example],
        selector: Selector,
        metric: str | None,
        ceiling: int,
        hold: bool = True,
        on_progress: Progress | None = None,
        shard_size: int = SHARD_SIZE,
        tokens: Sequence[int] = (),
        lengths: ByLength | None = None,
    ):
        self.backend, self.hold, self._on_progress = backend, hold, on_progress
        self._shard_size = shard_size
        number = next(self._numbers)
        self._size = len(examples)
        self._shards = [
            Shard(
                f"{number}/{start // shard_size}",
                tuple(examples[start : start + shard_size]),
                selector,
                metric,
                ceiling,
                hold,
                lengths=lengths,
            )
            for start in range(0, len(examples), shard_size)
        ]
        self._sharing = backend.sharing(
            [tokens[start : start + shard_size] for start in range(0, len(examples), shard_size)]
        )
        if hold:
            backend.run([Request(shard, self._sharing) for shard in self._shards], self._counted())

    def score(self, budgets: np.ndarray, columns: Sequence[int] | None = None) -> np.ndarray:
        """See `Engine.score`."""
        wanted = list(range(self._size) if columns is None else columns)
        scores = np.empty((len(budgets), len(wanted)))
        for at, answer in self._ask(budgets, wanted, None):
            scores[:, at] = answer
        return scores

    def slope(
        self,
        budgets: np.ndarray,
        sharpness: float,
        columns: Sequence[int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.slope`."""
        losses, slopes = np.empty(len(columns)), np.empty(budgets.shape)
        for at, answer in self._ask(budgets, list(columns), sharpness):
            losses[at] = answer[:, 0]
            slopes[at] = answer[:, 1:].reshape(len(at), *slopes.shape[1:])
        return losses, slopes

    def utility(self) -> np.ndarray:
        """See `Engine.utility`. Each shard answers with 4 bytes for each layer, KV head and rank."""
        requests = [Request(shard, self._sharing, utility=True) for shard in self._shards]
        total = np.stack(self.backend.run(requests)).sum(axis=0, dtype=np.float64)
        return total.astype(np.float32)

    def _ask(
        self,
        budgets: np.ndarray,
        wanted: list[int],
        sharpness: float | None,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield the answers of the shards that have wanted examples, each with the places of these examples."""
        if beyond := set(wanted) - set(range(self._size)):
            # Their places would hold whatever was in memory.
            raise IndexError(f"examples {sorted(beyond)} of {self._size}")
        requests, places = [], []
        for start, shard in zip(range(0, self._size, self._shard_size), self._shards, strict=True):
            inside = [column - start for column in wanted if 0 <= column - start < len(shard.examples)]
            if inside:
                places.append([wanted.index(start + i) for i in inside])
                own = budgets if sharpness is None else budgets[places[-1]]
                requests.append(Request(shard, self._sharing, own, tuple(inside), sharpness))
        return zip(places, self.backend.run(requests, None if self.hold else self._counted()), strict=True)

    def close(self) -> None:
        """Free the prefill."""
        self.backend.forget([shard.key for shard in self._shards])

    def _counted(self) -> Callable[[], None] | None:
        report, total, done = self._on_progress, self._size, itertools.count(1)
        return None if report is None else lambda: report(min(next(done), total), total)
