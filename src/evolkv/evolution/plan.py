"""The time and memory that a search will take, from a few steps of it on one or two examples.

Nothing is recorded. What the bytes are is asked of the engine that will use them; times are measured with the workers
that the search will have.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from evolkv.errors import ModelError
from evolkv.evaluation.memory import USABLE, free_memory
from evolkv.evaluation.naive_engine import NaiveEngine
from evolkv.evaluation.prefill import Prefiller
from evolkv.evaluation.replay_engine import ReplayEngine
from evolkv.evaluation.shards import SHARD_SIZE, ShardedEngine
from evolkv.evolution.config import COMPUTED, OneBudget, SearchConfig, SeveralBudgets
from evolkv.evolution.evolve import make_strategy
from evolkv.evolution.gradient import SLOPE_EXAMPLES
from evolkv.evolution.limit import allocations
from evolkv.evolution.rivals import fitted, searches_of, settled
from evolkv.evolution.run import Run
from evolkv.models import model_facts
from evolkv.tasks import Example, encode_prompt
from evolkv.tasks.prompts import prompt_lengths

FORMAT = "evolkv.plan/1"


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a search, where the model computes.

    Args:
        process: what is in use besides: weights, and on a CPU the libraries too.
        weights: the model's part of it.
        recordings: ranked entries of all training examples.
        reading: prompts while they are prefilled.
        gradient: passes there and back, side by side; 0 without a gradient start.
        candidates: batches of candidates, side by side.
        free: what is free once the model is loaded.
    """

    process: int
    weights: int
    recordings: int
    reading: int
    gradient: int
    candidates: int
    free: int

    @property
    def needed(self) -> int:
        """Bytes beyond what is in use."""
        return self.recordings + max(self.reading, self.gradient, self.candidates)

    @property
    def peak(self) -> int:
        """All bytes."""
        return self.process + self.needed


@dataclass(frozen=True)
class Plan:
    """Time and memory that a search will take.

    Args:
        seconds: by stage: prefill, calibration (of LU-KV), gradient, evolution, validation. Loading the model is not
            among them.
        memory: see `Memory`.
        candidates: evaluated in all.
        fits: whether memory suffices.
        advice: changes of settings with each of which it would, if it does not.
    """

    seconds: dict[str, float]
    memory: Memory
    candidates: int
    fits: bool
    advice: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a ``--json`` file."""
        memory = {**asdict(self.memory), "peak": self.memory.peak}
        return {
            "format": FORMAT,
            "seconds": {**self.seconds, "total": sum(self.seconds.values())},
            "bytes": memory,
            "candidates": self.candidates,
            "fits": self.fits,
            "advice": self.advice,
        }


def make_plan(model: PreTrainedModel, tokenizer: Any, config: OneBudget | SeveralBudgets) -> Plan:
    """Measure on one or two examples what a search will take.

    Args:
        model: a transformers decoder-only model.
        tokenizer: its tokenizer.
        config: the settings of the search, checked.

    Raises:
        UsageError: for settings that cannot be used.
        RunError: if memory does not suffice for one example.
    """
    config = settled(tokenizer, config)
    selectors = list(config.selectors.values())
    one = replace(config, selector=[fitted(selectors[0], config.targets)], storage=None, time_limit=None)
    free = free_memory(model)
    with Run(model, tokenizer, one) as run:
        budgets = run.space.aim(config.targets)
        measured = (_Naive if config.engine == "naive" else _Replay)(run, budgets)
        # Of competing selectors only one evolves.
        evolving = 1 if config.competes else len(selectors)
        evaluations = _evaluations(config, run.space.shape, len(budgets)) * evolving
        chosen = (
            allocations(len(budgets), run.task.balanced) * searches_of(config) * (len(run.held_out) + len(run.train))
        )
        descents = config.gradient_steps * len(budgets) * len(selectors) if config.follows_slope else 0
        seconds = {
            "prefill": measured.read(run.train),
            "calibration": measured.calibration * len(selectors),
            "gradient": descents * measured.step,
            "evolution": evaluations * measured.candidate,
            "validation": measured.read(run.held_out) + chosen * measured.row + len(budgets) * measured.prompt,
        }
        memory = measured.memory(free, len(selectors))
        usable = USABLE * free / (2 if len(selectors) > 1 else 1)
        fits = memory.needed <= usable
        advice = [] if fits else _advice(run, memory, usable)
    return Plan(seconds, memory, evaluations, fits, advice)


def _evaluations(config: SearchConfig, shape: tuple[int, ...], budgets: int) -> int:
    first = config.evaluations(shape)
    return first if budgets == 1 else first + (budgets - 1) * config.evaluations(shape, budgets - 1)


class _Replay:
    """Prefill, one step of the descent and one generation, on as many examples as are computed side by side.

    `calibration`, `step`, `candidate` and `row` are seconds of LU-KV's calibration, of a step of the descent, of a
    candidate in its generation, and of one row; `prompt` is those of a prompt that shares nothing.
    """

    def __init__(self, run: Run, budgets: Sequence[int]):
        self.run = run
        config, space = run.config, run.space
        self.side_by_side = run.engines.side_by_side(len(run.train))
        # One of each shard, as many as run at once.
        sample = run.train[::SHARD_SIZE][: self.side_by_side]
        self.tokens = prompt_lengths(run.tokenizer, run.train)
        self.ceiling = run.engines.most_held(max(self.tokens))
        started = time.perf_counter()
        engine = ShardedEngine(run.engines.backend, sample, run.selector, config.metric, self.ceiling, shard_size=1)
        took = time.perf_counter() - started
        self.sampled = prompt_lengths(run.tokenizer, sample)
        self.per_token = took / sum(self._tokens([each]) for each in sample)
        self.prompt = took / len(sample)
        self.step = self.calibration = 0.0
        if config.calibrates:
            started = time.perf_counter()
            with contextlib.suppress(ModelError):
                engine.utility()
            self.calibration = (time.perf_counter() - started) * len(run.train) / len(sample)
        if config.follows_slope:
            columns = list(range(min(len(sample), SLOPE_EXAMPLES)))
            uniform = space.matrix(np.full(space.shape, float(budgets[0])))
            rounds = math.ceil(min(SLOPE_EXAMPLES, len(run.train)) / len(columns))
            points = np.stack([uniform] * len(columns))
            self.step = rounds * _fastest(lambda: engine.slope(points, 2.0, columns))
        start = None if config.begins_at in COMPUTED else config.begins_at
        strategy = make_strategy(config, space, budgets[0], start)
        population = np.stack([space.matrix(each) for each in strategy.ask()])
        columns = list(range(min(len(sample), run.rotation.size)))
        scored = _fastest(lambda: engine.score(population, columns))
        self.candidate = scored * math.ceil(run.rotation.size / len(columns)) / len(population)
        self.row = scored / (len(population) * len(columns))
        #: Bytes in use besides what the sample holds. Not before: weights and libraries come as they are first used.
        self.in_use = _in_use(run.model)
        engine.close()
        # Rows of a shard's examples are one batch.
        self.rows = len(population) * math.ceil(run.rotation.size / math.ceil(len(run.train) / SHARD_SIZE))

    def read(self, examples: Sequence[Example]) -> float:
        """Return the seconds that prefilling examples takes; neighbours in a shard share what their prompts share."""
        shards = [examples[start : start + SHARD_SIZE] for start in range(0, len(examples), SHARD_SIZE)]
        rounds = math.ceil(len(shards) / self.side_by_side)
        return self.per_token * sum(map(self._tokens, shards)) * rounds * self.side_by_side / len(shards)

    def _tokens(self, shard: Sequence[Example]) -> int:
        """Return how many tokens are computed when examples are prefilled one after the other."""
        prefill = Prefiller(self.run.model, [self.run.selector])
        return prefill.tokens_to_compute([encode_prompt(self.run.tokenizer, example) for example in shard])

    def memory(self, free: int, selectors: int) -> Memory:
        """Return what the search takes; `free` are the bytes that were free before."""
        run, config = self.run, self.run.config
        longest = run.train[int(np.argmax(self.tokens))]
        engine = ReplayEngine(run.model, run.tokenizer, [longest], run.selector, config.metric, self.ceiling)
        needs = engine.needs(self.rows)
        engine.close()
        # Up to the ceiling all of a prompt is held.
        held = np.minimum(self.tokens, self.ceiling)
        recordings = int(needs.snapshot * held.sum() / held.max())
        whole = int(needs.snapshot * needs.tokens / min(needs.tokens, self.ceiling))
        if selectors > 1:
            # Prompts are also held as recorded for the selectors to come, as long as there is room.
            recordings += min(int(whole * sum(self.tokens) / needs.tokens), int(USABLE * free / 2))
        held_then = int(needs.snapshot * np.minimum(self.sampled, self.ceiling).sum() / held.max())
        passes = min(self.side_by_side, SLOPE_EXAMPLES)
        return Memory(
            self.in_use - held_then,
            _weights(run.model),
            recordings,
            2 * self.side_by_side * whole,
            passes * needs.slope if config.follows_slope else 0,
            min(self.side_by_side, run.rotation.size) * needs.batch,
            free,
        )


class _Naive:
    """One candidate on one example, prefill and answer: with this engine that is all there is."""

    def __init__(self, run: Run, budgets: Sequence[int]):
        self.run, config = run, run.config
        self.tokens = prompt_lengths(run.tokenizer, run.train)
        engine = NaiveEngine(
            run.model, run.tokenizer, run.train[:1], run.selector, config.metric, None, config.prefill_chunk
        )
        uniform = run.space.matrix(np.full(run.space.shape, budgets[0]))[None]
        self.row = _fastest(lambda: engine.score(uniform)) * float(np.mean(self.tokens)) / self.tokens[0]
        self.candidate, self.prompt = self.row * run.rotation.size, self.row
        self.step = self.calibration = 0.0
        self.in_use = _in_use(run.model)

    def read(self, examples: Sequence[Example]) -> float:
        """Return 0: no prompt is read once for all candidates."""
        return 0.0

    def memory(self, free: int, selectors: int) -> Memory:
        """Return what the search takes: one prompt at a time."""
        facts, model = model_facts(self.run.model), self.run.model
        entry = 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * model.dtype.itemsize
        return Memory(self.in_use, _weights(model), 0, int(2 * entry * max(self.tokens)), 0, 0, free)


def _fastest(call: Callable[[], Any]) -> float:
    """Return the seconds of a call, made twice: the first one allocates."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def _weights(model: PreTrainedModel) -> int:
    return sum(each.nbytes for each in (*model.parameters(), *model.buffers()))


def _in_use(model: PreTrainedModel) -> int:
    if model.device.type == "cuda":
        return int(torch.cuda.memory_allocated(model.device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def _advice(run: Run, memory: Memory, usable: float) -> list[str]:
    """Return changes with each of which the search would fit."""
    advice = []
    working = memory.needed - memory.recordings
    if memory.recordings and (left := usable - working) > 0:
        share = left / memory.recordings
        if (train := int(len(run.train) * share)) >= 1:
            advice.append(f"--train {train} (now {len(run.train)})")
        ceiling = int(run.space.ceiling * share)
        if not run.engines.holds_all and ceiling > max(run.space.floor, *run.space.budgets):
            advice.append(f"--ceiling {ceiling} (now {run.space.ceiling})")
    if run.model.dtype == torch.float32 and memory.needed / 2 <= usable + memory.weights / 2:
        advice.append("--dtype bfloat16 (now float32)")
    return advice
