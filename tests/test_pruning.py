"""PyramidInfer: layers that let only what they hold of a prompt enter the next one."""

import itertools

import numpy as np
import pytest
import torch

import evolkv
from evolkv import BudgetProfile, CompressedCache
from evolkv.allocators import cosine, non_increasing
from evolkv.errors import BudgetError, ModelError, UsageError
from evolkv.evaluation.naive_engine import NaiveEngine
from evolkv.evolution import OneBudget
from evolkv.selectors import get_selector
from evolkv.tasks import get_task
from tiny import LAYERS, padded, tiny_model, tokens

FALLING = [40, 30, 20, 10]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def pruned(model, budgets=FALLING, selector="pyramidinfer"):
    return CompressedCache(model, BudgetProfile.from_budgets(model, budgets, selector))


@pytest.mark.parametrize(("attention", "off"), [("eager", 0), ("sdpa", 1e-5)])
def test_budgets_that_cover_the_prompt_change_nothing(attention, off):
    model = tiny_model(attention=attention)
    ids, more = tokens(2, 50), tokens(2, 3, seed=1)
    cache, plain = pruned(model, [60, 50, 50, 50]), evolkv.CompressedCache(model, BudgetProfile.uniform(model, 60))
    for each in (ids, more):
        got, expected = model(each, cache=cache).logits, model(each, cache=plain).logits
        assert float((got - expected).abs().max()) <= off
    assert cache.prefill_share == 1
    assert pruned(model).prefill_share == 1
    assert cache.kv_bytes == plain.kv_bytes


def test_each_layer_computes_and_holds_only_what_the_layer_below_holds(model):
    widths = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, args, output: widths.append(output.shape[1]))
        for layer in model.model.layers
    ]
    cache = pruned(model)
    output = model(tokens(1, 50), cache=cache)
    for hook in hooks:
        hook.remove()
    held = [set(heads[0].tolist()) for heads in cache.positions]
    assert [len(each) for each in held] == FALLING
    assert widths == [50, 40, 30, 20]
    assert all(above <= below for below, above in itertools.pairwise(held))
    assert all(torch.equal(heads[0], heads[1]) for heads in cache.positions)
    assert cache.prefill_share == pytest.approx(sum(widths) / (LAYERS * 50))
    # Dropped tokens have no hidden state at the end; the last one always has.
    assert output.logits.shape[1] == 50
    assert int((output.logits[0] != 0).any(dim=1).sum()) == 20
    assert bool((output.logits[0, -1] != 0).any())


def test_the_last_token_stays_and_recent_ones_take_their_share(model):
    cache = pruned(model, [1, 1, 1, 1])
    model(tokens(1, 50), cache=cache)
    assert {int(heads[0]) for heads in cache.positions} == {49}
    # With protected=1 recent tokens come first, as in the paper: a fifth of the prompt, and the last one.
    cache = pruned(model, [25, 20, 15, 11], "pyramidinfer:protected=1")
    model(tokens(1, 50), cache=cache)
    assert cache.positions[3][0].tolist() == list(range(39, 50))
    assert set(range(4)) | set(range(39, 50)) <= set(cache.positions[2][0].tolist())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_a_padded_batch_are_pruned_as_if_alone(side, attention):
    model = tiny_model("gemma2" if attention == "eager" else "llama", attention)
    rows, batch, mask = padded([50, 17, 35], side)
    cache = CompressedCache(model, BudgetProfile.from_budgets(model, FALLING, "pyramidinfer"), "40%")
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(batch, attention_mask=mask, position_ids=places, cache=cache).logits
    for i, row in enumerate(rows):
        alone = CompressedCache(model, BudgetProfile.from_budgets(model, FALLING, "pyramidinfer"), "40%")
        expected = model(row[None], cache=alone).logits[0, -1]
        last = -1 if side == "left" else len(row) - 1
        torch.testing.assert_close(together[i, last], expected, atol=1e-5, rtol=1e-5)
        assert [heads[0][i].tolist() for heads in cache.positions] == [heads[0].tolist() for heads in alone.positions]
        assert cache.prefill_share_by_sequence[i] == pytest.approx(alone.prefill_share)


def test_generate_goes_on_in_a_block_with_beams_and_from_a_file(model, tmp_path):
    ids, settings = tokens(2, 50), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cache = pruned(model)
    greedy = model.generate(ids, cache=cache, **settings)
    with evolkv.compress(model, BudgetProfile.from_budgets(model, FALLING, "pyramidinfer")):
        assert torch.equal(model.generate(ids, **settings), greedy)
        model.generate(ids, num_beams=2, **settings)
    read = CompressedCache.prefill(model, BudgetProfile.from_budgets(model, FALLING, "pyramidinfer"), ids)
    read.save(tmp_path / "cache.safetensors")
    back = CompressedCache.load(tmp_path / "cache.safetensors", model)
    assert back.prefill_share == read.prefill_share
    question = tokens(2, 4, seed=3)
    texts = [model.generate(**each.followed_by(question), **settings) for each in (read.copy(), back)]
    assert torch.equal(*texts)


def test_an_interrupted_prompt_leaves_no_trace_after_reset(model):
    ids, cache = tokens(1, 50), pruned(model)
    expected = model(ids, cache=pruned(model)).logits
    hook = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, cache=cache)
    hook.remove()
    cache.reset()
    assert torch.equal(model(ids, cache=cache).logits, expected)


def test_flash_attention_is_not_told_of_gaps_between_positions(model):
    cache, seen = pruned(model), []
    layer = model.model.layers[1]
    own, layer.forward = (
        layer.forward,
        lambda *args, **kwargs: seen.append(kwargs["position_ids"]) or own(*args, **kwargs),
    )
    try:
        model(tokens(1, 50), cache=cache)
        cache.reset()
        cache.kv_layers[1].begin_prompt = lambda *_: setattr(cache.kv_layers[1], "_flash", True)
        model(tokens(1, 50), cache=cache)
    finally:
        del layer.forward
    assert seen[0].shape == (1, 40)
    assert seen[1] is None


@pytest.mark.parametrize(
    ("family", "attention", "reason"),
    [
        ("lfm2", None, "recurrent state"),
        ("mistral", None, "sliding window in every layer"),
        ("llama", "flex_attention", "functions of consecutive tokens"),
    ],
)
def test_models_that_cannot_be_pruned_are_refused_with_the_reason(family, attention, reason):
    model = tiny_model(family, attention)
    with pytest.raises(ModelError, match=reason):
        CompressedCache(model, "pyramidinfer", 8)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda model: CompressedCache(model, "pyramidinfer", 8, prefill_chunk=16), "layers of their own"),
        (lambda model: CompressedCache(model, "pyramidinfer", 8, evict="again"), "layers of their own"),
        (lambda model: CompressedCache(model, "adakv+pyramidinfer", 8), "layers of their own"),
        (lambda model: pruned(model, [8, 8, 9, 8]), "budgets rise from 8 in layer 1 to 9 in layer 2"),
        (lambda model: pruned(model, [[8, 9]] * 4), "heads of a layer must have one budget"),
        (lambda model: model(tokens(1, 50), cache=pruned(model), output_hidden_states=True), "output_hidden_states"),
        (lambda model: model(tokens(1, 50), cache=pruned(model), labels=tokens(1, 50)), "labels"),
        (lambda model: pruned(model).activate_past_recording(), "generate without assistance"),
        (lambda model: OneBudget(task="niah", budget=40, selector="pyramidinfer"), "--engine naive"),
        (
            lambda model: OneBudget(
                task="niah", budget=40, selector="pyramidinfer", engine="naive", granularity="head"
            ),
            "--granularity layer",
        ),
    ],
)
def test_what_pruning_cannot_do_is_refused_with_the_reason(model, call, reason):
    with pytest.raises(UsageError, match=reason):
        call(model)


def test_labels_are_refused_in_a_block_too(model):
    with evolkv.compress(model, "pyramidinfer", 8), pytest.raises(UsageError, match="labels"):
        model(tokens(1, 50), labels=tokens(1, 50))


@pytest.mark.parametrize("budget", [3, 40, 100, 150])
def test_cosine_falls_from_twice_the_mean_at_the_exact_mean(budget):
    budgets = cosine(30, budget, ceiling=200)
    assert budgets.sum() == 30 * budget
    assert (np.diff(budgets) <= 0).all()
    assert abs(int(budgets[0]) - min(2 * budget, 200)) <= 1
    with pytest.raises(BudgetError):
        cosine(30, 201, ceiling=200)


def test_cosine_is_the_papers_schedule():
    # Decay 0.9 and recent tokens of a fifth, as in the paper: what 30 layers then keep of 1,000 tokens.
    passing = 0.1 * (np.cos(np.pi * np.arange(30) / 30) + 1) / 2 + 0.9
    expected = 1000 * (0.2 + 0.8 * np.cumprod(passing))
    budget = round(expected.mean())
    assert np.abs(cosine(30, budget, ceiling=1000) - expected).max() <= 2


def test_budgets_that_rise_are_pooled_at_the_same_total():
    assert non_increasing([5, 4, 4, 1]).tolist() == [5, 4, 4, 1]
    assert non_increasing([1, 2, 3]).tolist() == [2, 2, 2]
    assert non_increasing([9, 1, 4, 2, 6, 3]).tolist() == [9, 4, 3, 3, 3, 3]
    rng = np.random.default_rng(0)
    for _ in range(200):
        given = rng.integers(1, 50, int(rng.integers(1, 12)))
        found = non_increasing(given)
        assert found.sum() == given.sum()
        assert (np.diff(found) <= 0).all()
        assert given.min() <= found.min() <= found.max() <= given.max()


def test_eval_scores_what_a_users_cache_gives_and_says_how_much_was_computed(small):
    model, tokenizer = small
    task, method = "niah:context=240", "cosine+pyramidinfer"
    options = {"task": task, "budgets": "50%", "samples": 2, "metric": "logprob"}
    full, row, snapkv = evolkv.evaluate(model, tokenizer, methods=["full", method, "snapkv"], **options)
    (alone,) = evolkv.evaluate(model, tokenizer, methods=[method], **options)
    assert row == alone
    assert "prefill_share" not in {**full, **snapkv}
    assert 0.5 < row["prefill_share"] < 0.75
    assert row["kv_bytes"] == pytest.approx(full["kv_bytes"] / 2, rel=0.01)
    examples = get_task(task).examples("report", 2, tokenizer, 0)
    engine = NaiveEngine(model, tokenizer, examples, get_selector("pyramidinfer"), "logprob")
    scores = []
    for column, question in enumerate(engine.questions):
        cache = CompressedCache(model, method, "50%")
        model(question.prompt, cache=cache)
        budgets = np.stack([layer.budgets[0] for layer in cache.kv_layers])
        scores.append(engine.score(budgets[None], [column])[0, 0])
    assert np.mean(scores) == pytest.approx(row["score"], abs=1e-5)


def test_a_search_finds_budgets_that_do_not_rise(small):
    model, tokenizer = small
    settings = {"train": 2, "val": 2, "max_evals": 10, "engine": "naive"}
    found = evolkv.search(model, tokenizer, task="niah:context=240", budget=60, selector="pyramidinfer", **settings)
    tried = np.array([entry["budgets"] for entry in found.history])
    assert (tried.sum(axis=(1, 2)) == 60 * tried[0].size).all()
    assert (np.diff(tried, axis=1) <= 0).all()
    assert (tried == tried[:, :, :1]).all()
    assert {"uniform", "pyramid", "cosine"} <= {row["name"] for row in found.validation}
    cache = CompressedCache(model, found.profile)
    model(tokens(1, 100), cache=cache)
    assert cache.prefill_share < 1
