"""All methods on a task's examples; what is on record already is not measured again.

Each prompt is prefilled once for all methods, unless it is read in chunks: what is evicted early then decides what
later chunks see, and every method has to read the prompt for itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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
    seen_by,
    sha256,
)
from evolkv.evaluation.scoring import Question
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

    def new_cache(self, model: PreTrainedModel, prefill_chunk: int | None) -> CompressedCache:
        """Return an empty cache that reads a prompt, in chunks or at once.

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
        digests = seen_by(self.method.profile)
        return [name for name, example in examples.items() if digests and prompt_digest(example) in digests]

    def describe(self, seen: dict[str, list[str]]) -> MethodSettings:
        """Return what identifies it; `seen` are the examples that its search saw, by task."""
        profile, full = self.method.profile, self.budget is None
        return MethodSettings(
            method=self.method.name,
            budget=self.budget,
            budgets_sha256=None if full else sha256(json.dumps(self.budgets.tolist())),
            selector=None if full else self.selector.to_dict(),
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
    # Does not depend on free memory, which is not the same in a run that continues another.
    threads = torch.get_num_threads() if model.device.type == "cpu" else 1
    # Shards of about the same size, equally many for each thread, so that no thread waits long for another.
    rounds = math.ceil(size / (threads * _SHARD_SIZE))
    step = math.ceil(size / (threads * rounds))
    shards = [range(start, min(start + step, size)) for start in range(0, size, step)]
    workers = Workers(model.device, min(len(shards), free_memory(model) // (8 * prompt_bytes)))
    shard = _Shard(model, asked, rows, settings, log, workers.count)
    try:
        # Shards on record count, too: the number of jobs decides how many cores each job gets.
        workers.run([partial(shard, columns) for columns in shards], on_step)
    finally:
        workers.close()


@dataclass(frozen=True)
class _Cut:
    """One prompt in a cache of some rows, one sequence each; `next_logits` are ``[rows, vocabulary]``.

    `prefill_factors` say how many tokens were read for each row and token of the prompt.
    """

    cache: CompressedCache
    entry_bytes: int
    next_logits: Tensor
    prefill_factors: list[float]


@dataclass(frozen=True)
class _Prefilled:
    """An example that has been prefilled, for each part of the rows; it waits to be decoded with others.

    `new` is the room that the caches have for tokens.
    """

    column: int
    question: Question
    parts: list[_Cut]
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
        self.parts = _parts(rows)

    def __call__(self, columns: Sequence[int], step: Callable[[], None]) -> None:
        """Put the examples `columns` on record, calling `step` after each that was not yet."""
        missing = {column for column in columns if not self._has(column)}
        if not missing:
            return
        prefill = self._prefiller()
        waiting: list[_Prefilled] = []
        for column in columns:
            question = self.asked.questions[column]
            forced = question.scorer.teacher_forced
            # Prompts on record are read, too: the next prompt starts where it differs from this one.
            recorded = None if prefill is None else prefill(question.prompt)
            if forced and column not in missing:
                check_wanted()
                continue
            if question.scorer.label_free:
                whole = recorded or Prefiller(self.model, [])(question.prompt)
                question = question.scorer.refer(question, whole)
            new = 0 if forced else question.answer_tokens
            parts = [
                self._read(rows, question, new) if self._reads(rows) else self._cut(rows, recorded, new)
                for rows in self.parts
            ]
            item = _Prefilled(column, question, parts, new)
            if forced:
                self._score([item], [part.cache for part in parts], missing, step)
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

    def _reads(self, rows: list[Row]) -> bool:
        """Return whether each of some rows, which are decoded together, has to read the prompt for itself."""
        return self.settings.prefill_chunk is not None or rows[0].selector.reads_for_itself

    def _prefiller(self) -> Prefiller | None:
        """Return what prefills each prompt once, for the rows that can share it; None where no row can."""
        rows = [row for part in self.parts if not self._reads(part) for row in part]
        observers = [observer for row in rows for observer in row.method.observers]
        return Prefiller(self.model, [row.selector for row in rows], observers) if rows else None

    def _read(self, rows: list[Row], question: Question, new: int) -> _Cut:
        """Return a compressed cache with one sequence per row, each of which has read the prompt for itself."""
        ids = question.prompt
        caches, logits = [], []
        for row in rows:
            cache = row.new_cache(self.model, self.settings.prefill_chunk)
            with torch.inference_mode():
                output = self.model(ids, cache=cache, use_cache=True, logits_to_keep=1)
            cache.end_prompt()
            caches.append(cache)
            logits.append(output.logits[:, -1].float())
            check_wanted()
        group = caches[0].kv_layers[0].groups[0]
        merged = CompressedCache.merge(self.model, caches, new)
        factors = [cache.prefill_factor for cache in caches]
        return _Cut(merged, _entry_bytes(group.keys, group.values), torch.cat(logits), factors)

    def _cut(self, rows: list[Row], recorded: RecordedPrompt | None, new: int) -> _Cut:
        """Return a compressed cache with one sequence per row, cut from one recorded prompt."""
        assert recorded is not None
        layers = recorded.kv_layers
        keys_values = [layer.held() for layer in layers]
        rankings = [torch.cat([layer.rankings[row.selector] for row in rows]) for layer in layers]
        budgets = np.stack([self._budgets(row, recorded) for row in rows])
        selector = rows[0].selector
        cache = from_rankings(self.model, keys_values, rankings, budgets, selector, new, recorded.state_layers)
        logits = recorded.next_logits.expand(len(rows), -1)
        factors = [recorded.prefill_factor(row.selector) for row in rows]
        return _Cut(cache, _entry_bytes(*keys_values[0]), logits, factors)

    def _budgets(self, row: Row, recorded: RecordedPrompt) -> np.ndarray:
        if row.budget is None:
            return row.budgets
        start = row.budgets if row.method.share is None else row.method.budgets_at(self.facts, recorded.tokens)
        layers = recorded.kv_layers
        ceilings = self.facts.most_held(recorded.tokens)
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
        held = sum(part.cache.kv_bytes for item in waiting for part in item.parts)
        return held > free_memory(self.model) // (4 * self.side_by_side)

    def _score_together(self, waiting: list[_Prefilled], missing: set[int], step: Callable[[], None]) -> None:
        """Score what waits in one batch, unless all of it is on record."""
        if any(item.column in missing for item in waiting):
            new = max(item.new for item in waiting)
            caches = [
                CompressedCache.merge(self.model, [item.parts[number].cache for item in waiting], new)
                for number in range(len(self.parts))
            ]
            self._score(waiting, caches, missing, step)
        waiting.clear()

    def _score(
        self, items: list[_Prefilled], caches: list[CompressedCache], missing: set[int], step: Callable[[], None]
    ) -> None:
        """Score the rows of some examples, those of each part in a cache, and put them on record."""
        shared = [self._shared(item) for item in items]
        found: list[list[Record]] = [[] for _ in items]
        for number, (rows, cache) in enumerate(zip(self.parts, caches, strict=True)):
            # Now, because scoring uses the cache up.
            sizes = list(
                zip(
                    cache.kv_bytes_by_sequence,
                    cache.read_bytes_by_sequence,
                    cache.companion_bytes_by_sequence,
                    cache.prefill_share_by_sequence,
                    strict=True,
                )
            )
            questions = [item.question for item in items for _ in rows]
            logits = torch.cat([item.parts[number].next_logits for item in items])
            answers = questions[0].scorer.score(cache, logits, questions)
            for place, ((held, read, companion, share), answer) in enumerate(zip(sizes, answers, strict=True)):
                example, row = divmod(place, len(rows))
                parts = items[example].parts
                found[example].append(
                    Record(
                        **shared[example],
                        method=rows[row].method.name,
                        budget=rows[row].budget,
                        prediction=answer.text,
                        score=answer.score,
                        kv_bytes=held,
                        read_bytes=read,
                        companion_bytes=companion,
                        mean_budget=held / parts[0].entry_bytes / self.heads,
                        prefill_share=share,
                        prefill_factor=parts[number].prefill_factors[row],
                    )
                )
        for item, records in zip(items, found, strict=True):
            self.log.add(records)
            if item.column in missing:
                step()

    def _shared(self, item: _Prefilled) -> dict[str, Any]:
        """Return what the records of an example have in common."""
        question, example = item.question, item.question.example
        return {
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


def _parts(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows that are decoded together: those under selectors with layers of their own stand apart."""
    parts: dict[Selector | None, list[Row]] = {}
    for row in rows:
        parts.setdefault(None if row.selector.layer is None else row.selector, []).append(row)
    return [*parts.values()]


def _entry_bytes(keys: Tensor, values: Tensor) -> int:
    """Bytes of one entry of a KV head."""
    return (keys.shape[-1] + values.shape[-1]) * keys.element_size()
