"""Scorers: what a score is made of, and the loss that a descent makes small instead."""

from __future__ import annotations

import math

import pytest
import torch

from evolkv.errors import UsageError
from evolkv.evaluation.scoring import encode_examples
from evolkv.tasks import Example

EXAMPLE = Example("e", "one two three four five six seven eight nine ten " * 3, ("eleven twelve",))


def test_loss_of_logprob_is_the_negative_logarithm_of_its_score_and_has_a_slope(small):
    model, tokenizer = small
    (question,) = encode_examples(tokenizer, model, [EXAMPLE], "logprob")
    whole = torch.cat([question.prompt[0], question.target])
    logits = model(whole[None]).logits[0, question.tokens - 1 : -1].detach().requires_grad_()
    loss = question.scorer.loss(logits, question)
    expected = logits.log_softmax(-1)[torch.arange(len(question.target)), question.target].mean()
    assert loss.item() == pytest.approx(-expected.item(), rel=1e-6)
    loss.backward()
    assert float(logits.grad.abs().sum()) > 0
    assert 0 < math.exp(-loss.item()) < 1


def test_text_metrics_have_no_loss(small):
    model, tokenizer = small
    (question,) = encode_examples(tokenizer, model, [EXAMPLE], "contains")
    with pytest.raises(UsageError, match="'contains' compares texts and has no slope to follow"):
        question.scorer.loss(torch.zeros(1, len(tokenizer)), question)
