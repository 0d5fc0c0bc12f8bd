"""All methods on a task's examples; what is on record already is not measured again.

Each prompt is prefilled once for all methods, unless it is read in chunks: what is evicted early then decides what
later chunks see, and every method has to read the prompt for itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.cache.compressed import CompressedCache
from evolkv.evaluation.decode import RepetitionPenalty, end_tokens, greedy, target_log_probs
from evolkv.evaluation.engine import Encoded, mean_probability, text_score
from evolkv.evaluation.memory import free_memory
from evolkv.evaluation.prefill import Prefiller, RecordedPrompt
from evolkv.evaluation.records import MethodSettings, Record, RecordLog, Settings, label, sha256
from evolkv.evaluation.workers import Workers, check_wanted
from evolkv.methods import Method
from evolkv.models import model_facts
from evolkv.profile import BudgetProfile
from evolkv.selectors import Selector
from evolkv.tasks import Example

# Rows decoded at once; more gains little, since the weights are then read for enough rows.
_MAX_ROWS = 64
# Examples that are computed together. What is computed together decides the last bits of a score, so a shard of which
# some examples are on record is computed whole: few enough that little is lost, and half of the sixteen neighbours that
# share a passage in `niah`, whose common prefix is computed once within a shard.
_SHARD_SIZE = 8


@dataclass(frozen=True)
class Row:
    """One line of the result: a method at a budget.

    `budgets` are ``[layers, kv_heads]``, before any allocator that goes by the prompt.
    """

    method: Method
    budget: int | None
    budgets: np.ndarray
    selector: Selector

    @property
    def label(self) -> str:
        """See `evolkv.evaluation.records.label`."""
        return label(self.method.name, self.budget)

    def new_cache(self, model: PreTrainedModel, prefill_chunk: int) -> CompressedCache:
        """An empty cache that reads a prompt in chunks.

        Raises:
            UsageError: for a method that cannot evict before it has seen the whole prompt.
        """
        method: Method | BudgetProfile = self.method
        if self.method.is_full:
            everything = np.minimum(self.budgets, model_facts(model).max_context)
            method = BudgetProfile.from_budgets(model, everything, selector=self.selector.to_dict())
        return CompressedCache(model, method, self.budget, prefill_chunk=prefill_chunk)

    def describe(self) -> MethodSettings:
        """What identifies it."""
        if self.budget is None:
            return MethodSettings(
                method=self.method.name, budget=None, budgets_sha256=None, selector=None, expanded_from=None
            )
        profile = self.method.profile
        return MethodSettings(
            method=self.method.name,
            budget=self.budget,
            budgets_sha256=sha256(json.dumps(self.budgets.tolist())),
            selector=self.selector.to_dict(),
            expanded_from=profile.budget if profile is not None and profile.budget != self.budget else None,
        )


@dataclass(frozen=True)
class Questions:
    """A task's examples, ready to be asked.

    Args:
        task: its spec.
        names: of the examples, each once.
        examples: in order.
        encoded: the token ids of each.
    """

    task: str
    names: list[str]
    examples: list[Example]
    encoded: list[Encoded]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(each.prompt.shape[1] for each in self.encoded)


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Questions,
    rows: list[Row],
    settings: Settings,
    log: RecordLog,
    on_step: Callable[[], None],
) -> None:
    """Puts all rows on all examples on record.

    Args:
        model: a transformers decoder-only model.
        tokenizer: its tokenizer.
        questions: the examples.
        rows: the methods.
        settings: of the evaluation.
        log: where the records go; examples that it has are left out.
        on_step: called after each example that goes on record.
    """
    facts = model_facts(model)
    size = len(questions.examples)
    prompt_bytes = questions.longest * facts.num_layers * facts.num_kv_heads * facts.head_dim * 2 * model.dtype.itemsize
    # Not by the memory that is free, which is not the same in a run that continues another.
    threads = torch.get_num_threads() if model.device.type == "cpu" else 1
    step = max(1, min(_SHARD_SIZE, -(-size // threads)))
    shards = [range(start, min(start + step, size)) for start in range(0, size, step)]
    workers = Workers(model.device, min(len(shards), free_memory(model) // (8 * prompt_bytes)))
    shard = _Shard(model, tokenizer, questions, rows, settings, log, workers.count)
    try:
        # Those on record, too: the number of jobs decides how many cores each of them gets.
        workers.run([partial(shard, columns) for columns in shards], on_step)
    finally:
        workers.close()


@dataclass(frozen=True)
class _Prefilled:
    """An example that has been prefilled; its rows wait to be decoded with others.

    `next_logits` are ``[rows, vocabulary]``.
    """

    column: int
    cache: CompressedCache
    entry_bytes: int
    next_logits: Tensor
    tokens: int
    max_new_tokens: int


class _Shard:
    """Measures all rows on examples computed together; `side_by_side` such calls share the memory."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        questions: Questions,
        rows: list[Row],
        settings: Settings,
        log: RecordLog,
        side_by_side: int,
    ):
        self.model, self.tokenizer, self.questions, self.rows = model, tokenizer, questions, rows
        self.settings, self.log, self.side_by_side = settings, log, side_by_side
        self.end = end_tokens(model, tokenizer)
        facts = model_facts(model)
        self.heads = facts.num_layers * facts.num_kv_heads

    def __call__(self, columns: Sequence[int], step: Callable[[], None]) -> None:
        """Puts the examples `columns` on record, calling `step` after each that was not yet."""
        missing = {column for column in columns if not self._has(column)}
        if not missing:
            return
        prefill = None if self.settings.prefill_chunk is not None else self._prefiller()
        waiting: list[_Prefilled] = []
        for column in columns:
            example = self.questions.examples[column]
            forced = self._metric_of(example) == "logprob"
            # Also of what is on record: the next prompt starts where it differs from this one.
            recorded = None if prefill is None else prefill(self.questions.encoded[column].prompt)
            if forced and column not in missing:
                check_wanted()
                continue
            room = 0 if forced else example.max_new_tokens
            item = self._read(column, room) if recorded is None else self._cut(column, recorded, room)
            if forced:
                self._force(item)
                step()
            else:
                if example.later and waiting:
                    self._generate(waiting, missing, step)
                    waiting.clear()
                waiting.append(item)
                if self._enough(waiting):
                    self._generate(waiting, missing, step)
                    waiting.clear()
            check_wanted()
        if waiting:
            self._generate(waiting, missing, step)

    def _has(self, column: int) -> bool:
        return self.log.has(self.questions.task, self.questions.names[column])

    def _metric_of(self, example: Example) -> str:
        return self.settings.metric or example.metric

    def _prefiller(self) -> Prefiller:
        observers = [observer for row in self.rows for observer in row.method.observers]
        return Prefiller(self.model, [row.selector for row in self.rows], observers)

    def _read(self, column: int, room: int) -> _Prefilled:
        """A compressed cache with one sequence per row, each of which has read the prompt in chunks."""
        chunk = self.settings.prefill_chunk
        assert chunk is not None
        ids = self.questions.encoded[column].prompt
        caches, logits = [], []
        for row in self.rows:
            cache = row.new_cache(self.model, chunk)
            with torch.inference_mode():
                output = self.model(ids, **cache.as_argument, use_cache=True, logits_to_keep=1)
            cache.end_prompt()
            caches.append(cache)
            logits.append(output.logits[:, -1].float())
            check_wanted()
        group = caches[0].kv_layers[0].groups[0]
        merged = CompressedCache.merge(self.model, caches, room)
        return _Prefilled(column, merged, _entry_bytes(group.keys, group.values), torch.cat(logits), ids.shape[1], room)

    def _cut(self, column: int, recorded: RecordedPrompt, room: int) -> _Prefilled:
        """A compressed cache with one sequence per row, cut from one recorded prompt."""
        layers = recorded.cache.kv_layers
        keys_values = [layer.held() for layer in layers]
        rankings = [torch.cat([layer.rankings[row.selector] for row in self.rows]) for layer in layers]
        budgets = np.stack([self._budgets(row, recorded) for row in self.rows])
        selector = self.rows[0].selector
        states = recorded.cache.state_layers
        cache = CompressedCache.from_rankings(self.model, keys_values, rankings, budgets, selector, room, states)
        logits = recorded.next_logits.expand(len(self.rows), -1)
        return _Prefilled(column, cache, _entry_bytes(*keys_values[0]), logits, recorded.tokens, room)

    @staticmethod
    def _budgets(row: Row, recorded: RecordedPrompt) -> np.ndarray:
        if row.budget is None:
            return row.budgets
        layers = recorded.cache.kv_layers
        ceilings = np.array([layer.most_held(recorded.tokens) for layer in layers])
        return row.method.budgets_for([layer.observations for layer in layers], row.budgets, ceilings)

    def _force(self, item: _Prefilled) -> None:
        """The metric logprob."""
        rows = len(self.rows)
        this = self.questions.encoded[item.column]
        assert this.target is not None
        held = item.cache.kv_bytes_by_sequence
        tokens, targets, later = [item.tokens] * rows, [this.target] * rows, [this.later] * rows
        log_probs = target_log_probs(self.model, item.cache, item.next_logits, tokens, targets, later)
        self._record(item, held, [(None, mean_probability(row)) for row in log_probs])

    def _enough(self, waiting: list[_Prefilled]) -> bool:
        """Whether what waits should be decoded now.

        That is with enough rows for one batch, a quarter of the memory in use, or a question to be read first, which
        only rows of one example do together.
        """
        if len(waiting) * len(self.rows) >= _MAX_ROWS or self.questions.examples[waiting[-1].column].later:
            return True
        held = sum(item.cache.kv_bytes for item in waiting)
        return held > free_memory(self.model) // (4 * self.side_by_side)

    def _generate(self, waiting: list[_Prefilled], missing: set[int], step: Callable[[], None]) -> None:
        """Greedy texts and their scores, unless all that waits is on record."""
        if not any(item.column in missing for item in waiting):
            return
        rows = len(self.rows)
        held = [item.cache.kv_bytes_by_sequence for item in waiting]
        room = max(item.max_new_tokens for item in waiting)
        cache = CompressedCache.merge(self.model, [item.cache for item in waiting], room)
        logits = torch.cat([item.next_logits for item in waiting])
        tokens = [item.tokens for item in waiting for _ in range(rows)]
        limits = [item.max_new_tokens for item in waiting for _ in range(rows)]
        later = self.questions.encoded[waiting[0].column].later
        prompts = [self.questions.encoded[item.column].prompt[0] for item in waiting for _ in range(rows)]
        penalty = RepetitionPenalty.of(self.model, prompts, later, logits)
        ids = greedy(self.model, cache, logits, tokens, limits, self.end, later, penalty)
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        for i, item in enumerate(waiting):
            example = self.questions.examples[item.column]
            answers = texts[i * rows : (i + 1) * rows]
            scored = [(text, text_score(self._metric_of(example), text, example)) for text in answers]
            self._record(item, held[i], scored)
            if item.column in missing:
                step()

    def _record(self, item: _Prefilled, held: list[int], answers: Sequence[tuple[str | None, float]]) -> None:
        """Puts one example on record; `answers` are (prediction, score) of each row."""
        questions, column = self.questions, item.column
        example = questions.examples[column]
        common = {
            "task": questions.task,
            "example": questions.names[column],
            "prompt_sha256": sha256(example.prompt + example.later),
            "prompt_tokens": item.tokens,
            "metric": self._metric_of(example),
            "protocol": self.settings.protocol,
            "first_line": example.first_line,
            "stop": list(example.stop),
            "references": list(example.references),
            # As a reader will get it: tuples become lists.
            "extra": json.loads(json.dumps(dict(example.extra))),
        }
        self.log.add(
            [
                Record(
                    **common,
                    method=row.method.name,
                    budget=row.budget,
                    prediction=prediction,
                    score=score,
                    kv_bytes=size,
                    mean_budget=size / item.entry_bytes / self.heads,
                )
                for row, size, (prediction, score) in zip(self.rows, held, answers, strict=True)
            ]
        )


def _entry_bytes(keys: Tensor, values: Tensor) -> int:
    """Bytes of one entry of a KV head."""
    return (keys.shape[-1] + values.shape[-1]) * keys.element_size()
