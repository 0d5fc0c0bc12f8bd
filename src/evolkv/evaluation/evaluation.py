"""Compare methods on the same examples: each prompt is prefilled once for all methods and budgets."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from evolkv.budgets import Budget, BudgetSpec, Share, read_budgets
from evolkv.cache.hook import own_attention
from evolkv.errors import BudgetError, UsageError, enough_memory
from evolkv.evaluation.measure import Row, TaskQuestions, measure
from evolkv.evaluation.records import (
    ModelSettings,
    RecordLog,
    Settings,
    TaskSettings,
    versions,
    warn_of_seen,
)
from evolkv.evaluation.scoring import encode_examples
from evolkv.evaluation.summary import summarise
from evolkv.methods import Method, MethodSpec, get_methods
from evolkv.models import describe_model
from evolkv.models.forward import without_dropout
from evolkv.numbers import is_several, is_whole, plain
from evolkv.selectors import get_selector
from evolkv.tasks import Example, Task, fingerprint, format_spec, get_tasks
from evolkv.tasks.check import warn_of_short_answers
from evolkv.tasks.metrics import check_metric
from evolkv.tasks.protocol import AWARE, draw_examples

logger = logging.getLogger(__name__)

#: More examples of a task than any evaluation takes; generated ones are all drawn first.
MOST_SAMPLES = 100_000


@dataclass(frozen=True)
class EvaluationProgress:
    """Progress of an evaluation: examples `done` of `total`, over all tasks; `recorded` ones were done before."""

    done: int
    total: int
    recorded: int = 0


class EvaluationInterrupted(KeyboardInterrupt):
    """KeyboardInterrupt in the course of an evaluation, with what was finished.

    Args:
        rows: as `evaluate` returns them, over the examples that all methods are done with.
        total: number of examples, over all tasks.
    """

    def __init__(self, rows: list[dict[str, Any]], total: int):
        super().__init__()
        self.rows, self.total = rows, total

    @property
    def finished(self) -> int:
        """Number of examples that all methods are done with, over all tasks."""
        return sum({row["task"]: row["n"] for row in self.rows}.values())


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    task: str | Task | Sequence[str | Task],
    methods: MethodSpec | Iterable[MethodSpec],
    budgets: BudgetSpec | Iterable[BudgetSpec] = (),
    samples: int = 50,
    seed: int = 0,
    metric: str | None = None,
    protocol: str = AWARE,
    prefill_chunk: int | None = None,
    block_size: int | None = None,
    sample_ids: str | Sequence[str] | None = None,
    records: str | os.PathLike[str] | None = None,
    on_progress: Callable[[EvaluationProgress], None] | None = None,
) -> list[dict[str, Any]]:
    """Score methods at several budgets on held-out examples.

    Every example is prefilled once. For each method and budget a compressed cache is then cut from that prefill, with
    exactly the entries it may hold, and continued. With `prefill_chunk` each method reads the prompt for itself.

    Args:
        model: a transformers decoder-only model.
        tokenizer: its tokenizer.
        task: one or more tasks or specs; examples come from their "report" split.
        methods: one or more, as `evolkv.methods.get_method` takes them: names, profiles, paths of profiles, ….
        budgets: one mean budget or more: cache entries per KV head, or shares of each prompt, such as ``"10%"``. Needed
            for every method but ``full``, profiles and names with a ratio, which have their own; a profile is expanded
            to each budget given.
        samples: examples per task.
        seed: of the examples.
        metric: a text metric, "logprob", "fidelity" or "agreement"; default: the task's own.
        protocol: "aware" (the question is in the prompt that is compressed) or "agnostic" (the context is compressed
            before the question is seen); see `evolkv.tasks.protocol`.
        prefill_chunk: tokens of the chunks in which prompts are read, evicting after each, as `CompressedCache` does;
            a prefill per method and example. Default: all at once.
        block_size: tokens of the blocks of a server that the budgets are meant for: budgets are rounded up as it rounds
            them (`evolkv.budgets.held_in_blocks`). Not with `prefill_chunk`. Default: each budget to the entry.
        sample_ids: one or more ids of examples to evaluate, of those that `samples` draws, or several joined with
            commas; default: all.
        records: path of a file that every example's record goes to as it finishes; see `evolkv.evaluation.records`. If
            the file is there, examples that it holds are not evaluated again.
        on_progress: called after each example, and first with what is on record already, if anything is;
            `evolkv.progress_bar()` draws it.

    Returns:
        One row per task, method and budget: ``model, task, method, budget, n, metric, score, ci95, kv_bytes,
        mean_budget, prefill_factor, seed, protocol, dtype``, and where there is one ``haystack`` (what needles hide
        in), ``prefill_chunk``, ``block_size``, ``prefill_share`` (what a method leaves of the prefill's computation),
        ``expanded_from`` (the budget that a profile was found at), ``seen`` (how many of the examples a profile was
        evolved or chosen on) and ``bins`` (number and score of the examples in each bin of length). `score` and `ci95`
        are in [0, 1]; `kv_bytes` and `mean_budget` are what the cache held after prefill, averaged over examples (and
        heads); ``read_bytes`` is what the attention of one generated token reads of it. With a companion model both
        include its cache; ``companion_bytes`` is that alone, and ``resident_bytes`` what a step needs of the model's
        own. `prefill_factor` says how many tokens the model read for each of the prompt's, above 1 where a selector has
        it read the prompt again.

    Raises:
        UsageError: for settings that cannot be used, or that are not those of the records.
        RunError: if memory does not suffice, or the records cannot be written.
        EvaluationInterrupted: on KeyboardInterrupt; it is one itself, and has the rows of what was finished.
    """
    samples, seed, prefill_chunk, block_size = map(plain, (samples, seed, prefill_chunk, block_size))
    tasks = get_tasks(task)
    chosen, at = get_methods(methods), read_budgets(budgets)
    if not chosen:
        raise UsageError("nothing to evaluate: give at least one method")
    check_request(chosen, at, samples, metric)
    if not is_whole(seed):
        raise UsageError(f"--seed is {seed!r}; expected a whole number")
    _check_blocks(block_size, prefill_chunk)
    rows = _rows(model, chosen, at)
    for row in rows:
        if prefill_chunk is not None or row.selector.reads_for_itself:
            # Refuses a method that cannot read prompts in this way, before any prompt is read.
            row.new_cache(model, prefill_chunk)
    haystacks = {format_spec(each): each.haystack_used() for each in tasks}
    drawn = {format_spec(each): draw_examples(each, "report", samples, tokenizer, seed, protocol) for each in tasks}
    named = {spec: dict(zip(_distinct(part), part, strict=True)) for spec, part in drawn.items()}
    if sample_ids is not None:
        sample_ids = _chosen(named, [sample_ids] if isinstance(sample_ids, str) else sample_ids)
        named = {
            spec: {name: each for name, each in part.items() if name in sample_ids} for spec, part in named.items()
        }
        named = {spec: part for spec, part in named.items() if part}
    seen = {row.label: _seen(row, tasks, named) for row in rows}
    asked = []
    for spec, part in named.items():
        questions = encode_examples(tokenizer, model, list(part.values()), metric)
        warn_of_short_answers(tokenizer, list(part.values()), metric)
        asked.append(TaskQuestions(spec, list(part), questions))
        _check_budgets(asked[-1], rows)
    settings = Settings(
        model=_describe(model),
        metric=metric,
        protocol=protocol,
        prefill_chunk=prefill_chunk,
        block_size=block_size,
        seed=seed,
        samples=samples,
        sample_ids=None if sample_ids is None else list(sample_ids),
        methods={row.label: row.describe(seen[row.label]) for row in rows},
        tasks={
            each.task: TaskSettings(
                fingerprint=fingerprint(question.example for question in each.questions),
                examples=each.names,
                haystack=haystacks[each.task],
            )
            for each in asked
        },
        versions=versions(),
    )
    total = sum(len(each.names) for each in asked)
    log = RecordLog.open(records, settings)
    recorded = sum(log.has(each.task, name) for each in asked for name in each.names)
    done = recorded

    def advance() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(EvaluationProgress(done, total, recorded))

    try:
        if recorded and on_progress is not None:
            on_progress(EvaluationProgress(recorded, total, recorded))
        less = "fewer methods and budgets at once, shorter prompts and --prefill-chunk take less"
        kept = f"; finished examples are in {records}, and the same command goes on from there" if records else ""
        with enough_memory("in the evaluation", f"{less}{kept}"), without_dropout(model):
            for each in asked:
                measure(model, each, rows, settings, log, advance)
    except KeyboardInterrupt:
        raise EvaluationInterrupted(summarise(log.records), total) from None
    finally:
        log.close()
    return summarise(log.records)


def check_request(methods: Sequence[Method], budgets: Sequence[Budget], samples: int, metric: str | None) -> None:
    """Raise `UsageError` for a request that is seen to be wrong before there is a model."""
    if metric is not None:
        check_metric(metric)
    if not is_whole(samples) or not 1 <= samples <= MOST_SAMPLES:
        raise UsageError(f"--samples is {samples!r}; expected 1 to {MOST_SAMPLES:,} examples per task")
    for method in methods:
        if not (method.is_full or method.target or budgets):
            raise UsageError(f"method {method.name!r} needs a budget; give one with --budget")
        for budget in budgets:
            method.at(budget)


def _check_blocks(block_size: int | None, prefill_chunk: int | None) -> None:
    if block_size is None:
        return
    if not is_whole(block_size) or block_size < 1:
        raise UsageError(f"--block-size is {block_size!r}; expected the tokens of a server's block, such as 32")
    if prefill_chunk is not None:
        raise UsageError(
            "--block-size and --prefill-chunk are both given, but a server with blocks evicts once, after the prompt; "
            "leave one of them out"
        )


def _rows(model: PreTrainedModel, methods: Sequence[Method], budgets: Sequence[Budget]) -> list[Row]:
    info = describe_model(model)
    everything = np.full((info.num_layers, info.num_kv_heads), np.iinfo(np.int32).max, dtype=np.int64)
    rows: dict[str, Row] = {}
    for method in methods:
        if method.is_full:
            _add(rows, Row(method, None, everything, get_selector("streaming_llm")))
            continue
        for budget in budgets or ([method.target] if method.target is not None else []):
            if isinstance(budget, int) and budget > info.max_context:
                raise BudgetError(
                    f"the budget is {budget}, above the model's context of {info.max_context} tokens; use a smaller one"
                )
            chosen, matrix = method.resolve(model, budget)
            assert chosen.selector is not None
            _add(rows, Row(chosen, budget, matrix, chosen.selector))
    return list(rows.values())


def _seen(row: Row, tasks: Sequence[Task], named: Mapping[str, Mapping[str, Example]]) -> dict[str, list[str]]:
    """Return the examples of each task that a profile was evolved or chosen on, with a warning where there are any."""
    seen = {spec: names for spec, part in named.items() if (names := row.seen(part))}
    for spec, names in seen.items():
        warn_of_seen(row.label, len(names), len(named[spec]), spec)
    profile = row.method.profile
    if profile is None or "seen" in profile.search:
        return seen
    # An older profile does not name its examples. They may be among these if all splits of a task are one.
    for spec in (format_spec(task) for task in tasks if getattr(task, "split", None) == "all"):
        if spec in str(profile.search.get("task", "")).split(" && "):
            logger.warning("%s was evolved on rows of %s, some of which it may be judged by here", row.label, spec)
    return seen


def _add(rows: dict[str, Row], row: Row) -> None:
    """Take a row, once; two that differ cannot go by one name."""
    first = rows.setdefault(row.label, row)
    if first.selector != row.selector or not np.array_equal(first.budgets, row.budgets):
        raise UsageError(f"two different methods are called {row.label}; give one of them another name")


def _distinct(examples: Sequence[Example]) -> list[str]:
    """Return a name for each example: its id, with a number where an earlier one has the same."""
    names: dict[str, None] = {}
    for example in examples:
        name, number = example.id, 1
        while name in names:
            number += 1
            name = f"{example.id}#{number}"
        names[name] = None
    return list(names)


def _chosen(named: dict[str, dict[str, Example]], words: Sequence[str]) -> list[str]:
    """Return the ids that words stand for, such as ``["a,b", "c"]``, each once, in their order.

    Raises:
        UsageError: for what is no id, an id that no task has, or none at all.
    """
    if not is_several(words) or not all(isinstance(word, str) for word in words):
        raise UsageError(f"--sample-ids is {words!r:.60}; expected ids of examples, which are texts")
    every_id = {name for part in named.values() for name in part}
    # A comma may also be part of an id.
    ids = [part for word in words for part in ([word] if word in every_id else map(str.strip, word.split(","))) if part]
    for wanted in ids:
        if wanted not in every_id:
            near = difflib.get_close_matches(wanted, sorted(every_id), n=1, cutoff=0)
            raise UsageError(
                f"unknown example {wanted!r}. Did you mean {near[0]!r}? --samples draws {len(every_id)}, "
                "and --sample-ids chooses among these"
            )
    if not ids:
        raise UsageError("no examples are chosen; give --sample-ids at least one id")
    return list(dict.fromkeys(ids))


def _check_budgets(questions: TaskQuestions, rows: Sequence[Row]) -> None:
    for row in rows:
        if isinstance(row.budget, Share):
            least, kept = row.selector.min_budget, row.budget.of(questions.shortest)
            if kept < least:
                logger.warning(
                    "%s of the shortest prompt of %s is %d of %d tokens; %s always keeps %d, and so holds more there",
                    *(row.budget, questions.task, kept, questions.shortest, row.method.name, least),
                )
        elif row.budget is not None and row.budget >= questions.longest:
            raise BudgetError(
                f"the budget is {row.budget}, but the longest prompt of {questions.task} has {questions.longest} "
                f"tokens: nothing would be evicted; use a --budget below {questions.longest}"
            )


def _describe(model: PreTrainedModel) -> ModelSettings:
    info = describe_model(model)
    return ModelSettings(
        name=info.name,
        fingerprint=info.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        attention=own_attention(model),
        device=model.device.type,
    )
