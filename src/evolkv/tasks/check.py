"""Check that a model can be asked a task's examples, before its weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from evolkv.errors import UsageError
from evolkv.models.facts import longest_context
from evolkv.tasks.base import Example, Split, Task
from evolkv.tasks.metrics import LABEL_FREE, MODEL_METRICS, get_metric, judged_part
from evolkv.tasks.prompts import encode_text
from evolkv.tasks.protocol import draw_examples
from evolkv.tasks.rows import answers_score, check_answers

log = logging.getLogger(__name__)


def check_examples(
    tasks: Sequence[Task],
    splits: Mapping[Split, int | None],
    tokenizer: Any,
    config: Any,
    *,
    metric: str | None,
    protocol: str,
    seed: int,
) -> None:
    """Draw an example of each task and kind for each split, and check that the model can be asked it.

    Args:
        tasks: the tasks.
        splits: those that examples will be drawn for, and how many of each task; None where that is not known yet.
        tokenizer: the model's.
        config: the model's.
        metric: judges all examples; None for each example's own.
        protocol: how examples are asked.
        seed: of the examples.

    Raises:
        UsageError: a split is empty, or has too few examples for several tasks; a prompt and its answer exceed the
            model's context; or the metric cannot judge an example, or gives its own answer 0.
        RunError: a task's own code fails.
    """
    context = longest_context(config.get_text_config(decoder=True))
    for task in tasks:
        for split, count in splits.items():
            # One example of each kind that `count` examples include.
            most = task.kinds if count is None else min(count, task.kinds)
            for example in draw_examples(task, split, most, tokenizer, seed, protocol):
                name = metric or example.metric
                check_labelled(example, name)
                answer = 1 if name == "logprob" else example.max_new_tokens
                check_judged(example, name)
                tokens = len(encode_text(tokenizer, example.prompt + example.later))
                check_room(example, tokens, answer, context)


def check_labelled(example: Example, metric: str) -> None:
    """Raise UsageError if an example lacks what a metric compares with: a reference, or room for the model's answer."""
    if metric in LABEL_FREE:
        if example.max_new_tokens < 1:
            raise UsageError(
                f"example {example.id}: max_new_tokens is 0, and metric {metric!r} compares with the model's own "
                "answer; give at least 1"
            )
    elif not example.references:
        raise UsageError(
            f"example {example.id} has no reference answer, and metric {metric!r} compares with one; "
            f"use --metric {' or '.join(LABEL_FREE)}"
        )


def check_judged(example: Example, metric: str) -> None:
    """Raise UsageError if a metric lacks what it needs of an example, or gives its own answers 0.

    What answers score under the example's own metric is for its task to check.
    """
    where = f"example {example.id}"
    if metric != example.metric:
        check_answers(metric, example.references, where, example.extra, example.stop, example.first_line)
    elif metric not in MODEL_METRICS:
        try:
            get_metric(metric)("", example.references, **example.extra)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None


def warn_of_short_answers(tokenizer: Any, examples: Sequence[Example], metric: str | None) -> None:
    """Warn of examples whose answers are longer than what the model may generate, so that none can score.

    Args:
        tokenizer: the model's.
        examples: what is asked.
        metric: judges all; None for each example's own.
    """
    short = [each.id for each in examples if _is_cut_short(tokenizer, each, metric or each.metric)]
    if short:
        log.warning(
            "max_new_tokens ends the right answers of %d of %d examples (such as %s) before they can score; raise it",
            len(short),
            len(examples),
            short[0],
        )


def _is_cut_short(tokenizer: Any, example: Example, metric: str) -> bool:
    if metric in MODEL_METRICS:
        return False
    every_id = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in example.references]
    if any(len(ids) <= example.max_new_tokens for ids in every_id):
        return False
    texts = [tokenizer.decode(ids[: example.max_new_tokens], skip_special_tokens=True) for ids in every_id]
    judged = [judged_part(text, example.stop, example.first_line) for text in texts]
    return not answers_score(metric, example.references, f"example {example.id}", example.extra, judged)


def check_room(example: Example, tokens: int, answer: int, context: int) -> None:
    """Raise UsageError if a prompt of so many tokens and its answer exceed the model's context."""
    if tokens + answer > context:
        raise UsageError(
            f"example {example.id}: the prompt has {tokens} tokens and its answer up to {answer}, more than the "
            f"model's context of {context}; use a shorter context or a model with a longer one"
        )
