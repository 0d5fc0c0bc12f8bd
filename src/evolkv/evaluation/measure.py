"""All methods on a task's examples; what is on record already is not measured again.

Each prompt is prefilled once for all methods, unless it is read in chunks: what is evicted early then decides what
later chunks see, and every method has to read the prompt for itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.budgets import Budget, held_in_blocks
from evolkv.cache.compressed import CompressedCache
from evolkv.cache.recording import RecordedPrompt, from_rankings
from evolkv.evaluation.memory import free_memory
from evolkv.evaluation.prefill import Prefiller
from evolkv.evaluation.records import (
    MethodSettings,
    Record,
    RecordLog,
    Settings,
    label,
    prompt_digest,
    prompt_sha256,
    sha256,
)
from evolkv.evaluation.scoring import Answer, Question
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

    `budgets` are ``[layers, kv_heads]``, before any allocator that goes by the prompt; where the budget is a share of
    the prompt, those of the longest that the model can read.
    """

    method: Method
    budget: Budget | None
    budgets: np.ndarray
    selector: Selector

    @property
    def label(self) -> str:
        """See `evolkv.evaluation.records.label`."""
        return label(self.method.name, self.budget)

    def new_cache(self, model: PreTrainedModel, prefill_chunk: int) -> CompressedCache:
        """Return an empty cache that reads a prompt in chunks.

        Raises:
            UsageError: for a method that cannot evict before it has seen the whole prompt.
        """
        method: Method | BudgetProfile = self.method
        if self.method.is_full:
            everything = np.minimum(self.budgets, model_facts(model).max_context)
            method = BudgetProfile.from_budgets(model, everything, selector=self.selector.to_dict())
        return CompressedCache(model, method, self.budget, prefill_chunk=prefill_chunk)

    def seen(self, examples: Mapping[str, Example]) -> list[str]:
        """Return the names of the examples that a profile's search saw, as far as the profile says so."""
        profile = self.method.profile
        digests = set(profile.search.get("seen") or ()) if profile is not None else set()
        return [name for name, example in examples.items() if digests and prompt_digest(example) in digests]

    def describe(self, seen: dict[str, list[str]]) -> MethodSettings:
        """Return what identifies it; `seen` are the examples that its search saw, by task."""
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
            expanded_from=profile.target if profile is not None and profile.target != self.budget else None,
            seen=seen,
        )


@dataclass(frozen=True)
class TaskQuestions:
    """A task's examples, ready to be asked.

    Args:
        task: its spec.
        names: of the examples, each once.
        questions: the examples, in the same order.
    """

    task: str
    names: list[str]
    questions: list[Question]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(each.tokens for each in self.questions)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt."""
        return min(each.tokens for each in self.questions)


def measure(
    model: PreTrainedModel,
    asked: TaskQuestions,
    rows: list[Row],
    settings: Settings,
    log: RecordLog,
    on_step: Callable[[], None],
) -> None:
    """Put all rows on all examples on record.

    Args:
        model: a transformers decoder-only model.
        asked: the examples.
        rows: the methods.
        settings: of the evaluation.
        log: where the records go; examples that it has are left out.
        on_step: called after each example that goes on record.
    """
    facts = model_facts(model)
    size = len(asked.questions)
    prompt_bytes = asked.longest * facts.num_layers * facts.num_kv_heads * facts.head_dim * 2 * model.dtype.itemsize
    # Not by the memory that is free, which is not the same in a run that continues another.
    threads = torch.get_num_threads() if model.device.type == "cpu" else 1
    step = max(1, min(_SHARD_SIZE, -(-size // threads)))
    shards = [range(start, min(start + step, size)) for start in range(0, size, step)]
    workers = Workers(model.device, min(len(shards), free_memory(model) // (8 * prompt_bytes)))
    shard = _Shard(model, asked, rows, settings, log, workers.count)
    try:
        # Those on record, too: the number of jobs decides how many cores each of them gets.
        workers.run([partial(shard, columns) for columns in shards], on_step)
    finally:
        workers.close()


@dataclass(frozen=True)
class _Prefilled:
    """An example that has been prefilled; its rows wait to be decoded with others.

    `next_logits` are ``[rows, vocabulary]``; `new` is the room that the cache has for tokens.
    """

    column: int
    question: Question
    cache: CompressedCache
    entry_bytes: int
    next_logits: Tensor
    new: int


class _Shard:
    """Measures all rows on examples computed together; `side_by_side` such calls share the memory."""

    def __init__(
        self,
        model: PreTrainedModel,
        asked: TaskQuestions,
        rows: list[Row],
        settings: Settings,
        log: RecordLog,
        side_by_side: int,
    ):
        self.model, self.asked, self.rows = model, asked, rows
        self.settings, self.log, self.side_by_side = settings, log, side_by_side
        self.facts = model_facts(model)
        self.heads = self.facts.num_layers * self.facts.num_kv_heads

    def __call__(self, columns: Sequence[int], step: Callable[[], None]) -> None:
        """Put the examples `columns` on record, calling `step` after each that was not yet."""
        missing = {column for column in columns if not self._has(column)}
        if not missing:
            return
        prefill = None if self.settings.prefill_chunk is not None else self._prefiller()
        waiting: list[_Prefilled] = []
        for column in columns:
            question = self.asked.questions[column]
            forced = question.scorer.teacher_forced
            # Also of what is on record: the next prompt starts where it differs from this one.
            recorded = None if prefill is None else prefill(question.prompt)
            if forced and column not in missing:
                check_wanted()
                continue
            if question.scorer.label_free:
                whole = recorded or Prefiller(self.model, [])(question.prompt)
                question = question.scorer.refer(question, whole)
            new = 0 if forced else question.answer_tokens
            cut = self._read(question, new) if recorded is None else self._cut(recorded, new)
            item = _Prefilled(column, question, *cut, new)
            if forced:
                self._score([item], item.cache, missing, step)
            else:
                if len(question.later) and waiting:
                    self._score_together(waiting, missing, step)
                waiting.append(item)
                if self._enough(waiting):
                    self._score_together(waiting, missing, step)
            check_wanted()
        if waiting:
            self._score_together(waiting, missing, step)

    def _has(self, column: int) -> bool:
        return self.log.has(self.asked.task, self.asked.names[column])

    def _prefiller(self) -> Prefiller:
        observers = [observer for row in self.rows for observer in row.method.observers]
        return Prefiller(self.model, [row.selector for row in self.rows], observers)

    def _read(self, question: Question, new: int) -> tuple[CompressedCache, int, Tensor]:
        """Return a compressed cache with one sequence per row, each of which has read the prompt in chunks.

        Behind it the bytes of an entry, and the logits of the next token, ``[rows, vocabulary]``.
        """
        chunk = self.settings.prefill_chunk
        assert chunk is not None
        ids = question.prompt
        caches, logits = [], []
        for row in self.rows:
            cache = row.new_cache(self.model, chunk)
            with torch.inference_mode():
                output = self.model(ids, cache=cache, use_cache=True, logits_to_keep=1)
            cache.end_prompt()
            caches.append(cache)
            logits.append(output.logits[:, -1].float())
            check_wanted()
        group = caches[0].kv_layers[0].groups[0]
        merged = CompressedCache.merge(self.model, caches, new)
        return merged, _entry_bytes(group.keys, group.values), torch.cat(logits)

    def _cut(self, recorded: RecordedPrompt, new: int) -> tuple[CompressedCache, int, Tensor]:
        """Return a compressed cache with one sequence per row, cut from one recorded prompt; see `_read`."""
        layers = recorded.kv_layers
        keys_values = [layer.held() for layer in layers]
        rankings = [torch.cat([layer.rankings[row.selector] for row in self.rows]) for layer in layers]
        budgets = np.stack([self._budgets(row, recorded) for row in self.rows])
        selector = self.rows[0].selector
        cache = from_rankings(self.model, keys_values, rankings, budgets, selector, new, recorded.state_layers)
        logits = recorded.next_logits.expand(len(self.rows), -1)
        return cache, _entry_bytes(*keys_values[0]), logits

    def _budgets(self, row: Row, recorded: RecordedPrompt) -> np.ndarray:
        if row.budget is None:
            return row.budgets
        start = row.budgets if row.method.share is None else row.method.budgets_at(self.facts, recorded.tokens)
        layers = recorded.kv_layers
        ceilings = np.array([layer.most_held(recorded.tokens) for layer in layers])
        budgets = row.method.budgets_for([layer.observations for layer in layers], start, ceilings)
        if self.settings.block_size is None:
            return budgets
        held = held_in_blocks(budgets, recorded.tokens, self.settings.block_size)
        # A server holds the whole window of a layer that has one.
        windows = [window is not None for window in self.facts.sliding_windows]
        held[windows] = ceilings[windows, None]
        return held

    def _enough(self, waiting: list[_Prefilled]) -> bool:
        """Return whether what waits should be decoded now.

        That is with enough rows for one batch, a quarter of the memory in use, or a question to be read first, which
        only rows of one example do together.
        """
        if len(waiting) * len(self.rows) >= _MAX_ROWS or len(self.asked.questions[waiting[-1].column].later):
            return True
        held = sum(item.cache.kv_bytes for item in waiting)
        return held > free_memory(self.model) // (4 * self.side_by_side)

    def _score_together(self, waiting: list[_Prefilled], missing: set[int], step: Callable[[], None]) -> None:
        """Score what waits in one batch, unless all of it is on record."""
        if any(item.column in missing for item in waiting):
            new = max(item.new for item in waiting)
            merged = CompressedCache.merge(self.model, [item.cache for item in waiting], new)
            self._score(waiting, merged, missing, step)
        waiting.clear()

    def _score(
        self, items: list[_Prefilled], cache: CompressedCache, missing: set[int], step: Callable[[], None]
    ) -> None:
        """Score the rows of some examples, which are those of a cache, and put them on record."""
        rows = len(self.rows)
        held = cache.kv_bytes_by_sequence
        questions = [item.question for item in items for _ in range(rows)]
        logits = torch.cat([item.next_logits for item in items])
        answers = questions[0].scorer.score(cache, logits, questions)
        for i, item in enumerate(items):
            own = slice(i * rows, (i + 1) * rows)
            self._record(item, held[own], answers[own])
            if item.column in missing:
                step()

    def _record(self, item: _Prefilled, held: list[int], answers: list[Answer]) -> None:
        """Put one example on record, with the bytes that the cache of each row held and its answer."""
        question, example = item.question, item.question.example
        common = {
            "task": self.asked.task,
            "example": self.asked.names[item.column],
            "prompt_sha256": prompt_sha256(example),
            "prompt_tokens": question.tokens,
            "metric": question.scorer.metric,
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
                    prediction=answer.text,
                    score=answer.score,
                    kv_bytes=size,
                    mean_budget=size / item.entry_bytes / self.heads,
                )
                for row, size, answer in zip(self.rows, held, answers, strict=True)
            ]
        )


def _entry_bytes(keys: Tensor, values: Tensor) -> int:
    """Bytes of one entry of a KV head."""
    return (keys.shape[-1] + values.shape[-1]) * keys.element_size()
