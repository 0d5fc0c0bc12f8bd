"""The naive engine: prefill again for every candidate. The reference that replay is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.cache.compressed import CompressedCache
from evolkv.evaluation.decode import RepetitionPenalty, end_tokens, greedy, target_log_probs
from evolkv.evaluation.engine import Progress, encode_examples, mean_probability, text_score
from evolkv.profile import BudgetProfile
from evolkv.selectors import Selector
from evolkv.tasks import Example


class NaiveEngine:
    """Scores candidates the way a user runs a profile: a compressed cache for each candidate and example.

    It serves any selector, and needs no memory beyond one prompt. It costs a prefill per candidate and example.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        examples: what to score on.
        selector: decides which tokens a budget keeps.
        metric: "logprob" (teacher-forced), the name of a text metric, or None for each example's own.
        on_progress: called with (done, total) once, since nothing is prepared.
        prefill_chunk: tokens of the chunks in which prompts are read; None for all at once.

    Raises:
        UsageError: for no examples, or a prompt that does not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        examples: Sequence[Example],
        selector: Selector,
        metric: str | None = "logprob",
        on_progress: Progress | None = None,
        prefill_chunk: int | None = None,
    ):
        self.model, self.tokenizer, self.examples, self.selector = model, tokenizer, list(examples), selector
        self.prefill_chunk = prefill_chunk
        self.metrics = [metric or example.metric for example in self.examples]
        self.encoded = encode_examples(tokenizer, model, self.examples, metric)
        self.end = end_tokens(model, tokenizer)
        if on_progress is not None:
            on_progress(len(self.examples), len(self.examples))

    def score(self, budgets: np.ndarray, columns: Sequence[int] | None = None) -> np.ndarray:
        """Scores every candidate on every example, or on those of `columns`; see `Engine.score`."""
        wanted = range(len(self.examples)) if columns is None else columns
        return np.array([[self._score(column, candidate) for column in wanted] for candidate in budgets])

    def _score(self, column: int, budgets: np.ndarray) -> float:
        if self.metrics[column] == "logprob":
            return self._mean_probability(column, budgets)
        return text_score(self.metrics[column], self.generate(column, budgets), self.examples[column])

    def _profile(self, budgets: np.ndarray) -> BudgetProfile:
        return BudgetProfile.from_budgets(self.model, budgets, selector=self.selector.to_dict())

    def _mean_probability(self, column: int, budgets: np.ndarray) -> float:
        cache, logits = self._prefill(column, budgets)
        this = self.encoded[column]
        assert this.target is not None
        tokens = [this.prompt.shape[1]]
        return mean_probability(target_log_probs(self.model, cache, logits, tokens, [this.target], [this.later])[0])

    def _prefill(self, column: int, budgets: np.ndarray) -> tuple[CompressedCache, Tensor]:
        cache = CompressedCache(self.model, self._profile(budgets), prefill_chunk=self.prefill_chunk)
        with torch.inference_mode():
            output = self.model(self.encoded[column].prompt, **cache.as_argument, use_cache=True, logits_to_keep=1)
        cache.end_prompt()
        return cache, output.logits[:, -1].float()

    def generate(self, column: int, budgets: np.ndarray) -> str:
        """The greedy text that a candidate gives for example number `column`."""
        ids, later = self.encoded[column].prompt, self.encoded[column].later
        cache, logits = self._prefill(column, budgets)
        limit = self.examples[column].max_new_tokens
        penalty = RepetitionPenalty.of(self.model, [ids[0]], later, logits)
        (text,) = greedy(self.model, cache, logits, [ids.shape[1]], [limit], self.end, later, penalty)
        return str(self.tokenizer.decode(text, skip_special_tokens=True))

    def close(self) -> None:
        """Nothing: no memory is held between calls."""
