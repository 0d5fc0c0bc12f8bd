"""Scorers: what a score is made of, the model's own answer as a reference, and the loss that a descent makes small."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import evolkv
from evolkv.cache import CompressedCache
from evolkv.errors import TaskError, UsageError
from evolkv.evaluation import NaiveEngine, ReplayEngine, decode
from evolkv.evaluation.prefill import Prefiller
from evolkv.evaluation.scoring import SCORERS, encode_examples
from evolkv.profile import BudgetProfile
from evolkv.selectors import get_selector
from evolkv.tasks import Example, Task
from evolkv.tasks.check import warn_of_short_answers
from evolkv.tasks.metrics import LABEL_FREE, MODEL_METRICS
from tiny import KV_HEADS, LAYERS, VOCABULARY, tiny_model, tokens

SNAPKV = get_selector("snapkv:window=4")
EXAMPLE = Example("e", "one two three four five six seven eight nine ten " * 3, ("eleven twelve",))


@pytest.fixture
def words():
    """A tokenizer with a word for each token of the tiny models; its end token is 1."""
    vocabulary = {f"w{i}": i for i in range(3, VOCABULARY)} | {"<pad>": 0, "<end>": 1, "<begin>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def text(count, seed=0):
    return "".join(f"w{i} " for i in tokens(count, seed=seed).tolist())


def unlabelled(lengths=(40, 33, 45), later=0, new=6):
    return [
        Example(f"e{i}", text(n, i), (), max_new_tokens=new, metric="fidelity", later=text(later and later + i, 9 + i))
        for i, n in enumerate(lengths)
    ]


def lively(family="llama"):
    """A tiny model that is sure enough of its next tokens for evictions to show."""
    return tiny_model(family, initializer_range=0.2)


def candidates(count=3, least=4, most=30):
    return np.random.default_rng(0).integers(least, most, size=(count, LAYERS, KV_HEADS))


@dataclass(frozen=True)
class Given(Task):
    name = "given"
    kept: tuple[Example, ...] = field(default=(), compare=False)

    def examples(self, split, n, tokenizer, seed=0):
        return list(self.kept)[:n]


def by_hand(model, tokenizer, example, budgets):
    """Log-probabilities of the full cache and of a compressed one, on the full cache's greedy continuation."""
    prompt = tokenizer(example.prompt, return_tensors="pt")["input_ids"]
    later = tokenizer(example.later, return_tensors="pt")["input_ids"].long()
    read = torch.cat([prompt, later], dim=1)
    whole = model.generate(
        read, attention_mask=torch.ones_like(read), max_new_tokens=example.max_new_tokens, do_sample=False
    )
    full = model(whole).logits[0, read.shape[1] - 1 : -1].log_softmax(-1)
    cache = CompressedCache(model, BudgetProfile.from_budgets(model, budgets, SNAPKV.to_dict()))
    first = model(prompt, cache=cache).logits[:, -1:]
    rest = model(whole[:, prompt.shape[1] : -1], cache=cache).logits
    kept = torch.cat([first, rest], dim=1)[0, later.shape[1] :].log_softmax(-1)
    return full, kept


@pytest.mark.parametrize(("family", "later"), [("llama", 0), ("llama", 5), ("mistral", 5), ("qwen3_next", 0)])
def test_label_free_metrics_compare_with_the_full_cache_on_its_own_greedy_answer(family, later, words):
    model, (example,), budgets = lively(family), unlabelled([40], later), candidates()
    for metric in LABEL_FREE:
        (found,) = NaiveEngine(model, words, [example], SNAPKV, metric).score(budgets).T
        for score, candidate in zip(found, budgets, strict=True):
            full, kept = by_hand(model, words, example, candidate)
            divergence = (full.exp() * (full - kept)).sum(-1)
            same = (full.argmax(-1) == kept.argmax(-1)).float()
            expected = math.exp(-divergence.mean()) if metric == "fidelity" else same.mean().item()
            assert score == pytest.approx(expected, abs=1e-5)
        assert found.min() < 0.99


@pytest.mark.parametrize(
    ("family", "later", "metric"),
    [
        ("llama", 0, "fidelity"),
        ("llama", 5, "agreement"),
        ("mistral", 0, "agreement"),
        ("gemma2", 5, "fidelity"),
        ("bamba", 5, "fidelity"),
    ],
)
def test_replay_naive_and_evaluate_give_the_same_label_free_scores(family, later, metric, words):
    model, examples = lively(family), unlabelled(later=later)
    budgets = candidates()
    # The lower layers in common are computed once for all candidates.
    budgets[:, :2] = budgets[0, :2]
    replay = ReplayEngine(model, words, examples, SNAPKV, metric)
    naive = NaiveEngine(model, words, examples, SNAPKV, metric).score(budgets)
    np.testing.assert_allclose(replay.score(budgets), naive, atol=1e-5)
    np.testing.assert_allclose(replay.score(budgets, [0, 2]), naive[:, [0, 2]], atol=1e-5)
    passing = ReplayEngine(model, words, examples, SNAPKV, metric, hold=False)
    np.testing.assert_allclose(passing.score(budgets), naive, atol=1e-5)
    profile = BudgetProfile.from_budgets(model, budgets[1], SNAPKV.to_dict())
    # Bamba goes on by single tokens, and so reads no prompt in chunks.
    for chunk in [None] if family == "bamba" else [None, 64]:
        task, methods = Given(tuple(examples)), ["full", profile]
        rows = evolkv.evaluate(model, words, task=task, methods=methods, metric=metric, prefill_chunk=chunk)
        assert [row["metric"] for row in rows] == [metric] * 2
        assert rows[0]["score"] == pytest.approx(1, abs=1e-6)
        assert rows[1]["score"] == pytest.approx(naive[1].mean(), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "bamba"])
def test_budgets_that_cover_the_prompt_keep_all_of_the_full_caches_behaviour(family, words):
    model, budgets = lively(family), np.full((1, LAYERS, KV_HEADS), 60)
    for metric in LABEL_FREE:
        for engine in (ReplayEngine, NaiveEngine):
            scores = engine(model, words, unlabelled(later=3), SNAPKV, metric).score(budgets)
            np.testing.assert_allclose(scores, 1, atol=1e-6)


def test_the_token_that_ends_the_models_answer_counts(words):
    model, (example,) = lively(), unlabelled([40])
    model.generation_config.eos_token_id = words.eos_token_id = None
    (question,) = encode_examples(words, model, [example])
    recorded = Prefiller(model, [])(question.prompt)
    open_ended = question.scorer.refer(question, recorded).target.tolist()
    assert len(open_ended) == 6
    end = next(token for i, token in enumerate(open_ended) if i > 0 and token not in open_ended[:i])
    model.generation_config.eos_token_id = end
    ended = question.scorer.refer(question, recorded)
    assert ended.target.tolist() == open_ended[: open_ended.index(end) + 1]
    assert ended.reference.shape == (len(ended.target), VOCABULARY)


def test_long_answers_are_compared_in_pieces(words, monkeypatch):
    model, examples = lively(), unlabelled([40, 37], later=3)
    profile = BudgetProfile.uniform(model, 12, SNAPKV.to_dict())

    def score():
        return evolkv.evaluate(model, words, task=Given(tuple(examples)), methods=profile)[0]["score"]

    whole = score()
    monkeypatch.setattr(decode, "_LOGITS_BYTES", 2 * decode._BYTES_PER_LOGIT * VOCABULARY)
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(output.logits.shape[1]))
    assert score() == pytest.approx(whole, abs=1e-5)
    assert calls.count(2) > 3


def test_examples_with_and_without_a_label_are_scored_side_by_side(words):
    labelled = [Example(f"l{i}", text(35, 20 + i), (text(4, 30 + i),), metric="logprob") for i in range(2)]
    free = unlabelled()
    mixed = [labelled[0], free[0], free[1], labelled[1], free[2]]
    model, budgets = lively(), candidates()
    found = ReplayEngine(model, words, mixed, SNAPKV, None).score(budgets)
    np.testing.assert_allclose(found, NaiveEngine(model, words, mixed, SNAPKV, None).score(budgets), atol=1e-5)
    alone = ReplayEngine(model, words, labelled, SNAPKV, "logprob").score(budgets)
    np.testing.assert_allclose(found[:, [0, 3]], alone, atol=1e-5)


def test_the_full_caches_predictions_count_among_the_bytes_of_the_snapshots(words):
    model, examples = lively(), unlabelled()
    labelled = [replace(each, references=("w5",), metric="contains", target="") for each in examples]
    free, plain = (ReplayEngine(model, words, part, SNAPKV, None) for part in (examples, labelled))
    targets = sum(len(ranked.question.target) for ranked in free._held)
    assert free.held_bytes - plain.held_bytes == targets * VOCABULARY * 4


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


@pytest.mark.parametrize("metric", LABEL_FREE)
def test_loss_of_label_free_metrics_is_that_of_the_full_caches_own_answer(words, metric):
    model, (example,), budgets = lively(), unlabelled([40]), candidates(1)
    (question,) = encode_examples(words, model, [example], metric)
    question = question.scorer.refer(question, Prefiller(model, [])(question.prompt))
    _, kept = by_hand(model, words, example, budgets[0])
    logits = kept.detach().requires_grad_()
    loss = question.scorer.loss(logits, question)
    own = question.reference.argmax(-1)
    assert torch.equal(own, question.target)
    expected = kept.log_softmax(-1)[torch.arange(len(own)), own].mean()
    assert loss.item() == pytest.approx(-expected.item(), rel=1e-6)
    loss.backward()
    assert float(logits.grad.abs().sum()) > 0


def test_text_metrics_have_no_loss(small):
    model, tokenizer = small
    (question,) = encode_examples(tokenizer, model, [EXAMPLE], "contains")
    with pytest.raises(UsageError, match="'contains' compares texts and has no slope to follow"):
        question.scorer.loss(torch.zeros(1, len(tokenizer)), question)


def test_only_label_free_metrics_take_examples_without_an_answer(words):
    assert {name: scorer.__doc__.partition("\n")[0] for name, scorer in SCORERS.items()} == MODEL_METRICS
    assert tuple(name for name, scorer in SCORERS.items() if scorer.label_free) == LABEL_FREE
    for metric in ("logprob", "contains"):
        with pytest.raises(UsageError, match=rf"e0 has no reference answer, and metric '{metric}' compares with one"):
            encode_examples(words, lively(), unlabelled([40]), metric)
    with pytest.raises(TaskError, match="has no reference answer"):
        Example("e", "a prompt", ())


@pytest.mark.parametrize("metric", LABEL_FREE)
def test_label_free_metrics_need_room_for_the_models_own_answer(words, metric):
    with pytest.raises(UsageError, match=f"e0: max_new_tokens is 0, and metric '{metric}' compares with"):
        encode_examples(words, lively(), unlabelled([40], new=0), metric)


def test_answers_that_cannot_come_whole_are_warned_of(small, caplog):
    _, tokenizer = small
    long = Example("e", "Say it.", ("one two three four five six seven",), max_new_tokens=3, metric="contains")
    for metric, examples, said in (
        ("qa_f1", [long], False),
        ("logprob", [long], False),
        (None, [replace(long, max_new_tokens=40)], False),
        (None, [long, replace(long, references=("one", *long.references))], True),
    ):
        caplog.clear()
        warn_of_short_answers(tokenizer, examples, metric)
        assert ("ends the right answers of 1 of 2 examples (such as e)" in caplog.text) == said


def test_another_metric_that_gives_an_examples_own_answer_0_is_refused(small):
    model, tokenizer = small
    word = Example("e", "How many?", ("seven",))
    for metric in ("count", "gsm8k"):
        with pytest.raises(UsageError, match=f"example e: the answer 'seven' scores 0 under metric '{metric}'"):
            encode_examples(tokenizer, model, [word], metric)
    for metric in ("qa_f1", "code_sim", "rouge_l", "logprob", "fidelity"):
        encode_examples(tokenizer, model, [word], metric)
    # Published scores count such rows.
    encode_examples(tokenizer, model, [replace(word, metric="count")])
