"""What an engine is: it turns candidates into scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.errors import UsageError
from evolkv.models import describe_model
from evolkv.models.forward import input_device
from evolkv.tasks import Example, encode_prompt
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
    ids = tokenizer(example.target, add_special_tokens=False, return_tensors="pt").input_ids[0]
    if not len(ids):
        raise UsageError(f"example {example.id}: the reference answer is empty; metric 'logprob' needs a text")
    return ids.long()


def encode_later(tokenizer: Any, example: Example) -> Tensor:
    """Token ids of what is read after the prompt was compressed, ``[question]``; most often none."""
    if not example.later:
        return torch.empty(0, dtype=torch.long)
    ids: Tensor = tokenizer(example.later, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids.long()


def encode_prompts(tokenizer: Any, model: PreTrainedModel, examples: Sequence[Example]) -> list[Tensor]:
    """Token ids of every prompt, ``[1, tokens]`` each.

    Raises:
        UsageError: for no examples, or a prompt that is empty or leaves no room in the model's context.
    """
    if not examples:
        raise UsageError("there are no examples to score; the task is empty")
    max_context = describe_model(model).max_context
    prompts = []
    for example in examples:
        ids = encode_prompt(tokenizer, example)
        if ids.shape[1] == 0:
            raise UsageError(f"example {example.id}: the prompt has no tokens; give it a text")
        length = ids.shape[1] + len(encode_later(tokenizer, example))
        if length > max_context:
            raise UsageError(
                f"example {example.id}: the prompt has {length} tokens, more than the model's context of "
                f"{max_context}; use a shorter context or a model with a longer one"
            )
        prompts.append(ids.to(input_device(model)))
    return prompts


def text_score(metric: str, prediction: str, example: Example) -> float:
    """A text metric's score of one prediction, as far as the example's `stop` and `first_line` let it count."""
    for text in example.stop:
        prediction = prediction.partition(text)[0]
    if example.first_line:
        prediction = prediction.lstrip("\n").partition("\n")[0]
    return float(get_metric(metric)(prediction, example.references, **dict(example.extra)))


def mean_probability(log_probs: Tensor) -> float:
    """The ``logprob`` metric: geometric mean of the reference tokens' probabilities (1 / perplexity), in [0, 1].

    Args:
        log_probs: ``[target]``.
    """
    return min(1.0, float(log_probs.double().mean().exp()))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    import psutil

    return int(psutil.virtual_memory().available)
