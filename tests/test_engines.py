"""Replay against naive: the same scores and the same texts, and what becomes of memory."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from evolkv.cache import CompressedCache
from evolkv.cache.recording import RecordingCache
from evolkv.cache.replay import RankedPrompt, ReplayCache
from evolkv.errors import ModelError, RunError, UsageError
from evolkv.evaluation import NaiveEngine, ReplayEngine, memory
from evolkv.evaluation.decode import RepetitionPenalty, greedy, target_log_probs
from evolkv.evaluation.local import LocalBackend
from evolkv.evaluation.prefill import Prefiller
from evolkv.evaluation.replay_engine import _candidate_bytes, lowest_changed
from evolkv.evaluation.scoring import encode_examples
from evolkv.evaluation.shards import Request, Shard, ShardedEngine, ShardServer, Sharing
from evolkv.evaluation.workers import Workers
from evolkv.models import describe_model
from evolkv.profile import BudgetProfile
from evolkv.selectors import Selector, get_selector
from evolkv.tasks import Example, get_task
from tiny import (
    FAMILIES,
    KV_HEADS,
    LAYERS,
    STRETCHING,
    VOCABULARY,
    failing,
    scored_texts,
    stretching_model,
    tiny_model,
    tokens,
    tokens_read,
)

SNAPKV = get_selector({"name": "snapkv", "window": 4})


def candidates(count, longest, least=4, seed=0):
    return np.random.default_rng(seed).integers(least, longest + 4, size=(count, LAYERS, KV_HEADS))


def rank(model, prompt, ceiling=1000):
    recorded = Prefiller(model, [SNAPKV])(prompt)
    return RankedPrompt.from_recorded(recorded, SNAPKV, ceiling)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("length", "shared"),
    [(20, 0), (45, 0), (45, 2), pytest.param(20, 2, marks=pytest.mark.slow)],
    ids=["20", "45", "45, lower layers in common", "20, lower layers in common"],
)
def test_replayed_log_probs_equal_those_of_compressed_caches(family, length, shared):
    model = tiny_model(family)
    # Two prompts of different lengths, with answers of different lengths, in one batch.
    prompts, targets = [tokens(1, length), tokens(1, length - 9, seed=2)], [tokens(9, seed=5), tokens(4, seed=6)]
    budgets = candidates(3, length)
    budgets[:, :shared] = budgets[0, :shared]
    ranked = [rank(model, prompt) for prompt in prompts]
    replayed = target_log_probs(
        model,
        ReplayCache(model, ranked, budgets, shared),
        torch.cat([prompt.next_logits.expand(3, -1) for prompt in ranked]),
        [prompt.tokens for prompt in ranked for _ in budgets],
        [target for target in targets for _ in budgets],
    )
    for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        for row, candidate in enumerate(budgets):
            cache = CompressedCache(model, BudgetProfile.from_budgets(model, candidate, SNAPKV.to_dict()))
            first = model(prompt, cache=cache).logits[:, -1]
            (alone,) = target_log_probs(model, cache, first, [prompt.shape[1]], [target])
            torch.testing.assert_close(replayed[3 * i + row], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["OPT", "GPT2", "GPTBigCode"])
def test_models_that_call_the_width_of_their_layers_otherwise_are_replayed(tokenizer, kind):
    width = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96} if kind == "OPT" else {"n_embd": 64}
    shape = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": len(tokenizer), **width}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**shape, max_position_embeddings=512)
    model = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(config).eval()
    examples = [Example("e", "one two three four five six seven eight nine ten " * 4, ("eleven twelve",))]
    budgets = np.random.default_rng(0).integers(9, 30, (3, LAYERS, describe_model(model).num_kv_heads))
    selector = get_selector({"name": "snapkv", "window": 4})
    replay, naive = (engine(model, tokenizer, examples, selector) for engine in (ReplayEngine, NaiveEngine))
    np.testing.assert_allclose(replay.score(budgets), naive.score(budgets), rtol=1e-4)


def test_lowest_changed_layer_is_where_candidates_begin_to_differ():
    budgets = np.full((3, 4, 2), 8)
    assert lowest_changed(budgets) == 0
    budgets[1, 2, 1] = 9
    assert lowest_changed(budgets) == 2
    budgets[2, 0, 0] = 9
    assert lowest_changed(budgets) == 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "qwen3_next", "bamba"])
def test_replayed_greedy_tokens_equal_generate(family):
    model = tiny_model(family)
    prompt = tokens(1, 45)
    budgets = candidates(4, 45)
    ranked = rank(model, prompt)
    logits = ranked.next_logits.expand(4, -1)
    replayed = greedy(model, ReplayCache(model, [ranked], budgets), logits, [45] * 4, [12] * 4, end=())
    for row, candidate in enumerate(budgets):
        cache = CompressedCache(model, BudgetProfile.from_budgets(model, candidate, SNAPKV.to_dict()))
        text = model.generate(prompt, cache=cache, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert replayed[row] == text[0, 45:].tolist()


@pytest.mark.parametrize("selector", ["snapkv", "tova", "knorm", "streaming_llm", "h2o"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_shared_prefix_gives_the_same_recording_as_a_prefill_of_its_own(family, selector):
    model = tiny_model(family)
    chosen = get_selector({"name": selector, **({"window": 4} if selector in ("snapkv", "h2o") else {})})
    first, second = tokens(1, 90), tokens(1, 80)
    second[:, 60:] = tokens(1, 20, seed=9)
    shared = Prefiller(model, [chosen])
    with tokens_read(model) as read:
        shared(first)
        after = shared(second)
    alone = Prefiller(model, [chosen])(second)
    assert read == [90, 80 if selector == "h2o" else 20]
    torch.testing.assert_close(after.next_logits, alone.next_logits, atol=1e-5, rtol=0)
    for got, expected in zip(after.kv_layers, alone.kv_layers, strict=True):
        torch.testing.assert_close(got.held()[0], expected.held()[0], atol=1e-5, rtol=0)
        assert torch.equal(got.rankings[chosen], expected.rankings[chosen])


@dataclass(frozen=True)
class MeanQuery(Selector):
    """Keeps keys like the mean query, and says nothing of the queries that it looks at."""

    name = "mean_query"

    def score(self, prompt):
        mean = prompt.query.mean(2).unflatten(1, (prompt.key.shape[1], -1)).mean(2)
        return (prompt.key @ mean[..., None]).squeeze(-1)


@dataclass(frozen=True)
class Attended(Selector):
    """Keeps what the middle of the prompt attends to, and says that it looks at the last query."""

    name = "attended"
    observed_queries = 1

    def score(self, prompt):
        return F.pad(prompt.probabilities(30, 31)[..., 0, :].mean(2), (0, prompt.num_tokens - 31))


def test_a_selector_that_says_nothing_of_its_queries_is_given_all():
    model, prompt = tiny_model(), tokens(1, 60)
    shared = Prefiller(model, [MeanQuery()])
    shared(torch.cat([prompt[:, :50], tokens(1, 20, seed=1)], dim=1))
    after, alone = shared(prompt), Prefiller(model, [MeanQuery()])(prompt)
    for got, expected in zip(after.kv_layers, alone.kv_layers, strict=True):
        assert torch.equal(got.rankings[MeanQuery()], expected.rankings[MeanQuery()])


def test_a_selector_that_looks_at_more_queries_than_it_says_is_named_the_setting():
    model, prompt = tiny_model(), tokens(1, 60)
    shared = Prefiller(model, [Attended()])
    shared(prompt)
    with pytest.raises(UsageError, match="observed_queries must be"):
        shared(torch.cat([prompt[:, :50], tokens(1, 20, seed=1)], dim=1))


def test_nothing_is_shared_with_a_prefill_that_failed():
    model = tiny_model()
    chosen = get_selector({"name": "snapkv", "window": 4})
    first, second, third = (tokens(1, 90) for _ in range(3))
    second[:, 40:], third[:, 60:] = tokens(1, 50, seed=8), tokens(1, 30, seed=9)
    prefill = Prefiller(model, [chosen])
    prefill(first)

    with failing(model.model.layers[1]):
        prefill(second)
    assert torch.equal(prefill(third).next_logits, Prefiller(model, [chosen])(third).next_logits)


@pytest.mark.parametrize("kind", STRETCHING)
def test_nothing_is_shared_with_a_prompt_whose_keys_were_turned_otherwise(kind):
    model = stretching_model(kind, 64)
    chosen = get_selector({"name": "snapkv", "window": 4})
    first, second = tokens(1, 60), torch.cat([tokens(1, 60)[:, :45], tokens(1, 35, seed=9)], dim=1)
    prefill = Prefiller(model, [chosen])
    prefill(first)
    after = prefill(second).next_logits
    assert torch.equal(after, Prefiller(model, [chosen])(second).next_logits)


def test_candidates_fan_out_while_other_threads_run_the_model():
    # Hooks come and go with caches; what a thread computes must not depend on the others'.
    model = tiny_model(num_hidden_layers=6)
    budgets = np.full((2, 6, KV_HEADS), 20)
    budgets[1, 5] = 30
    answer = tokens(6)

    def scores(seed, calls):
        prompt = rank(model, tokens(1, 40, seed=seed))
        for _ in range(calls):
            cache = ReplayCache(model, [prompt], budgets, shared=5)
            logits = prompt.next_logits.expand(2, -1)
            yield target_log_probs(model, cache, logits, [40, 40], [answer, answer])

    expected = [next(scores(seed, 1)) for seed in range(3)]

    def check(seed):
        return all(torch.equal(*pair) for each in scores(seed, 60) for pair in zip(each, expected[seed], strict=True))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(check, range(3)))
    finally:
        sys.setswitchinterval(interval)


def test_greedy_stops_as_soon_as_every_row_has_ended():
    model = tiny_model()
    prompt = tokens(1, 30)
    ranked = rank(model, prompt)
    budgets = candidates(3, 30)
    logits = ranked.next_logits.expand(3, -1)
    free = greedy(model, ReplayCache(model, [ranked], budgets), logits, [30] * 3, [8] * 3, end=())
    calls = []
    handle = model.register_forward_hook(lambda *a: calls.append(1))
    end = {row[2] for row in free}
    ended = greedy(model, ReplayCache(model, [ranked], budgets), logits, [30] * 3, [8] * 3, end=end)
    handle.remove()
    for row, text in zip(ended, free, strict=True):
        assert row == text[: next(i for i, token in enumerate(text) if token in end)]
    assert len(calls) == max(len(row) for row in ended)


def test_ranked_prompt_holds_no_more_than_the_ceiling():
    model = tiny_model()
    ranked = rank(model, tokens(1, 60), ceiling=10)
    assert {key.shape[1] for key in ranked.keys} == {10}
    assert all(key.untyped_storage().nbytes() == key.nbytes for key in ranked.keys)


def test_recording_cache_keeps_everything():
    model = tiny_model("mistral")
    cache = RecordingCache(model, [SNAPKV])
    model(tokens(1, 60), cache=cache)
    assert all(layer.held()[0].shape[2] == 60 for layer in cache.layers)


@pytest.fixture(scope="module")
def needles(smollm2):
    model, tokenizer = smollm2
    return model, tokenizer, get_task("niah:context=300").examples("train", 2, tokenizer, 0)


@pytest.fixture(scope="module")
def small_needles(small):
    model, tokenizer = small
    return model, tokenizer, get_task("niah:context=300").examples("train", 2, tokenizer, 0)


def smollm2_candidates(longest):
    random = np.random.default_rng(1)
    layers = np.repeat(random.integers(33, longest, size=(1, 30, 1)), 3, axis=2)
    return np.concatenate([np.full((1, 30, 3), 40), layers, random.integers(33, longest, size=(1, 30, 3))])


@pytest.mark.slow
@pytest.mark.model
def test_replay_equals_naive_on_smollm2(needles):
    model, tokenizer, examples = needles
    selector = get_selector("snapkv")
    budgets = smollm2_candidates(300)
    replay, naive = (engine(model, tokenizer, examples, selector) for engine in (ReplayEngine, NaiveEngine))
    expected = naive.score(budgets)
    scores = replay.score(budgets)
    assert scores.shape == (3, 2)
    assert np.abs(scores - expected).max() <= 1e-4
    assert np.ptp(scores) > 0.01
    replay, naive = (engine(model, tokenizer, examples, selector, "contains") for engine in (ReplayEngine, NaiveEngine))
    assert scored_texts(replay, budgets) == scored_texts(naive, budgets)


@pytest.mark.slow
@pytest.mark.model
def test_replay_equals_naive_on_smollm2_in_bfloat16(smollm2):
    model, tokenizer = smollm2
    model = type(model)(model.config).to(torch.bfloat16).eval()
    model.load_state_dict({name: value.bfloat16() for name, value in smollm2[0].state_dict().items()})
    examples = get_task("niah:context=200").examples("train", 1, tokenizer, 0)
    budgets = smollm2_candidates(200)[[0, 2]]
    selector = get_selector("snapkv")
    replay, naive = (engine(model, tokenizer, examples, selector) for engine in (ReplayEngine, NaiveEngine))
    assert np.abs(replay.score(budgets) - naive.score(budgets)).max() <= 1e-2


def test_splitting_the_population_changes_no_score(small_needles, monkeypatch):
    model, tokenizer, examples = small_needles
    engine = ReplayEngine(model, tokenizer, examples, get_selector("snapkv"))
    budgets = candidates(3, 300, least=33)
    whole = engine.score(budgets)
    assert engine.score(budgets[:0]).shape == (0, len(examples))
    monkeypatch.setattr(engine, "_rows_at_once", lambda ranked: 1)
    np.testing.assert_allclose(engine.score(budgets), whole, atol=1e-5)


@pytest.mark.model
def test_a_limit_too_small_for_the_snapshots_is_a_clear_error(needles):
    model, tokenizer, examples = needles
    with pytest.raises(RunError, match=r"snapshots of 2 examples need about 2\d MiB, and 5 MiB may be used"):
        ReplayEngine(model, tokenizer, examples, get_selector("snapkv"), memory_limit=5 * 2**20)


@pytest.mark.model
def test_a_limit_too_small_for_one_candidate_is_a_clear_error(needles):
    model, tokenizer, examples = needles
    engine = ReplayEngine(model, tokenizer, examples[:1], get_selector("snapkv"), memory_limit=14 * 2**20)
    with pytest.raises(RunError, match="one candidate on example"):
        engine.score(smollm2_candidates(300))


@pytest.mark.parametrize("reversed_", [False, True])
def test_snapshots_are_refused_only_where_their_sum_does_not_fit(tokenizer, reversed_, monkeypatch):
    model = tiny_model("gemma3", vocab_size=len(tokenizer))
    examples = [Example(f"{n}", "a b " * n, ("x",)) for n in (60, 4, 4, 4)][:: -1 if reversed_ else 1]
    lengths = [question.tokens for question in encode_examples(tokenizer, model, examples, "logprob")]
    held = ReplayEngine(model, tokenizer, examples, SNAPKV).held_bytes
    for free, fits in ((held + 2, True), (held - 2, False)):
        monkeypatch.setattr("evolkv.evaluation.shards.free_memory", lambda model, free=free: free / 0.9)
        backend, read = LocalBackend(model, tokenizer, workers=1), []
        with contextlib.nullcontext() if fits else pytest.raises(RunError, match="snapshots of 4 examples need about"):
            ShardedEngine(
                *(backend, examples, SNAPKV, "logprob", 1000),
                on_progress=lambda done, total, read=read: read.append(done),
                tokens=lengths,
            )
        # What all prompts hold is known from the first.
        assert len(read) == (4 if fits else 0)


def test_examples_that_are_not_there_are_refused(small_needles):
    model, tokenizer, examples = small_needles
    backend = LocalBackend(model, tokenizer, workers=1)
    engine = ShardedEngine(backend, examples, SNAPKV, "logprob", 300)
    budgets = np.full((1, LAYERS, KV_HEADS), 64)
    with pytest.raises(IndexError, match=re.escape(f"[{len(examples)}] of {len(examples)}")):
        engine.score(budgets, [0, len(examples)])
    with pytest.raises(IndexError):
        engine.slope(budgets.astype(float), 4.0, [-1])
    backend.close()


def test_the_full_caches_logits_count_among_the_snapshots(small_needles):
    held = ReplayEngine(*small_needles, SNAPKV, "fidelity").held_bytes
    assert ReplayEngine(*small_needles, SNAPKV, "fidelity", memory_limit=held).room == 0
    with pytest.raises(RunError, match="snapshots of 2 examples need about"):
        ReplayEngine(*small_needles, SNAPKV, "fidelity", memory_limit=held - 1)


@pytest.mark.slow
@pytest.mark.model
def test_candidates_may_take_what_the_snapshots_of_all_shards_leave(needles, monkeypatch):
    model, tokenizer, examples = needles
    examples, budgets = examples * 4, smollm2_candidates(300)[:1]
    alone = ReplayEngine(model, tokenizer, examples[:1], get_selector("snapkv"), memory_limit=2**30)
    # Enough for the snapshots and for one candidate; a third of it, the share of a shard, is not enough for both.
    room = len(examples) * alone.held_bytes + 20 * 2**20
    monkeypatch.setattr("evolkv.evaluation.shards.free_memory", lambda model: room / 0.9)
    alone.room = room // 3 - 3 * alone.held_bytes
    with pytest.raises(RunError, match="one candidate on example"):
        alone.score(budgets)
    backend = LocalBackend(model, tokenizer, workers=1)
    engine = ShardedEngine(backend, examples, get_selector("snapkv"), "logprob", 300)
    assert np.isfinite(engine.score(budgets)).all()
    backend.close()


@pytest.mark.model
def test_as_many_rows_are_scored_at_once_as_fit_with_their_masks(needles, monkeypatch):
    """A row on a long answer has a mask over the answers of all rows beside it, and alone only over its own."""
    model, tokenizer, examples = needles
    long = replace(examples[0], target="word " * 600)
    engine = ReplayEngine(model, tokenizer, [long], get_selector("snapkv"))
    (ranked,), new = engine._held, engine.questions[0].answer_tokens
    prompt = ranked.prompt
    assert new > 600
    # On so long an answer a second row would cost more than another batch.
    assert engine._rows_at_once(ranked) == 1
    monkeypatch.setattr("evolkv.evaluation.replay_engine._MAX_TOKENS", 100 * new)
    each, pair = _candidate_bytes(model, prompt, new, new)
    shared = 2 * max(key.nbytes + value.nbytes for key, value in zip(prompt.keys, prompt.values, strict=True))
    for rows in (1, 2, 7):
        engine.room = shared + rows * each + rows**2 * pair + 1
        assert engine._rows_at_once(ranked) == rows
    engine.room = shared + each + pair - 2**20
    with pytest.raises(RunError, match="one candidate on example"):
        engine._rows_at_once(ranked)


@pytest.mark.parametrize(("replicas", "threads"), [(1, 1), (1, 2), (2, 1)])
def test_room_for_candidates_is_shared_by_those_who_compute(small_needles, replicas, threads):
    model, tokenizer, examples = small_needles
    server = ShardServer(model, tokenizer)
    shards = [Shard(f"0/{i}", tuple(examples), get_selector("snapkv"), "logprob", 300, hold=True) for i in range(2)]
    sharing, budgets = Sharing((), replicas, threads), candidates(3, 300, least=33)[:1]
    for shard in shards:
        server.serve(Request(shard, sharing), lambda: None)
    server.serve(Request(shards[0], sharing, budgets, (0,)), lambda: None)
    engines = list(server._held.values())
    held = sum(engine.held_bytes for engine in engines)
    assert engines[0].room == (server._memory // replicas - held) // threads


def test_streaming_scores_equal_held_ones(small_needles):
    model, tokenizer, examples = small_needles
    selector, budgets = get_selector("snapkv"), candidates(3, 300, least=33)[:1]
    held, streamed = (ReplayEngine(model, tokenizer, examples, selector, hold=hold) for hold in (True, False))
    np.testing.assert_allclose(streamed.score(budgets), held.score(budgets), atol=1e-6)


def test_prompt_beyond_the_context_is_refused_by_name(small):
    model, tokenizer = small
    example = Example(id="long", prompt="word " * 9000, references=("x",))
    for engine in (ReplayEngine, NaiveEngine):
        with pytest.raises(
            UsageError,
            match=r"example long: the prompt has 900\d tokens and its answer up to 1, more than the model's context",
        ):
            engine(model, tokenizer, [example], get_selector("snapkv"))


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_repetition_penalty_is_that_of_generate(penalty):
    model = tiny_model()
    model.generation_config.repetition_penalty = penalty
    prompt, budgets = tokens(1, 45), candidates(4, 45)
    ranked = rank(model, prompt)
    logits = ranked.next_logits.expand(4, -1)
    applied = RepetitionPenalty.of(model, [prompt[0]] * 4, prompt[0, :0], logits)
    texts = greedy(model, ReplayCache(model, [ranked], budgets), logits, [45] * 4, [20] * 4, (), penalty=applied)
    for text, candidate in zip(texts, budgets, strict=True):
        cache = CompressedCache(model, BudgetProfile.from_budgets(model, candidate, SNAPKV.to_dict()))
        expected = model.generate(prompt, cache=cache, max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert text == expected[0, 45:].tolist()
    assert (applied is None) == (penalty == 1)


@pytest.mark.parametrize("later", ["", " And the sea"])
def test_engines_and_evaluation_apply_the_repetition_penalty_alike(small, monkeypatch, later):
    model, tokenizer = small
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.5)
    example = Example(id="a", prompt="The sky is blue and blue is the sky. " * 9, references=("x",), later=later)
    budgets = np.full((1, LAYERS, KV_HEADS), 300)
    selector = get_selector("snapkv")
    settings = (model, tokenizer, [example], selector, "contains")
    replay, naive = ReplayEngine(*settings), NaiveEngine(*settings)
    (replayed,) = scored_texts(replay, budgets)
    assert [replayed] == scored_texts(naive, budgets)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", None)
    assert [replayed] != scored_texts(ReplayEngine(*settings), budgets)


@pytest.mark.parametrize("engine", [ReplayEngine, NaiveEngine])
@pytest.mark.parametrize("metric", ["logprob", "contains"])
def test_a_model_whose_logits_are_not_numbers_scores_nothing(metric, metaspace, engine):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    example = Example(id="a", prompt="b c d e f g h", references=("c",))
    with pytest.raises(RunError, match="not a number"):
        engine(model, metaspace, [example], SNAPKV, metric).score(np.full((2, LAYERS, KV_HEADS), 8))


@pytest.fixture
def metaspace():
    """A tokenizer that puts a space before whatever it is given, as Llama 2's does."""
    marks = "▁abcdefgh"
    vocabulary = {"<pad>": 0, "<end>": 1, "<start>": 2} | {mark: 3 + i for i, mark in enumerate(marks)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def test_answers_and_late_questions_are_encoded_as_they_continue_the_prompt(metaspace):
    example = Example(id="x", prompt="a b", later="c d", references=("e",), target=" e f")
    (question,) = encode_examples(metaspace, tiny_model(), [example], "logprob")
    pieces = [metaspace.convert_ids_to_tokens(ids) for ids in (question.later, question.target)]
    assert pieces == [["c", "▁", "d"], ["▁", "e", "▁", "f"]]


def test_an_answer_that_would_share_a_token_with_the_prompt_is_encoded_on_its_own(small):
    model, tokenizer = small
    example = Example(id="x", prompt="The answ", references=("er",), target="er is here")
    (question,) = encode_examples(tokenizer, model, [example], "logprob")
    assert question.target.tolist() == tokenizer("er is here")["input_ids"]
    assert tokenizer("The answer is here")["input_ids"][:2] != tokenizer("The answ")["input_ids"][:2]


def test_token_ids_without_embeddings_are_refused_with_both_numbers(metaspace):
    metaspace.add_tokens(["extra"] + [f"more{i}" for i in range(VOCABULARY)])
    model = tiny_model()
    plain, beyond = (Example(id=text, prompt="a b", references=(text,)) for text in ("c", f"more{VOCABULARY - 1}"))
    assert encode_examples(metaspace, model, [plain], "logprob")
    with pytest.raises(ModelError, match=rf"gives token {VOCABULARY + 12}, but .* embeddings for {VOCABULARY} tokens"):
        encode_examples(metaspace, model, [beyond], "logprob")


@pytest.fixture
def control_group(tmp_path, monkeypatch):
    """Writes the files of a control group, by name, and makes it this process's."""

    def make(line, **files):
        (tmp_path / "cgroup").write_text(line)
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(memory, "_PROCESS", tmp_path / "cgroup")
        monkeypatch.setattr(memory, "_GROUPS", tmp_path)

    return make


def test_free_memory_is_what_the_control_group_leaves(control_group):
    model = tiny_model()
    stat = {"job__memory_dot_stat": "anon 5\ninactive_file 100\n"}
    control_group("0::/job/step", job__memory_dot_max="1000", job__memory_dot_current="400", **stat)
    assert memory.free_memory(model) == 700
    control_group("0::/job/step", job__memory_dot_max="max")
    assert memory.free_memory(model) > 10**6


def test_free_memory_is_what_a_control_group_of_the_first_version_leaves(control_group):
    files = {
        "memory__memory_dot_limit_in_bytes": "1000",
        "memory__memory_dot_usage_in_bytes": "990",
        "memory__memory_dot_stat": "total_inactive_file 0\n",
    }
    # The path is the host's, which a container does not see.
    control_group("3:cpu,cpuacct:/x\n5:memory:/docker/0123", **files)
    assert memory.free_memory(tiny_model()) == 10


def test_free_memory_of_a_model_on_several_devices_is_that_of_the_fullest(monkeypatch):
    model = tiny_model()
    for number, layer in enumerate(model.model.layers):
        layer._hf_hook = SimpleNamespace(execution_device="cuda:1" if number == 0 else "cuda:0")
    free = {torch.device("cuda:0"): 900, torch.device("cuda:1"): 200}
    monkeypatch.setattr(memory, "free_on", free.__getitem__)
    assert memory.free_memory(model) == 800
    free[torch.device("cuda:0")] = 300
    assert memory.free_memory(model) == 400


def test_an_answer_beyond_the_context_is_refused(small):
    example = Example(id="long", prompt="word " * 8100, references=("x",), max_new_tokens=500)
    with pytest.raises(UsageError, match=r"its answer up to 500, more than the model's context of 8192"):
        ReplayEngine(*small, [example], get_selector("snapkv"), "contains", hold=False)
    ReplayEngine(*small, [example], get_selector("snapkv"), "logprob", hold=False)


def test_a_job_that_nobody_waits_for_ends_while_it_generates():
    model, prompt, ended = tiny_model(), tokens(1, 30), threading.Event()
    ranked, begun = rank(model, prompt), threading.Event()

    def generates(step):
        cache = ReplayCache(model, [ranked], candidates(1, 30))
        step()
        begun.set()
        try:
            greedy(model, cache, ranked.next_logits.expand(1, -1), [30], [100_000], ())
        finally:
            ended.set()

    def interrupt():
        raise KeyboardInterrupt

    workers = Workers(torch.device("cpu"), 2)
    if workers.count < 2:
        pytest.skip("one core")
    with pytest.raises(KeyboardInterrupt):
        workers.run([generates, lambda step: begun.wait(60)], interrupt)
    workers.close()
    assert ended.wait(20)
