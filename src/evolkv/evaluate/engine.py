"""What an engine is: it turns candidates into scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.errors import RunError, UsageError
from evolkv.models import describe_model
from evolkv.models.forward import input_device
from evolkv.tasks import Example, encode_prompt
from evolkv.tasks.base import encode_text
from evolkv.tasks.metrics import get_metric

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


def encode_target(tokenizer: Any, example: Example) -> Tensor:
    """Token ids of the reference answer as it continues the prompt, ``[target]``.

    Raises:
        UsageError: if the answer has no tokens.
    """
    ids = _continuation(tokenizer, example.prompt + example.later, example.target)
    if not len(ids):
        raise UsageError(f"example {example.id}: the reference answer is empty; metric 'logprob' needs a text")
    return ids


def encode_later(tokenizer: Any, example: Example) -> Tensor:
    """Token ids of what is read after the prompt was compressed, ``[question]``; most often none."""
    if not example.later:
        return torch.empty(0, dtype=torch.long)
    return _continuation(tokenizer, example.prompt, example.later)


def _continuation(tokenizer: Any, before: str, text: str) -> Tensor:
    """Token ids of a text as it continues another one, ``[tokens]`` int64.

    A tokenizer may put a space before whatever it is given, which has no place in the middle of a text. Where the two
    texts' characters share a token, both are encoded on their own.
    """
    known, ids = encode_text(tokenizer, before), encode_text(tokenizer, before + text)
    if ids[: len(known)] != known:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    return torch.tensor(ids[len(known) :], dtype=torch.long)


def encode_prompts(
    tokenizer: Any, model: PreTrainedModel, examples: Sequence[Example], metric: str | None = None
) -> list[Tensor]:
    """Token ids of every prompt, ``[1, tokens]`` each.

    Args:
        tokenizer: the model's.
        model: what will read them.
        examples: the prompts.
        metric: "logprob", a text metric, or None for each example's own.

    Raises:
        UsageError: for no examples, one that its metric cannot score, or a prompt that is empty or leaves no room for
            the answer in the model's context.
    """
    if not examples:
        raise UsageError("there are no examples to score; the task is empty")
    max_context = describe_model(model).max_context
    prompts = []
    for example in examples:
        ids = encode_prompt(tokenizer, example)
        if ids.shape[1] == 0:
            raise UsageError(f"example {example.id}: the prompt has no tokens; give it a text")
        chosen = metric or example.metric
        if chosen == "logprob":
            answer = len(encode_target(tokenizer, example))
        else:
            # What a metric needs beside the answer is missed now, not after everything was computed.
            text_score(chosen, "", example)
            answer = example.max_new_tokens
        length = ids.shape[1] + len(encode_later(tokenizer, example))
        if length + answer > max_context:
            raise UsageError(
                f"example {example.id}: the prompt has {length} tokens and its answer up to {answer}, more than the "
                f"model's context of {max_context}; use a shorter context or a model with a longer one"
            )
        prompts.append(ids.to(input_device(model)))
    return prompts


def text_score(metric: str, prediction: str, example: Example) -> float:
    """A text metric's score of one prediction, as far as the example's `stop` and `first_line` let it count.

    Raises:
        UsageError: if the example lacks what the metric needs.
    """
    for text in example.stop:
        prediction = prediction.partition(text)[0]
    if example.first_line:
        prediction = prediction.lstrip("\n").partition("\n")[0]
    try:
        return float(get_metric(metric)(prediction, example.references, **dict(example.extra)))
    except UsageError as error:
        raise UsageError(f"example {example.id}: {error}") from None


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


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    import psutil

    return int(psutil.virtual_memory().available)
