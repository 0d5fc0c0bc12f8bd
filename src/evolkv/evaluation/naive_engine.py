"""The naive engine prefills again for every candidate. It is the reference that replay is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.cache.compressed import CompressedCache
from evolkv.evaluation.engine import Engine, Progress
from evolkv.evaluation.lengths import ByLength
from evolkv.evaluation.prefill import Prefiller
from evolkv.evaluation.scoring import encode_examples
from evolkv.models import model_facts
from evolkv.profile import BudgetProfile
from evolkv.selectors import Selector
from evolkv.tasks import Example


class NaiveEngine(Engine):
    """Scores candidates the way a user runs a profile: a compressed cache for each candidate and example.

    It serves any selector. It needs no memory beyond one prompt and, for label-free metrics, the full cache's answers.
    It costs a prefill per candidate and example.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        examples: what to score on.
        selector: decides which tokens a budget keeps.
        metric: "logprob" or another of `SCORERS`, the name of a text metric, or None for each example's own.
        on_progress: called with (done, total) once, since no prompt is held.
        prefill_chunk: tokens of the chunks in which prompts are read; None for all at once.
        lengths: carries candidates to each prompt's length; None where they are the same for every prompt.

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
        lengths: ByLength | None = None,
    ):
        self.lengths = lengths
        self.model, self.tokenizer, self.selector, self.prefill_chunk = model, tokenizer, selector, prefill_chunk
        self.questions = [
            each.scorer.refer(each, Prefiller(model, [])(each.prompt)) if each.scorer.label_free else each
            for each in encode_examples(tokenizer, model, examples, metric)
        ]
        if on_progress is not None:
            on_progress(len(self.questions), len(self.questions))

    def score(self, budgets: np.ndarray, columns: Sequence[int] | None = None) -> np.ndarray:
        """See `Engine.score`."""
        wanted = range(len(self.questions)) if columns is None else columns
        return np.array([[self._score(column, candidate) for column in wanted] for candidate in budgets])

    def _score(self, column: int, budgets: np.ndarray) -> float:
        question = self.questions[column]
        (answer,) = question.scorer.score(*self._prefill(column, budgets), [question])
        return answer.score

    def _prefill(self, column: int, budgets: np.ndarray) -> tuple[CompressedCache, Tensor]:
        if self.lengths is not None:
            tokens = self.questions[column].tokens
            (budgets,) = self.lengths.carry(budgets[None], tokens, model_facts(self.model).most_held(tokens))
        profile = BudgetProfile.from_budgets(self.model, budgets, selector=self.selector.to_dict())
        cache = CompressedCache(self.model, profile, prefill_chunk=self.prefill_chunk)
        with torch.inference_mode():
            output = self.model(self.questions[column].prompt, cache=cache, use_cache=True, logits_to_keep=1)
        cache.end_prompt()
        return cache, output.logits[:, -1].float()

    def close(self) -> None:
        """Do nothing: no memory is held between calls."""
