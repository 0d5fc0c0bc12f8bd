"""RocketKV: what it keeps, what new tokens read of it, and that a cache which reads less is a cache like others."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evolkv
from evolkv import BudgetProfile, CompressedCache
from evolkv.cache.reading import Pages, chosen_entries
from evolkv.cache.replay import RankedPrompt, ReplayCache
from evolkv.errors import UsageError
from evolkv.evaluation import NaiveEngine, ReplayEngine
from evolkv.evaluation.decode import greedy, target_log_probs
from evolkv.evaluation.prefill import Prefiller
from evolkv.report.tables import results_table
from evolkv.selectors import PromptAttention, RocketKV, get_selector
from evolkv.tasks import get_task
from reading_reference import UndecidedError, chosen, split
from tiny import HEAD_DIM, KV_HEADS, LAYERS, tiny_model, tokens

#: Reads 6 entries' worth of 24: two pages' scores in half of the channels, three tokens.
READS = "rocketkv:window=4,kernel=3,read=6"


def prefilled(model, ids, selector=READS, budget=24, profile=None):
    return CompressedCache.prefill(model, profile or BudgetProfile.uniform(model, budget, selector), ids)


def steps(model, cache, ids):
    """Logits of tokens that are read one by one, ``[batch, tokens, vocabulary]``."""
    with torch.inference_mode():
        return torch.cat([model(ids[:, [i]], cache=cache).logits for i in range(ids.shape[1])], dim=1)


# What is kept.


def test_the_score_is_the_windows_attention_summed_over_window_and_query_heads_then_pooled():
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8)
    scores = RocketKV(window=5, kernel=3).score(PromptAttention(query, key, key, 0.3))
    logits = query[0, :, -5:] @ key[0].repeat_interleave(2, 0).transpose(1, 2) * 0.3
    logits = logits.masked_fill(torch.ones(5, 30).triu(26).bool(), float("-inf"))
    votes = logits.softmax(-1)[:, :, :25].sum(1).view(2, 2, 25).sum(1)
    expected = torch.stack([F.pad(votes, (1, 1))[:, i : i + 25] for i in range(3)]).amax(0)
    assert torch.allclose(scores[0, :, :25], expected, atol=1e-6)
    assert bool(scores[0, :, 25:].isinf().all())


@pytest.mark.parametrize(("tokens", "read"), [(7900, 128), (7900, 256), (1600, 64), (100_000, 128), (400_000, 16)])
def test_a_token_budget_comes_back_from_what_the_papers_split_holds_under_it(tokens, read):
    held = split(tokens, read)
    assert abs(RocketKV().entries_read(held, tokens, held) - read) <= 1
    assert RocketKV(read=40).entries_read(held, tokens, held) == 40
    assert RocketKV(held=held).entries_read(held, tokens, 70) == 70


@pytest.mark.parametrize("spec", ["window=0", "kernel=4", "read=1", "read=-3", "held=32"])
def test_parameters_out_of_range_are_refused(spec):
    with pytest.raises(UsageError, match=rf"^rocketkv: {spec.partition('=')[0]} is "):
        get_selector(f"rocketkv:{spec}")


# What is read.


def test_a_token_attends_to_the_entries_that_the_equations_choose():
    torch.manual_seed(0)
    undecided = 0
    for held, read in ((12, 10), (20, 6), (37, 8), (60, 5), (64, 4)):
        reading = RocketKV(read=read).reading(held, 100, 8, held)
        keys = torch.randn(2, held, 8)
        pages = Pages(keys, reading.page) if reading.page > 1 else None
        for _ in range(4):
            query, key = torch.randn(2, 3, 8), torch.randn(2, 1, 8)
            keys = torch.cat([keys, key], dim=1)
            if pages is not None:
                pages.append(key[:, 0])
            found = chosen_entries(query, keys, pages, reading, 0.7).sort().values
            for row in range(2):
                try:
                    assert found[row].tolist() == chosen(query[row], keys[row], held, read, 0.7, margin=1e-6)
                except UndecidedError:
                    undecided += 1
    assert undecided <= 2


def test_what_may_read_as_much_as_it_holds_is_read_whole():
    model, ids = tiny_model(), tokens(1, 40)
    later = tokens(1, 5, seed=1)
    plain = steps(model, prefilled(model, ids, "rocketkv:window=4,kernel=3,read=24"), later)
    with torch.inference_mode():
        whole = CompressedCache.prefill(
            model, BudgetProfile.uniform(model, 24, "rocketkv:window=4,kernel=3,read=24"), ids
        )
        assert {layer.selector.reading(24, 40, HEAD_DIM, 24) for layer in whole.kv_layers} == {None}
        assert whole.read_bytes == whole.kv_bytes
    assert not torch.allclose(plain, steps(model, prefilled(model, ids), later), atol=1e-3)


def test_a_budget_that_covers_the_prompt_changes_nothing():
    model, ids, later = tiny_model(), tokens(1, 30), tokens(1, 6, seed=1)
    with torch.inference_mode():
        expected = model(torch.cat([ids, later], dim=1)).logits[:, 30:]
    assert torch.allclose(steps(model, prefilled(model, ids, "rocketkv:window=4", 30), later), expected, atol=1e-5)


def test_bytes_held_and_read_are_those_of_entries_extremes_and_choices():
    model, ids = tiny_model(), tokens(2, 40)
    cache = prefilled(model, ids)
    reading = RocketKV(read=6).reading(24, 40, HEAD_DIM, 24)
    assert (reading.tokens, reading.page, reading.channels) == (3, 2, HEAD_DIM // 2)
    rows, entry = 2 * LAYERS * KV_HEADS, 2 * HEAD_DIM * 4
    assert cache.kv_bytes == rows * (24 * entry + 12 * 2 * HEAD_DIM * 4)
    assert cache.read_bytes == rows * (3 * entry + 12 * HEAD_DIM // 2 * 4)
    assert cache.read_bytes_by_sequence == [cache.read_bytes // 2] * 2
    assert sum(cache.kv_bytes_by_sequence) == cache.kv_bytes
    steps(model, cache, tokens(2, 1, seed=1))
    # A thirteenth page.
    assert cache.read_bytes == rows * (3 * entry + 13 * HEAD_DIM // 2 * 4)
    plain = prefilled(model, ids, "snapkv:window=4")
    assert plain.read_bytes == plain.kv_bytes == rows * 24 * entry


def test_reserved_room_of_extremes_counts_as_held():
    model = tiny_model()
    cache = prefilled(model, tokens(1, 60))
    steps(model, cache, tokens(1, 6, seed=1))
    held = [layer._pages[0]._extremes.untyped_storage().nbytes() for layer in cache.kv_layers]
    assert cache.kv_bytes == sum(held) + sum(group.nbytes for layer in cache.kv_layers for group in layer.groups)
    assert sum(cache.kv_bytes_by_sequence) < cache.kv_bytes


def test_budgets_say_what_is_read_where_the_selector_says_what_is_held():
    model, ids, later = tiny_model(), tokens(2, 40), tokens(2, 5, seed=1)
    held = "rocketkv:window=4,kernel=3,held=24"
    same, narrow = prefilled(model, ids), prefilled(model, ids, held, 6)
    assert (narrow.kv_bytes, narrow.read_bytes) == (same.kv_bytes, same.read_bytes)
    assert torch.equal(steps(model, narrow, later), steps(model, same, later))
    wide = prefilled(model, ids, held, 12)
    assert wide.positions[0][0][0].tolist() == same.positions[0][0][0].tolist()
    assert narrow.read_bytes < wide.read_bytes
    # Beyond what is held there is nothing to read, and short prompts are held whole.
    assert prefilled(model, ids, held, 60).read_bytes == 2 * LAYERS * KV_HEADS * 24 * 2 * HEAD_DIM * 4
    assert prefilled(model, ids[:, :20], held, 60).positions[0][0][0].tolist() == [*range(20)]


# A cache like others.


@pytest.mark.parametrize("question", [0, 3])
def test_a_given_answer_is_scored_as_it_would_be_generated(question):
    model, ids = tiny_model(), tokens(1, 40)
    later, target = tokens(question, seed=1), tokens(7, seed=2)
    with torch.inference_mode():
        logits = model(ids).logits[:, -1]
        (scored,) = target_log_probs(model, prefilled(model, ids), logits, [40], [target], [later])
        cache, first = prefilled(model, ids), logits
        if question:
            first = model(later[None], cache=cache).logits[:, -1]
        each = torch.cat([first[:, None], steps(model, cache, target[None, :-1])], dim=1)[0].log_softmax(-1)
        dense = prefilled(model, ids)
        whole = model(torch.cat([later, target])[None, :-1], cache=dense).logits[0, question:].log_softmax(-1)
    assert torch.allclose(scored, each.gather(1, target[:, None])[:, 0], atol=1e-5)
    assert not torch.allclose(scored[1:], whole[-6:].gather(1, target[1:, None])[:, 0], atol=1e-3)


def test_a_copy_a_file_and_repeated_sequences_go_on_alike(tmp_path):
    model, ids, later = tiny_model(), tokens(2, 40), tokens(2, 6, seed=1)
    cache = prefilled(model, ids)
    steps(model, cache, later[:, :3])
    twin = copy.copy(cache)
    cache.input_ids = torch.cat([ids, later[:, :3]], dim=1)
    cache.save(tmp_path / "a.cache")
    loaded = CompressedCache.load(tmp_path / "a.cache", model)
    assert loaded.read_bytes == cache.read_bytes
    expected = steps(model, cache, later[:, 3:])
    assert torch.equal(steps(model, twin, later[:, 3:]), expected)
    assert torch.equal(steps(model, loaded, later[:, 3:]), expected)
    twin.batch_repeat_interleave(2)
    again = steps(model, twin, later[:, :1].repeat_interleave(2, 0))
    assert torch.allclose(again[::2], steps(model, cache, later[:, :1]), atol=1e-5)


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_beams_and_drafts_give_what_they_should(way):
    model = tiny_model()
    ids = tokens(1, 8).repeat(1, 5)
    profile = BudgetProfile.uniform(model, 24, READS)
    mask = torch.ones_like(ids)

    def generated(**options):
        return model.generate(
            ids,
            attention_mask=mask,
            cache=CompressedCache(model, profile),
            max_new_tokens=12,
            do_sample=False,
            **options,
        )

    if "num_beams" not in way:
        assert torch.equal(generated(**way), generated())
        return
    best = generated(**way)[0, 40:]
    with torch.inference_mode():
        logits = model(ids).logits[:, -1]
        log_probs = [
            float(target_log_probs(model, prefilled(model, ids), logits, [40], [answer])[0].sum())
            for answer in (best, generated()[0, 40:])
        ]
    assert log_probs[0] >= log_probs[1] - 1e-4


def test_tokens_that_were_taken_back_are_not_chosen_by():
    model = tiny_model(initializer_range=0.2)
    cache = prefilled(model, tokens(1, 60))
    fresh = cache.copy()
    steps(model, cache, tokens(1, 3, seed=1))
    cache.crop(-3)
    with torch.inference_mode():
        for each in (cache, fresh):
            # As many as were taken back, in one call.
            model(tokens(1, 3, seed=2), cache=each)
    got, expected = (steps(model, each, tokens(1, 4, seed=3)) for each in (cache, fresh))
    torch.testing.assert_close(got, expected)


def test_prompts_of_different_lengths_are_read_each_in_its_own_way():
    model, selector = tiny_model(), "rocketkv:window=2,kernel=3"
    ids, later = tokens(2, 40), tokens(2, 5, seed=1)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :15] = 0
    profile = BudgetProfile.uniform(model, 18, selector)
    together = CompressedCache.prefill(model, profile, ids, mask)
    alone = [
        CompressedCache.prefill(model, profile, row[None, real.bool()]) for row, real in zip(ids, mask, strict=True)
    ]
    assert RocketKV().entries_read(18, 25, 18) != RocketKV().entries_read(18, 40, 18)
    assert together.read_bytes_by_sequence == [cache.read_bytes for cache in alone]
    out = []
    with torch.inference_mode():
        for i in range(5):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            places = mask.sum(-1, keepdim=True) - 1
            out.append(model(later[:, [i]], attention_mask=mask, position_ids=places, cache=together).logits)
    got = torch.cat(out, dim=1)
    for i, cache in enumerate(alone):
        assert torch.allclose(got[i], steps(model, cache, later[[i]])[0], atol=1e-5)


def test_merged_caches_answer_as_each_does_although_their_rows_were_taken_apart():
    model, prompts, later = tiny_model(num_key_value_heads=4), tokens(2, 60), tokens(2, 4, seed=1)
    profile = BudgetProfile.from_budgets(model, [[8, 16, 8, 16]] * LAYERS, "rocketkv:held=30,window=4")
    caches = [prefilled(model, ids[None], profile=profile) for ids in prompts]
    # Rows that hold as much as each other, but are read in another way, lie apart from now on.
    assert [len(cache.kv_layers[0].groups) for cache in caches if cache.kv_bytes] == [2, 2]
    expected = [model(question[None], cache=cache.copy()).logits for question, cache in zip(later, caches, strict=True)]
    merged = CompressedCache.merge(model, caches)
    assert torch.allclose(model(later, cache=merged.copy()).logits, torch.cat(expected), atol=1e-5)
    merged.batch_select_indices(torch.tensor([1, 0]))
    assert torch.allclose(model(later.flip(0), cache=merged).logits, torch.cat(expected[::-1]), atol=1e-5)


def test_evaluate_measures_it_beside_others_as_by_itself_and_says_what_is_read(small):
    model, tokenizer = small
    selector, task = "rocketkv:window=8,kernel=7,read=12", "niah:context=240"
    options = {"task": task, "budgets": [60], "samples": 2}
    rows = evolkv.evaluate(model, tokenizer, methods=["full", selector, "snapkv"], **options)
    (alone,) = evolkv.evaluate(model, tokenizer, methods=[selector], **options)
    full, rocket, snapkv = rows
    assert rocket == alone
    assert "read MiB" in results_table(rows).columns
    assert "read MiB" not in results_table([full, snapkv]).columns
    assert rocket["read_bytes"] < rocket["kv_bytes"] / 2
    assert [row["read_bytes"] for row in (full, snapkv)] == [row["kv_bytes"] for row in (full, snapkv)]
    # Generated token by token, or read at once: what is measured is what a user's cache does.
    examples = get_task(task).examples("report", 2, tokenizer, 0)
    scored = evolkv.evaluate(model, tokenizer, methods=[selector], metric="logprob", **options)
    engine = NaiveEngine(model, tokenizer, examples, get_selector(selector), "logprob")
    budgets = np.full((1, LAYERS, KV_HEADS), 60)
    assert scored[0]["score"] == pytest.approx(float(engine.score(budgets).mean()), rel=1e-5)
    question = engine.questions[0]
    cache, logits = engine._prefill(0, budgets[0])
    (text,) = greedy(model, cache, logits, [question.tokens], [8], ())
    ids = model.generate(
        question.prompt,
        attention_mask=torch.ones_like(question.prompt),
        cache=CompressedCache(model, BudgetProfile.uniform(model, 60, selector)),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
    )
    assert ids[0, question.tokens :].tolist() == text


@pytest.mark.parametrize(("read", "held", "shared"), [(6, 0, 0), (0, 0, 0), (6, 0, 2), (0, 33, 0), (0, 20, 2)])
def test_replayed_candidates_read_as_their_caches_do(read, held, shared):
    model, selector = tiny_model(), RocketKV(window=2, kernel=3, read=read, held=held)
    # Prompts, questions (none, one token, several) and answers of different lengths in one batch.
    prompts = [tokens(1, length, seed=length) for length in (40, 31, 35)]
    later = [tokens(count, seed=count) for count in (0, 1, 4)]
    targets = [tokens(count, seed=9 + count) for count in (7, 9, 3)]
    budgets = np.random.default_rng(0).integers(4, 44, size=(4, LAYERS, KV_HEADS))
    budgets[:, :shared] = budgets[0, :shared]
    ranked = [RankedPrompt.from_recorded(Prefiller(model, [selector])(each), selector, 1000) for each in prompts]
    replayed = target_log_probs(
        model,
        ReplayCache(model, ranked, budgets, shared),
        torch.cat([prompt.next_logits.expand(4, -1) for prompt in ranked]),
        [prompt.tokens for prompt in ranked for _ in budgets],
        [target for target in targets for _ in budgets],
        [question for question in later for _ in budgets],
    )
    for i, prompt in enumerate(prompts):
        for row, candidate in enumerate(budgets):
            cache = CompressedCache(model, BudgetProfile.from_budgets(model, candidate, selector.to_dict()))
            with torch.inference_mode():
                first = model(prompt, cache=cache).logits[:, -1]
            (alone,) = target_log_probs(model, cache, first, [prompt.shape[1]], [targets[i]], [later[i]])
            torch.testing.assert_close(replayed[4 * i + row], alone, atol=1e-5, rtol=0)


def test_replayed_candidates_generate_what_their_caches_do():
    model, selector = tiny_model(), RocketKV(window=2, kernel=3, read=6)
    prompt, later = tokens(1, 40), tokens(3, seed=1)
    budgets = np.random.default_rng(1).integers(8, 44, size=(3, LAYERS, KV_HEADS))
    ranked = RankedPrompt.from_recorded(Prefiller(model, [selector])(prompt), selector, 1000)
    logits = ranked.next_logits.expand(3, -1)
    texts = greedy(model, ReplayCache(model, [ranked], budgets), logits, [40] * 3, [9] * 3, (), later)
    for text, candidate in zip(texts, budgets, strict=True):
        cache = CompressedCache(model, BudgetProfile.from_budgets(model, candidate, selector.to_dict()))
        with torch.inference_mode():
            model(prompt, cache=cache)
        assert greedy(model, cache, logits[:1], [40], [9], (), later) == [text]


def test_a_search_finds_budgets_under_it(small):
    model, tokenizer = small
    found = evolkv.search(
        model,
        tokenizer,
        task="niah:context=240",
        budget=40,
        selector="rocketkv:window=8,kernel=7,read=10",
        train=2,
        val=2,
        max_evals=12,
        gradient_steps=2,
    )
    assert found.profile.selector == {"name": "rocketkv", "window": 8, "kernel": 7, "read": 10, "held": 0}
    naive = NaiveEngine(
        model, tokenizer, get_task("niah:context=240").examples("train", 2, tokenizer, 0), RocketKV(8, 7, 10), "logprob"
    )
    replay = ReplayEngine(model, tokenizer, [each.example for each in naive.questions], RocketKV(8, 7, 10), "logprob")
    budgets = np.stack([found.profile.budgets, np.full((LAYERS, KV_HEADS), 40)])
    np.testing.assert_allclose(replay.score(budgets), naive.score(budgets), rtol=1e-4)


def test_a_search_finds_what_is_read_of_what_is_held(small):
    model, tokenizer = small
    settings = {"task": "niah:context=240", "budget": 10, "selector": "rocketkv:window=8,kernel=7,held=60"}
    size = {"train": 2, "val": 2, "max_evals": 12}
    found = evolkv.search(model, tokenizer, granularity="head", **settings, **size)
    assert found.profile.search["start"] == "uniform"
    assert found.profile.total == 10 * LAYERS * KV_HEADS
    assert {row["name"] for row in found.validation} >= {"uniform", "best"}
    assert "lukv" not in {row["name"] for row in found.validation}
    (row,) = evolkv.evaluate(model, tokenizer, task=settings["task"], methods=[found.profile], samples=1)
    (same,) = evolkv.evaluate(
        model, tokenizer, task=settings["task"], methods=["rocketkv:window=8,kernel=7,read=10"], budgets=[60], samples=1
    )
    assert row["kv_bytes"] == pytest.approx(same["kv_bytes"], rel=0.1)
    for start in ("gradient", "lukv"):
        with pytest.raises(UsageError, match=r"^under rocketkv:\S+ budgets say what is read"):
            evolkv.search(model, tokenizer, **settings, start=start)
    with pytest.raises(UsageError, match="leave out read=4"):
        get_selector("rocketkv:held=100,read=4")
    with pytest.raises(UsageError, match="rocketkv_mt holds every token"):
        get_selector("rocketkv_mt:held=100")


def test_the_multi_turn_variant_drops_nothing_and_chooses_anew_after_each_turn(tmp_path):
    model, ids, question = tiny_model(), tokens(1, 40), tokens(1, 6, seed=1)
    cache = prefilled(model, ids, "rocketkv_mt:window=4,kernel=3,read=6")
    plain = prefilled(model, ids)
    assert cache.kv_bytes == LAYERS * KV_HEADS * 40 * 2 * HEAD_DIM * 4 + plain.kv_bytes
    assert sum(cache.kv_bytes_by_sequence) == cache.kv_bytes
    assert cache.read_bytes == plain.read_bytes
    assert all(head.tolist() == list(range(40)) for layer in cache.positions for head in layer)
    later = tokens(1, 4, seed=2)
    # Until a turn comes, it reads what the other variant reads.
    assert torch.allclose(steps(model, copy.copy(cache), later), steps(model, plain, later), atol=1e-5)
    with torch.inference_mode():
        model(question, cache=cache)
    readable = cache.kv_layers[0].readable
    assert readable.prompt_lengths == [46]
    assert readable.kept_positions(0, 0).tolist()[-4:] == [42, 43, 44, 45]
    with pytest.raises(UsageError, match="cannot say what is chosen now"):
        cache.save(tmp_path / "a.cache")
    with pytest.raises(UsageError, match=r"'rocketkv_mt' .*add --engine naive"):
        ReplayEngine(model, None, [], get_selector("rocketkv_mt"))
