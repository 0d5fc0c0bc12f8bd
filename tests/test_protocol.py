"""Questions that are read after the context was compressed."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import cycle
from typing import ClassVar

import numpy as np
import pytest
import torch

import evolkv
from evolkv.cache.recording import from_rankings
from evolkv.errors import RunError, TaskError, UsageError
from evolkv.evaluation import NaiveEngine, ReplayEngine, decode
from evolkv.evaluation.decode import greedy, target_log_probs
from evolkv.evaluation.prefill import Prefiller
from evolkv.evaluation.scoring import encode_examples
from evolkv.selectors import get_selector
from evolkv.tasks import Example, Task, get_task
from evolkv.tasks.protocol import AGNOSTIC, AWARE, draw_examples, under_protocol
from tiny import VOCABULARY, scored_texts, tiny_model, tokens, tokens_read

FACTS = {
    "Lena": "a red bicycle",
    "Oskar": "two grey cats",
    "Marta": "an old piano",
    "Jonas": "a wooden boat",
}
CONTEXT = " ".join(
    f"{name} owns {thing}, and on most evenings the neighbours hear about it." for name, thing in FACTS.items()
)


def people(tokenizer):
    """Several questions about one context, in the chat template."""
    examples = []
    for name, thing in FACTS.items():
        question = f"What does {name} own?"
        messages = [{"role": "user", "content": f"{CONTEXT * 3}\n{question}"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        at = prompt.rindex(question)
        examples.append(
            Example(name, prompt, (thing,), target=f"{name} owns {thing}", max_new_tokens=6, question_at=at)
        )
    return examples


def test_the_prompt_ends_where_the_question_begins():
    example = Example("a", "Some text. What?\nAnswer:", ("b",), question_at=11)
    (asked,) = under_protocol(AGNOSTIC, [example])
    assert (asked.prompt, asked.later) == ("Some text. ", "What?\nAnswer:")
    assert asked.target == " b"
    assert under_protocol(AWARE, [example]) == [example]


@pytest.mark.parametrize("at", [None, 0])
def test_examples_without_a_context_apart_are_refused(at):
    with pytest.raises(TaskError, match="example a: its question does not stand apart"):
        under_protocol(AGNOSTIC, [Example("a", "What?", ("b",), question_at=at)])


def test_unknown_protocol_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'agnostic'"):
        under_protocol("agnostik", [])


def gsm8k_file(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"gsm8k:path={path},shots=2"


def longbench_file(tmp_path):
    path = tmp_path / "qasper.jsonl"
    row = {"length": 5, "dataset": "qasper", "language": "en", "all_classes": None, "answers": ["x"]}
    rows = [
        {**row, "context": f"An article about {i}. " * 9, "input": f"What about {i}?", "_id": str(i)} for i in range(8)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"longbench:subset=qasper,path={path},context=400"


def jsonl_file(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"prompt": f"Text {i}. Why {i}?", "question": f"Why {i}?", "answer": "so"} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"jsonl:path={path},chat=true"


@pytest.mark.model
@pytest.mark.parametrize(
    ("spec", "opening", "inside"),
    [
        ("niah:context=300,needles=2", "What is the special magic number for", "hidden within"),
        ("niah:context=300,language=zh,chat=false", "上面的文字", "。"),
        *((f"ruler:task={task},context=900", "What", "") for task in ("niah_single_1", "niah_multivalue")),
        ("ruler:task=vt,context=900", "Question: Find all variables", "VAR "),
        ("ruler:task=cwe,context=1200", "Question: What are the 10", "1. "),
        ("ruler:task=fwe,context=900", "Question: Do not provide", "coded text"),
        ("code:context=300", "Next line of code:", "Please complete"),
        (gsm8k_file, "Question: What is", "#### "),
        (longbench_file, "Answer the question based on the above article", "An article about"),
        (jsonl_file, "Why ", "Text "),
    ],
)
def test_tasks_know_where_their_question_begins(smollm2, tmp_path, spec, opening, inside):
    _, tokenizer = smollm2
    spec = spec if isinstance(spec, str) else spec(tmp_path)
    examples = get_task(spec).examples("report", 2, tokenizer)
    for before, after in zip(examples, under_protocol(AGNOSTIC, examples), strict=True):
        assert after.prompt + after.later == before.prompt
        assert after.later.startswith(opening)
        assert inside in after.prompt
        assert len(after.later) < len(after.prompt)
        assert (after.references, after.target) == (before.references, before.target)


def test_question_of_a_jsonl_row_must_end_its_prompt(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "What? Some text.", "question": "What?", "answer": "so"}))
    with pytest.raises(TaskError, match=r"rows.jsonl line 1: 'prompt' does not end with 'question'"):
        get_task(f"jsonl:path={path},split=all").examples("train", 1, None)


@pytest.mark.parametrize("question", ["end", "assistant", "im_start"])
@pytest.mark.parametrize("name", ["jsonl", "prompts", "chat"])
def test_a_question_is_not_sought_in_what_the_template_puts_behind_it(tmp_path, tokenizer, question, name):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": f"Some text. {question}", "question": question, "answer": "x"}
    if name == "chat":
        row = {"messages": [{"role": "user", "content": text} for text in ("Some text.", question)]}
    path.write_text(json.dumps(row))
    spec = f"{'jsonl' if name == 'jsonl' else 'prompts'}:path={path},split=all,chat=true"
    (example,) = under_protocol(AGNOSTIC, get_task(spec).examples("train", 1, tokenizer))
    assert example.later.startswith(f"{question}<|im_end|>")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("piece", [None, 1, 3])
def test_reading_a_question_first_is_part_of_the_continuation(family, piece, monkeypatch):
    """Log-probabilities and texts after a question are those of one plain text, however long the pieces are."""
    model = tiny_model(family)
    if piece is not None:
        monkeypatch.setattr(decode, "_LOGITS_BYTES", 2 * piece * decode._BYTES_PER_LOGIT * VOCABULARY)
        calls = []
        model.register_forward_hook(lambda module, args, output: calls.append(output.logits.shape[1]))
    context, questions, targets = tokens(1, 30), [tokens(5, seed=3), tokens(8, seed=4)], [tokens(4), tokens(6, seed=1)]
    recorded = Prefiller(model, [get_selector("knorm")])(context)
    everything = np.full((2, 4, 2), 30)
    rankings = [layer.rankings[get_selector("knorm")].expand(2, -1, -1) for layer in recorded.kv_layers]

    def cache():
        held = [layer.held() for layer in recorded.kv_layers]
        return from_rankings(model, held, rankings, everything, get_selector("knorm"))

    logits = recorded.next_logits.expand(2, -1)
    found = target_log_probs(model, cache(), logits, [30, 30], targets, questions)
    # Behind the shorter question stand 9 tokens to be scored.
    assert piece is None or calls[1:] == {1: [1] * 9, 3: [3, 3, 3]}[piece]
    for row, question, target in zip(found, questions, targets, strict=True):
        whole = torch.cat([context[0], question, target])
        plain = model(whole[None]).logits[0].log_softmax(-1)
        start = 30 + len(question)
        expected = plain[torch.arange(start - 1, len(whole) - 1), target]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)
    texts = greedy(model, cache(), logits, [30, 30], [5, 5], (), questions[0])
    whole = torch.cat([context[0], questions[0]])[None]
    expected = model.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=5, do_sample=False)
    assert texts == [expected[0, whole.shape[1] :].tolist()] * 2


@pytest.mark.slow
@pytest.mark.model
def test_replay_equals_naive_when_the_question_comes_later(smollm2):
    model, tokenizer = smollm2
    examples = under_protocol(AGNOSTIC, people(tokenizer))
    selector = get_selector({"name": "snapkv", "window": 8})
    budgets = np.random.default_rng(0).integers(9, 200, size=(3, 30, 3))
    replay, naive = (engine(model, tokenizer, examples, selector) for engine in (ReplayEngine, NaiveEngine))
    scores = replay.score(budgets)
    assert np.abs(scores - naive.score(budgets)).max() <= 1e-4
    assert np.ptp(scores) > 0.01
    replay, naive = (engine(model, tokenizer, examples, selector, "contains") for engine in (ReplayEngine, NaiveEngine))
    assert scored_texts(replay, budgets) == scored_texts(naive, budgets)


@pytest.mark.model
def test_what_is_kept_does_not_depend_on_the_question(smollm2):
    model, tokenizer = smollm2
    examples = under_protocol(AGNOSTIC, people(tokenizer))
    prefill = Prefiller(model, [get_selector("snapkv")])
    prompts = [each.prompt for each in encode_examples(tokenizer, model, examples)]
    kept = []
    with tokens_read(model) as read:
        for ids in prompts:
            layers = prefill(ids).kv_layers
            kept.append([layer.rankings[get_selector("snapkv")][..., :64].sort().values for layer in layers])
    for other in kept[1:]:
        assert all(torch.equal(a, b) for a, b in zip(kept[0], other, strict=True))
    # One context is read once: of every further question's prompt only the window's queries are computed again.
    tokens_of_context = prompts[0].shape[1]
    assert read == [tokens_of_context] + [32] * (len(prompts) - 1)


def test_evaluation_names_its_protocol_and_compresses_the_context(small):
    model, tokenizer = small
    settings = {"task": "niah:context=300", "methods": ["full", "snapkv"], "budgets": [48], "samples": 2}
    settings |= {"metric": "logprob"}
    aware = evolkv.evaluate(model, tokenizer, **settings)
    agnostic = evolkv.evaluate(model, tokenizer, protocol="agnostic", **settings)
    assert {row["protocol"] for row in aware} == {"aware"}
    assert {row["protocol"] for row in agnostic} == {"agnostic"}
    examples = under_protocol(AGNOSTIC, get_task("niah:context=300").examples("report", 2, tokenizer))
    contexts = [ids.shape[1] for ids in (each.prompt for each in encode_examples(tokenizer, model, examples))]
    assert agnostic[0]["mean_budget"] == np.mean(contexts) < aware[0]["mean_budget"]
    assert agnostic[1]["mean_budget"] == 48
    # The whole context with the question after it is the same text.
    assert agnostic[0]["score"] == pytest.approx(aware[0]["score"], rel=1e-4)


def test_search_can_evolve_for_questions_that_come_later(small):
    model, tokenizer = small
    result = evolkv.search(
        model,
        tokenizer,
        task="niah:context=200",
        budget=64,
        selector="keydiff",
        protocol="agnostic",
        train=2,
        val=2,
        max_evals=8,
        population=4,
        gradient_steps=4,
    )
    assert result.profile.search["protocol"] == "agnostic"
    assert len(result.history) >= 8


@pytest.mark.model
def test_question_and_prompt_together_must_fit_the_model(smollm2):
    model, tokenizer = smollm2
    example = Example("long", "a " * 8000, ("b",), later=" b" * 300)
    with pytest.raises(UsageError, match="more than the model's context"):
        encode_examples(tokenizer, model, [example])
    (question,) = encode_examples(tokenizer, model, [replace(example, prompt="a")], "logprob")
    assert len(question.later) == 300
    assert len(question.target) >= 1


@dataclass(frozen=True)
class Bad(Task):
    """Gives no examples, or what is none."""

    name: ClassVar[str] = "bad"
    gives: object = None

    def examples(self, split, n, tokenizer, seed=0):
        if isinstance(self.gives, Exception):
            raise self.gives
        return self.gives if split == "validation" else [Example(split, f"{split} text", ("mat",))]


@pytest.mark.parametrize(
    ("gives", "error", "words"),
    [
        ([], TaskError, "task 'bad' has no validation examples"),
        ([{"prompt": "text"}], TaskError, "task 'bad' gives a dict among its examples; expected Example"),
        (KeyError("x"), RunError, "task 'bad' cannot draw its examples: KeyError: 'x'"),
    ],
)
def test_a_task_that_gives_no_examples_ends_a_search_in_one_line(small, gives, error, words):
    with pytest.raises(error, match=words):
        evolkv.search(*small, task=Bad(gives), budget=48)


def test_of_a_task_that_gives_more_examples_than_asked_for_the_first_count(small):
    more = [Example(f"e{i}", "text", ("mat",)) for i in range(5)]
    assert draw_examples(Bad(more), "validation", 3, small[1], 0, AWARE) == more[:3]
    assert draw_examples(Bad(cycle(more)), "validation", 3, small[1], 0, AWARE) == more[:3]
