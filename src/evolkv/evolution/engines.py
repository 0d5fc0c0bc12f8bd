"""The engines of a search: over its training examples, and over those that it chooses on."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedModel

from evolkv.evaluation.balance import BalancedEngine
from evolkv.evaluation.engine import Engine
from evolkv.evaluation.naive_engine import NaiveEngine
from evolkv.evaluation.shards import SHARD_SIZE, Backend, ShardedEngine
from evolkv.evolution.backends import make_backend
from evolkv.evolution.config import SearchConfig
from evolkv.evolution.limit import TimeLimit
from evolkv.evolution.progress import SearchProgress
from evolkv.evolution.space import SearchSpace
from evolkv.selectors import Selector
from evolkv.tasks import Example
from evolkv.tasks.prompts import prompt_lengths


class Engines:
    """Makes the engines of a search, each when it is first asked for.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        config: the settings of the search.
        selector: ranks the tokens.
        space: the budgets to choose from.
        balanced: whether each example counts by what budgets can gain on it.
        limit: is told how long prompts take.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        config: SearchConfig,
        selector: Selector,
        space: SearchSpace,
        balanced: bool,
        limit: TimeLimit,
    ):
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._selector, self._space, self._balanced, self._limit = selector, space, balanced, limit
        self._training: Engine | None = None

    @cached_property
    def backend(self) -> Backend:
        """Return the backend that computes shards."""
        return make_backend(self._model, self._tokenizer, self._config)

    def side_by_side(self, examples: int) -> int:
        """Return how many shards of so many examples are computed at once."""
        shards = math.ceil(examples / SHARD_SIZE)
        sharing = self.backend.sharing([()] * shards)
        return min(shards, sharing.replicas * sharing.threads)

    @property
    def holds_all(self) -> bool:
        """Return whether prompts are held whole: at a share, or where scores are balanced against the full cache."""
        return bool(self._space.shares) or self._balanced

    def most_held(self, longest: int) -> int:
        """Return the most ranked entries of a head that are held, of prompts with so many tokens at most."""
        return longest if self.holds_all else self._space.ceiling

    def training(self, examples: Sequence[Example]) -> Engine:
        """Return the engine over the training examples; their prompts are prefilled once, and held for many calls."""
        if self._training is None:
            self._training = self._engine(examples, "prefill")
            if isinstance(self._training, BalancedEngine):
                # Now, so that no limit takes the first step for as long.
                self._training.refer()
        return self._training

    def free(self) -> None:
        """Free the training examples' prompts."""
        if self._training is not None:
            self._training.close()
            self._training = None

    def unseen(self, examples: Sequence[Example]) -> Engine:
        """Return an engine over the examples to choose on, which prefills in each call."""
        return self._engine(examples, "validation")

    def close(self) -> None:
        """End the workers."""
        if "backend" in self.__dict__:
            self.backend.close()

    def _engine(self, examples: Sequence[Example], stage: Literal["prefill", "validation"]) -> Engine:
        engine = self._plain(examples, stage)
        if not self._balanced:
            return engine
        return BalancedEngine(engine, self._space.heuristics(min(self._space.budgets))["uniform"])

    def _plain(self, examples: Sequence[Example], stage: Literal["prefill", "validation"]) -> Engine:
        config, lengths, held = self._config, self._space.by_length, stage == "prefill"
        started = time.perf_counter()

        def on_progress(done: int, total: int) -> None:
            # Not before all workers have read a shard: its later prompts take less, since they share their beginning.
            if held and config.engine == "replay" and done >= min(total, SHARD_SIZE * side_by_side):
                self._limit.read(done, total, time.perf_counter() - started)
            config.report(SearchProgress(stage, done, total))

        if config.engine == "naive":
            return NaiveEngine(
                self._model,
                self._tokenizer,
                examples,
                self._selector,
                config.metric,
                on_progress,
                config.prefill_chunk,
                lengths,
            )
        side_by_side = self.side_by_side(len(examples))
        tokens = prompt_lengths(self._tokenizer, examples)
        return ShardedEngine(
            self.backend,
            examples,
            self._selector,
            config.metric,
            self.most_held(max(tokens)),
            held,
            on_progress,
            tokens=tokens,
            lengths=lengths,
        )
