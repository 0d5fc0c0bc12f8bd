"""What an engine is: it turns candidates into scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, SupportsFloat

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.errors import RunError, UsageError
from evolkv.models import model_facts
from evolkv.models.forward import check_token_ids, input_device
from evolkv.tasks import Example
from evolkv.tasks.metrics import get_metric
from evolkv.tasks.prompts import encode_text

#: Called with (done, total) as examples are prepared.
Progress = Callable[[int, int], None]


class Engine(Protocol):
    """Scores candidates on a fixed set of examples under one metric."""

    def score(self, budgets: np.ndarray, columns: Sequence[int] | None = None) -> np.ndarray:
        """Scores every candidate on every example, or on some.

        Args:
            budgets: ``[candidates, layers, kv_heads]`` int.
            columns: numbers of the examples to score on, in ascending order; None for all.

        Returns:
            ``[candidates, examples]`` float64 in [0, 1].
        """
        ...

    def close(self) -> None:
        """Frees what is held for further calls."""
        ...


@dataclass(frozen=True)
class Encoded:
    """The token ids of an example.

    Args:
        prompt: ``[1, tokens]`` int64.
        later: of what is read after the prompt was compressed, ``[question]`` int64; most often none.
        target: of the reference answer as it continues the text, ``[target]`` int64, where its probability is the
            score; None under a text metric.
    """

    prompt: Tensor
    later: Tensor
    target: Tensor | None


def encode_example(tokenizer: Any, example: Example, metric: str | None = None) -> Encoded:
    """The token ids of an example, scored by a metric, or its own.

    Raises:
        UsageError: if the answer has no tokens, and its probability is asked for.
    """
    prompt = encode_text(tokenizer, example.prompt)
    before, known = example.prompt, prompt
    later: list[int] = []
    if example.later:
        before += example.later
        later, known = _continued(tokenizer, prompt, before, example.later)
    target = None
    if (metric or example.metric) == "logprob":
        target, _ = _continued(tokenizer, known, before + example.target, example.target)
        if not target:
            raise UsageError(f"example {example.id}: the reference answer is empty; metric 'logprob' needs a text")
    return Encoded(_ids([prompt]), _ids(later), None if target is None else _ids(target))


def _continued(tokenizer: Any, known: list[int], whole: str, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a text as it ends a whole one, of which all before is `known`; and those of the whole.

    A tokenizer may put a space before whatever it is given, which has no place in the middle of a text. Where the two
    texts' characters share a token, both are encoded on their own.
    """
    ids = encode_text(tokenizer, whole)
    if ids[: len(known)] != known:
        return tokenizer(text, add_special_tokens=False)["input_ids"], ids
    return ids[len(known) :], ids


def _ids(ids: Any) -> Tensor:
    return torch.tensor(ids, dtype=torch.long)


def encode_examples(
    tokenizer: Any, model: PreTrainedModel, examples: Sequence[Example], metric: str | None = None
) -> list[Encoded]:
    """The token ids of examples; prompts are where the model takes them.

    Args:
        tokenizer: the model's.
        model: what will read them.
        examples: what to encode.
        metric: "logprob", a text metric, or None for each example's own.

    Raises:
        UsageError: for no examples, one that its metric cannot score, or a prompt that is empty or leaves no room for
            the answer in the model's context.
    """
    if not examples:
        raise UsageError("there are no examples to score; the task is empty")
    max_context, device = model_facts(model).max_context, input_device(model)
    found = []
    for example in examples:
        encoded = encode_example(tokenizer, example, metric)
        if encoded.prompt.shape[1] == 0:
            raise UsageError(f"example {example.id}: the prompt has no tokens; give it a text")
        for ids in (encoded.prompt, encoded.later, *([] if encoded.target is None else [encoded.target])):
            check_token_ids(model, ids)
        if encoded.target is not None:
            answer = len(encoded.target)
        else:
            # What a metric needs beside the answer is missed now, not after everything was computed.
            text_score(metric or example.metric, "", example)
            answer = example.max_new_tokens
        length = encoded.prompt.shape[1] + len(encoded.later)
        if length + answer > max_context:
            raise UsageError(
                f"example {example.id}: the prompt has {length} tokens and its answer up to {answer}, more than the "
                f"model's context of {max_context}; use a shorter context or a model with a longer one"
            )
        found.append(replace(encoded, prompt=encoded.prompt.to(device)))
    return found


def text_score(metric: str, prediction: str, example: Example) -> float:
    """A text metric's score of one prediction, as far as the example's `stop` and `first_line` let it count.

    Raises:
        UsageError: if the example lacks what the metric needs, or the metric, which may be another package's, gives no
            number from 0 to 1.
    """
    for text in example.stop:
        prediction = prediction.partition(text)[0]
    if example.first_line:
        prediction = prediction.lstrip("\n").partition("\n")[0]
    try:
        score = get_metric(metric)(prediction, example.references, **dict(example.extra))
    except UsageError as error:
        raise UsageError(f"example {example.id}: {error}") from None
    if not (isinstance(score, SupportsFloat) and 0 <= float(score) <= 1):
        raise UsageError(f"example {example.id}: metric {metric!r} gave {score!r}; expected a number from 0 to 1")
    return float(score)


def mean_probability(log_probs: Tensor) -> float:
    """The ``logprob`` metric: geometric mean of the reference tokens' probabilities (1 / perplexity), in [0, 1].

    Args:
        log_probs: ``[target]``.

    Raises:
        RunError: if these are not numbers.
    """
    probability = float(log_probs.double().mean().exp())
    if math.isnan(probability):
        raise not_a_number()
    return min(1.0, probability)


def not_a_number() -> RunError:
    """The error for a model that overflows."""
    return RunError(
        "what the model computes is not a number: its number format is too narrow, or its weights are damaged; "
        "try --dtype float32 or --dtype bfloat16"
    )
