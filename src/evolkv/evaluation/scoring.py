"""Scores of continued prompts, computed in one place for every engine.

A scorer knows one metric. It encodes an example, and scores rows of a cache that hold what is kept of its prompt. The
metrics of `evolkv.tasks.metrics` compare the text that a row generates; others look at what the model computes, and
have a class of their own in `SCORERS`. Of these, some need no reference answer: they compare with the model's own
answer under the full cache.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, SupportsFloat

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.cache.compressed import CompressedCache
from evolkv.cache.recording import RecordedPrompt
from evolkv.cache.replay import ReplayCache
from evolkv.errors import UsageError
from evolkv.evaluation.decode import (
    RepetitionPenalty,
    end_tokens,
    greedy,
    judge_targets,
    most_probable,
    not_a_number,
    target_log_probs,
)
from evolkv.evaluation.prefill import whole_cache
from evolkv.models import model_facts
from evolkv.models.forward import check_no_learned_tokens, check_token_ids, input_device
from evolkv.tasks import Example
from evolkv.tasks.check import check_judged, check_labelled, check_room
from evolkv.tasks.metrics import get_metric, judged_part
from evolkv.tasks.prompts import encode_text


@dataclass(frozen=True)
class Question:
    """An example as token ids, and what scores the answer.

    Args:
        example: the example.
        scorer: of its metric.
        prompt: ``[1, tokens]`` int64, where the model takes it.
        later: of what is read after the prompt was compressed, ``[question]`` int64; most often none.
        target: of the answer that is read, ``[target]`` int64; None where an answer is generated, or the model's own is
            not there yet (see `Scorer.refer`).
        reference: the full cache's logits of the target's tokens, ``[target, vocabulary]`` in the model's dtype, where
            the metric compares with them.
    """

    example: Example
    scorer: Scorer
    prompt: Tensor
    later: Tensor
    target: Tensor | None
    reference: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return self.prompt.shape[1]

    @property
    def answer_tokens(self) -> int:
        """The most tokens that the answer may have."""
        return self.example.max_new_tokens if self.target is None else len(self.target)

    def joins(self, other: Question) -> bool:
        """Return whether rows of both can be scored together."""
        # Generation reads what comes later in one call for all rows, so it must be the same.
        alike = self.scorer.teacher_forced or len(self.later) == len(other.later) == 0
        return alike and type(self.scorer) is type(other.scorer)


class Answer(NamedTuple):
    """The score of one row, in [0, 1], and the text it generated; None where it generated none."""

    text: str | None
    score: float


class Scorer(ABC):
    """Scores rows of a cache under one metric.

    Args:
        metric: its name.
        model: the model.
        tokenizer: its tokenizer.
    """

    #: Whether a given answer is read in one call, rather than one generated token by token.
    teacher_forced: ClassVar[bool]
    #: Whether the reference is the model's own answer under the full cache, rather than the example's.
    label_free: ClassVar[bool] = False

    def __init__(self, metric: str, model: PreTrainedModel, tokenizer: Any):
        self.metric, self.model, self.tokenizer = metric, model, tokenizer

    def encode(self, example: Example) -> Question:
        """Return the token ids of an example.

        Raises:
            UsageError: if the metric cannot score it, or the prompt is empty or leaves no room for the answer in the
                model's context.
            ModelError: for tokens that the model has no embeddings for.
        """
        check_labelled(example, self.metric)
        text, known = example.prompt, encode_text(self.tokenizer, example.prompt)
        prompt = torch.tensor([known], dtype=torch.long)
        later: list[int] = []
        if example.later:
            text += example.later
            later, known = continued(self.tokenizer, known, text, example.later)
        question = Question(
            example, self, prompt, torch.tensor(later, dtype=torch.long), self._target(known, text, example)
        )
        if not question.tokens:
            raise UsageError(f"example {example.id}: the prompt has no tokens; give it a text")
        for ids in (prompt, question.later, question.target):
            if ids is not None:
                check_token_ids(self.model, ids)
        length, context = question.tokens + len(later), model_facts(self.model).max_context
        check_room(example, length, question.answer_tokens, context)
        return replace(question, prompt=prompt.to(input_device(self.model)))

    @abstractmethod
    def _target(self, known: list[int], text: str, example: Example) -> Tensor | None:
        """Return the tokens to be scored of an answer that follows a text, of which `known` are the tokens.

        Raises:
            UsageError: if the metric cannot score the example.
        """

    def refer(self, question: Question, recorded: RecordedPrompt) -> Question:
        """Return a question with the model's own answer to its prompt, if the metric is `label_free`; else as it is."""
        return question

    @abstractmethod
    def score(
        self, cache: CompressedCache | ReplayCache, next_logits: Tensor, questions: Sequence[Question]
    ) -> list[Answer]:
        """Score the rows of a cache, which is used up.

        Args:
            cache: holds a prompt in each row.
            next_logits: of the first token after each, ``[rows, vocabulary]``.
            questions: of each row. Their metrics may differ if they join (see `Question.joins`).

        Raises:
            RunError: if what the model computes is not a number.
        """

    def _continued(
        self,
        cache: CompressedCache | ReplayCache,
        next_logits: Tensor,
        questions: Sequence[Question],
        keep_end: bool = False,
    ) -> list[list[int]]:
        """Return the greedy tokens of each row of a cache, with `keep_end` also the one that ends them; see `score`.

        All rows read the same later on.
        """
        later = questions[0].later
        penalty = RepetitionPenalty.of(self.model, [each.prompt[0] for each in questions], later, next_logits)
        tokens, limits = [each.tokens for each in questions], [each.example.max_new_tokens for each in questions]
        end = end_tokens(self.model, self.tokenizer)
        return greedy(self.model, cache, next_logits, tokens, limits, end, later, penalty, keep_end)

    def loss(self, logits: Tensor, question: Question) -> Tensor:
        """Return what a descent on this metric makes small: the mean over the target's tokens, differentiable.

        Args:
            logits: those that predict the target's tokens, ``[target, vocabulary]``, in any dtype.
            question: the example.

        Returns:
            A float32 scalar, at least 0, on the device of the logits.

        Raises:
            UsageError: for a metric of texts, which has no slope.
        """
        raise UsageError(f"metric {self.metric!r} compares texts and has no slope to follow; use logprob or fidelity")


class TextScorer(Scorer):
    """Compares the greedy text with the references: the metrics of `evolkv.tasks.metrics`."""

    teacher_forced = False

    def _target(self, known: list[int], text: str, example: Example) -> Tensor | None:
        # Fails now if the example lacks what the metric needs, not after everything was computed.
        text_score(self.metric, "", example)
        check_judged(example, self.metric)
        return None

    def score(
        self, cache: CompressedCache | ReplayCache, next_logits: Tensor, questions: Sequence[Question]
    ) -> list[Answer]:
        """See `Scorer.score`."""
        ids = self._continued(cache, next_logits, questions)
        texts = [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in ids]
        return [
            Answer(text, text_score(each.scorer.metric, text, each.example))
            for text, each in zip(texts, questions, strict=True)
        ]


class ProbabilityScorer(Scorer):
    """The geometric mean of the reference tokens' probabilities (1 / perplexity), in [0, 1]."""

    teacher_forced = True

    def _target(self, known: list[int], text: str, example: Example) -> Tensor | None:
        target, _ = continued(self.tokenizer, known, text + example.target, example.target)
        if not target:
            raise UsageError(
                f"example {example.id}: the reference answer is empty; metric {self.metric!r} needs a text"
            )
        return torch.tensor(target, dtype=torch.long)

    def score(
        self, cache: CompressedCache | ReplayCache, next_logits: Tensor, questions: Sequence[Question]
    ) -> list[Answer]:
        """See `Scorer.score`."""
        tokens, later = [each.tokens for each in questions], [each.later for each in questions]
        targets = [each.target for each in questions if each.target is not None]
        log_probs = target_log_probs(self.model, cache, next_logits, tokens, targets, later)
        return [Answer(None, mean_probability(row)) for row in log_probs]

    def loss(self, logits: Tensor, question: Question) -> Tensor:
        """See `Scorer.loss`: the negative log-likelihood, of which the score is ``exp(-loss)``."""
        return _negative_log_likelihood(logits, question)


class FidelityScorer(Scorer):
    """Share of the full cache's behaviour that is kept: exp(-KL), the mean over its own answer, in [0, 1].

    The answer is the model's greedy continuation under the full cache, up to the example's `max_new_tokens`; the token
    that ends it counts. Each of its tokens is predicted twice: with the full cache and with what is kept of it. KL(full
    ‖ kept) is the divergence between the two distributions over the vocabulary, in nats. No reference answer is needed.
    """

    teacher_forced = True
    label_free = True

    def _target(self, known: list[int], text: str, example: Example) -> Tensor | None:
        return None

    def refer(self, question: Question, recorded: RecordedPrompt) -> Question:
        """See `Scorer.refer`."""
        later = len(question.later)
        cache = whole_cache(self.model, recorded, later + question.answer_tokens)
        again, first = cache.copy(), recorded.next_logits[None]
        (ids,) = self._continued(cache, first, [question], keep_end=True)
        target = torch.tensor(ids, dtype=torch.long)
        text = torch.cat([question.later, target])[None, :-1].to(input_device(self.model))
        logits = first if later == 0 else first[:0]
        if text.numel():
            # Read again in one call, as candidates do: how many tokens are read at once decides the last bits.
            position = question.tokens + torch.arange(text.shape[1], device=text.device)[None]
            with torch.inference_mode():
                output = self.model(
                    text,
                    cache=again,
                    position_ids=position,
                    use_cache=True,
                    logits_to_keep=len(target) - len(logits),
                )
            logits = torch.cat([logits.to(output.logits.dtype), output.logits[0]])
        return replace(question, target=target, reference=logits)

    def score(
        self, cache: CompressedCache | ReplayCache, next_logits: Tensor, questions: Sequence[Question]
    ) -> list[Answer]:
        """See `Scorer.score`."""

        def judge(logits: Tensor, expected: Tensor, first: int) -> Tensor:
            values = torch.zeros(expected.shape, device=logits.device)
            # Rows of one question stand side by side. One row at a time, since the vocabulary makes each of them large.
            for _, same in groupby(range(len(questions)), key=lambda row: id(questions[row])):
                rows = [*same]
                question = questions[rows[0]]
                assert question.reference is not None
                # Of the target's tokens, those that these logits predict, and where among all that they predict.
                start = first - len(question.later)
                own = slice(max(0, start), max(0, start + expected.shape[1]))
                reference = question.reference[own]
                if len(reference):
                    at = slice(own.start - start, own.start - start + len(reference))
                    compare = self._compare(reference)
                    for row in rows:
                        values[row, at] = compare(logits[row, at])
            return values

        tokens, later = [each.tokens for each in questions], [each.later for each in questions]
        targets = [each.target for each in questions if each.target is not None]
        rows = judge_targets(self.model, cache, next_logits, tokens, targets, later, judge)
        return [Answer(None, self._summary(row)) for row in rows]

    def _compare(self, reference: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what gives each token a value, ``[target]``, from its logits ``[target, vocabulary]``."""
        diverge = divergence_from(reference)
        return lambda logits: -diverge(logits)

    def _summary(self, values: Tensor) -> float:
        """Return the score that these values of the tokens make."""
        return mean_probability(values)

    def loss(self, logits: Tensor, question: Question) -> Tensor:
        """See `Scorer.loss`: the negative log-likelihood of the full cache's own answer.

        The divergence would spend budget on tokens of which the full cache itself is not sure, at the cost of those
        that make the text.
        """
        return _negative_log_likelihood(logits, question)


class AgreementScorer(FidelityScorer):
    """Share of its own answer's tokens whose most probable token stays that of the full cache, in [0, 1].

    The answer, its two predictions and the loss are those of `FidelityScorer`.
    """

    def _compare(self, reference: Tensor) -> Callable[[Tensor], Tensor]:
        chosen = most_probable(reference)
        return lambda logits: (most_probable(logits) == chosen).float()

    def _summary(self, values: Tensor) -> float:
        return float(values.double().mean())


def _negative_log_likelihood(logits: Tensor, question: Question) -> Tensor:
    """Return what the target's tokens cost on average, in nats, under logits ``[target, vocabulary]`` of any dtype."""
    assert question.target is not None
    return F.cross_entropy(logits.float(), question.target.to(logits.device))


#: Metrics that are not of the text that is generated.
SCORERS: dict[str, type[Scorer]] = {
    "logprob": ProbabilityScorer,
    "fidelity": FidelityScorer,
    "agreement": AgreementScorer,
}


def has_slope(metric: str | None) -> bool:
    """Return whether a search can follow the slope of a metric; None stands for each example's own."""
    return SCORERS.get(metric or "", TextScorer).loss is not Scorer.loss


def reads_answer(metric: str | None) -> bool:
    """Return whether a metric has an answer that is read, so that a calibration can see what reads the prompt."""
    return SCORERS.get(metric or "", TextScorer).teacher_forced


def encode_examples(
    tokenizer: Any, model: PreTrainedModel, examples: Sequence[Example], metric: str | None = None
) -> list[Question]:
    """Return examples as token ids, each with the scorer of its metric.

    Args:
        tokenizer: the model's.
        model: what will read them.
        examples: what to encode.
        metric: of all; None for each example's own.

    Raises:
        UsageError: for no examples, or as `Scorer.encode`.
        ModelError: as `Scorer.encode`, or for a model that reads more than the tokens it is given.
    """
    check_no_learned_tokens(model)
    if not examples:
        raise UsageError("there are no examples to score; the task is empty")
    names = {metric or example.metric for example in examples}
    scorers = {name: SCORERS.get(name, TextScorer)(name, model, tokenizer) for name in names}
    return [scorers[metric or example.metric].encode(example) for example in examples]


def continued(tokenizer: Any, known: list[int], whole: str, text: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a text as it ends a whole one, of which all before is `known`; and those of the whole.

    A tokenizer may put a space before whatever it is given, which has no place in the middle of a text. Where the two
    texts' characters share a token, both are encoded on their own.
    """
    ids = encode_text(tokenizer, whole)
    if ids[: len(known)] != known:
        return tokenizer(text, add_special_tokens=False)["input_ids"], ids
    return ids[len(known) :], ids


def divergence_from(reference: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function from logits ``[tokens, vocabulary]`` to KL(reference ‖ logits), ``[tokens]``, in nats.

    Args:
        reference: logits of the distribution to diverge from, ``[tokens, vocabulary]``.
    """
    log_probs = reference.float().log_softmax(-1)
    probs = log_probs.exp()
    # The difference first: of two equal distributions it is exactly 0.
    return lambda logits: (probs * (log_probs - logits.float().log_softmax(-1))).sum(-1)


def text_score(metric: str, prediction: str, example: Example) -> float:
    """Return a text metric's score of one prediction, as far as the example's `stop` and `first_line` let it count.

    Raises:
        UsageError: if the example lacks what the metric needs, or the metric, which may be another package's, gives no
            number from 0 to 1.
    """
    judged = judged_part(prediction, example.stop, example.first_line)
    try:
        score = get_metric(metric)(judged, example.references, **dict(example.extra))
    except UsageError as error:
        raise UsageError(f"example {example.id}: {error}") from None
    if not (isinstance(score, SupportsFloat) and not getattr(score, "ndim", 0) and 0 <= float(score) <= 1):
        raise UsageError(f"example {example.id}: metric {metric!r} gave {score!r}; expected a number from 0 to 1")
    return float(score)


def mean_probability(log_probs: Tensor) -> float:
    """Return the geometric mean of probabilities, in [0, 1].

    Args:
        log_probs: their logarithms, ``[target]``.

    Raises:
        RunError: if these are not numbers.
    """
    probability = float(log_probs.double().mean().exp())
    if math.isnan(probability):
        raise not_a_number()
    return min(1.0, probability)
