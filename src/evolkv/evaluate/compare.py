"""Methods side by side on the same examples: each prompt is prefilled once for all methods and budgets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.cache.compressed import CompressedCache
from evolkv.errors import BudgetError, UsageError
from evolkv.evaluate.decode import end_tokens, greedy, target_log_probs
from evolkv.evaluate.engine import encode_prompts, encode_target, free_memory, mean_probability, text_score
from evolkv.evaluate.intervals import ci95
from evolkv.evaluate.methods import Method, get_method
from evolkv.evaluate.prefill import Prefiller, RecordedPrompt
from evolkv.evaluate.workers import Workers
from evolkv.models import describe_model
from evolkv.registry import unknown_name
from evolkv.selectors import Selector, get_selector
from evolkv.tasks import Example, Task, format_spec, get_task
from evolkv.tasks.metrics import METRIC_NAMES

# Rows decoded at once; more gains little, since the weights are then read for enough rows.
_MAX_ROWS = 64


@dataclass(frozen=True)
class EvaluationProgress:
    """Where an evaluation stands: examples `done` of `total`, over all tasks."""

    done: int
    total: int


@dataclass(frozen=True)
class _Row:
    """One line of the result: a method at a budget."""

    method: Method
    budget: int | None
    budgets: np.ndarray
    selector: Selector


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    task: str | Task | Sequence[str | Task],
    methods: Sequence[str | Method],
    budgets: Sequence[int] = (),
    samples: int = 50,
    seed: int = 0,
    metric: str | None = None,
    on_progress: Callable[[EvaluationProgress], None] | None = None,
) -> list[dict[str, Any]]:
    """Scores methods at several budgets on held-out examples.

    Every example is prefilled once. For each method and budget a compressed cache is then cut from that prefill, with
    exactly the entries it may hold, and continued.

    Args:
        model: a transformers decoder-only model.
        tokenizer: its tokenizer.
        task: one or more tasks or specs; examples come from their "report" split.
        methods: see `get_method`.
        budgets: mean budgets. Needed for every method but ``full`` and profiles, which have their own; a profile is
            expanded to each budget given.
        samples: examples per task.
        seed: of the examples.
        metric: a text metric or "logprob"; default: the task's own.
        on_progress: called after each example.

    Returns:
        One row per task, method and budget: ``model, task, method, budget, n, metric, score, ci95, kv_bytes,
        mean_budget, seed``; `score` and `ci95` in [0, 1]; `kv_bytes` and `mean_budget` are what the cache held after
        prefill, averaged over examples (and heads).

    Raises:
        UsageError: for settings that cannot be used.
    """
    tasks = [get_task(t) for t in ([task] if isinstance(task, (str, Task)) else task)]
    chosen = [get_method(m) if isinstance(m, str) else m for m in methods]
    if not tasks or not chosen:
        raise UsageError("nothing to evaluate: give at least one task and one method")
    if metric is not None and metric not in METRIC_NAMES:
        raise unknown_name("metric", metric, METRIC_NAMES)
    if samples < 1:
        raise UsageError(f"--samples is {samples}; use at least one example")
    rows = _rows(model, chosen, budgets)
    examples = [t.examples("report", samples, tokenizer, seed) for t in tasks]
    total = sum(len(part) for part in examples)
    results: list[dict[str, Any]] = []
    done = 0
    for each, part in zip(tasks, examples, strict=True):

        def advance(count: int, before: int = done) -> None:
            if on_progress is not None:
                on_progress(EvaluationProgress(before + count, total))

        results += _evaluate_task(model, tokenizer, each, part, rows, metric, seed, advance)
        done += len(part)
    return results


def _rows(model: PreTrainedModel, methods: Sequence[Method], budgets: Sequence[int]) -> list[_Row]:
    info = describe_model(model)
    everything = np.full((info.num_layers, info.num_kv_heads), np.iinfo(np.int32).max, dtype=np.int64)
    rows = []
    for method in methods:
        if method.selector is None:
            rows.append(_Row(method, None, everything, get_selector("streaming_llm")))
            continue
        if method.profile is not None:
            method.profile.check_model(model)
        at = list(budgets) or ([method.profile.budget] if method.profile is not None else [])
        if not at:
            raise UsageError(f"method {method.name!r} needs a budget; give one with --budget")
        for budget in at:
            if budget > info.max_context:
                raise BudgetError(
                    f"the budget is {budget}, above the model's context of {info.max_context} tokens; use a smaller one"
                )
            rows.append(_Row(method, int(budget), method.budgets(model, int(budget)), method.selector))
    return rows


def _evaluate_task(
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    examples: list[Example],
    rows: list[_Row],
    metric: str | None,
    seed: int,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    info = describe_model(model)
    prompts = encode_prompts(tokenizer, model, examples)
    longest = max(ids.shape[1] for ids in prompts)
    for row in rows:
        if row.budget is not None and row.budget >= longest:
            raise BudgetError(
                f"the budget is {row.budget}, but the longest prompt of {format_spec(task)} has {longest} tokens: "
                f"nothing would be evicted; use a --budget below {longest}"
            )
    prompt_bytes = longest * info.num_layers * info.num_kv_heads * info.head_dim * 2 * model.dtype.itemsize
    workers = Workers(model.device, min(len(examples), free_memory(model.device) // (8 * prompt_bytes)))
    # Neighbours share prefill, so each worker gets a stretch.
    stretches = [part.tolist() for part in np.array_split(np.arange(len(examples)), workers.count)]
    run = _Run(model, tokenizer, examples, prompts, rows, metric, workers.count)
    steps = itertools.count(1)
    parts = workers.run([partial(run, columns) for columns in stretches], lambda: advance(next(steps)))
    workers.close()
    scores = np.concatenate([part.scores for part in parts], axis=1)
    held = np.concatenate([part.held for part in parts], axis=1)
    heads = info.num_layers * info.num_kv_heads
    results = []
    for i, row in enumerate(rows):
        result = {
            "model": info.name,
            "task": format_spec(task),
            "method": row.method.name,
            "budget": row.budget,
            "n": len(examples),
            "metric": metric or examples[0].metric,
            "score": float(scores[i].mean()),
            "ci95": list(ci95(scores[i])),
            "kv_bytes": float(held[i].mean()),
            "mean_budget": float(held[i].mean() / parts[0].entry_bytes / heads),
            "seed": seed,
        }
        if row.method.profile is not None and row.method.profile.budget != row.budget:
            result["expanded_from"] = row.method.profile.budget
        results.append(result)
    return results


@dataclass(frozen=True)
class _Prefilled:
    """An example whose rows wait to be decoded with others."""

    column: int
    cache: CompressedCache
    next_logits: Tensor
    tokens: int
    max_new_tokens: int


@dataclass(frozen=True)
class _Measured:
    """What a run found, by row and example: scores, and bytes held after prefill."""

    scores: np.ndarray
    held: np.ndarray
    entry_bytes: int


class _Run:
    """Evaluates all rows on some of the examples, one after another; `side_by_side` such calls share the memory."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        examples: list[Example],
        prompts: list[Tensor],
        rows: list[_Row],
        metric: str | None,
        side_by_side: int,
    ):
        self.model, self.tokenizer, self.rows, self.metric = model, tokenizer, rows, metric
        self.examples, self.prompts, self.side_by_side = examples, prompts, side_by_side
        self.end = end_tokens(model, tokenizer)

    def __call__(self, columns: list[int], step: Callable[[], None]) -> _Measured:
        """Scores the examples `columns`, calling `step` after each."""
        prefill = Prefiller(self.model, [row.selector for row in self.rows])
        scores: dict[int, list[float]] = {}
        held, entry_bytes = [], 0
        waiting: list[_Prefilled] = []
        for column in columns:
            example = self.examples[column]
            recorded = prefill(self.prompts[column])
            forced = self._metric_of(example) == "logprob"
            cache = self._cut(recorded, 0 if forced else example.max_new_tokens)
            held.append([cache.kv_bytes_of(i) for i in range(len(self.rows))])
            key, value = recorded.cache.layers[0].held()
            entry_bytes = (key.shape[-1] + value.shape[-1]) * key.element_size()
            if forced:
                scores[column] = self._force(example, recorded, cache)
            else:
                waiting.append(_Prefilled(column, cache, recorded.next_logits, recorded.tokens, example.max_new_tokens))
                if self._enough(waiting):
                    scores |= self._generate(waiting)
                    waiting.clear()
            step()
        if waiting:
            scores |= self._generate(waiting)
        return _Measured(np.array([scores[column] for column in columns]).T, np.array(held).T, entry_bytes)

    def _metric_of(self, example: Example) -> str:
        return self.metric or example.metric

    def _cut(self, recorded: RecordedPrompt, room: int) -> CompressedCache:
        """A compressed cache with one sequence per row, cut from one recorded prompt."""
        layers = recorded.cache.layers
        keys_values = [layer.held() for layer in layers]
        rankings = [torch.cat([layer.rankings[row.selector] for row in self.rows]) for layer in layers]
        budgets = np.stack([row.budgets for row in self.rows])
        selector = self.rows[0].selector
        return CompressedCache.from_rankings(self.model, keys_values, rankings, budgets, selector, room)

    def _force(self, example: Example, recorded: RecordedPrompt, cache: CompressedCache) -> list[float]:
        """The metric logprob, by row."""
        rows = len(self.rows)
        target = encode_target(self.tokenizer, example)
        logits = recorded.next_logits.expand(rows, -1)
        log_probs = target_log_probs(self.model, cache, logits, [recorded.tokens] * rows, [target] * rows)
        return [mean_probability(row) for row in log_probs]

    def _enough(self, waiting: list[_Prefilled]) -> bool:
        """Whether what waits should be decoded now: enough rows for one batch, or a quarter of the memory in use."""
        if len(waiting) * len(self.rows) >= _MAX_ROWS:
            return True
        held = sum(item.cache.kv_bytes for item in waiting)
        return held > free_memory(self.model.device) // (4 * self.side_by_side)

    def _generate(self, waiting: list[_Prefilled]) -> dict[int, list[float]]:
        """Scores of greedy texts, by example and row."""
        rows = len(self.rows)
        room = max(item.max_new_tokens for item in waiting)
        cache = CompressedCache.merge(self.model, [item.cache for item in waiting], room)
        logits = torch.cat([item.next_logits.expand(rows, -1) for item in waiting])
        tokens = [item.tokens for item in waiting for _ in range(rows)]
        limits = [item.max_new_tokens for item in waiting for _ in range(rows)]
        ids = greedy(self.model, cache, logits, tokens, limits, self.end)
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        scores = {}
        for i, item in enumerate(waiting):
            example = self.examples[item.column]
            answers = texts[i * rows : (i + 1) * rows]
            scores[item.column] = [text_score(self._metric_of(example), text, example) for text in answers]
        return scores
