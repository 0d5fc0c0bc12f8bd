"""LU-KV: the calibration, and the allocation that follows from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evolkv
from evolkv.allocators import lukv
from evolkv.allocators.lukv import marginal_utility
from evolkv.cache import utility
from evolkv.errors import BudgetError, ModelError, UsageError
from evolkv.evaluation import ReplayEngine
from evolkv.evaluation.local import LocalBackend
from evolkv.evaluation.shards import ShardedEngine
from evolkv.methods import get_method
from evolkv.selectors import get_selector
from evolkv.tasks import get_task
from evolkv.tasks.protocol import under_protocol
from tiny import KV_HEADS, LAYERS, tiny_model

CEILING = 400


def examples(tokenizer, number=1, protocol="aware", context=120):
    return under_protocol(protocol, get_task(f"niah:context={context}").examples("train", number, tokenizer))


def engine_of(model, tokenizer, some, metric="logprob", selector="snapkv:window=4"):
    return ReplayEngine(model, tokenizer, some, get_selector(selector), metric, CEILING)


def slow_utility(model, engine):
    """The definition, from the weights that eager attention returns: by layer ``[kv_heads, tokens]``, by position."""
    (ranked,) = engine._held
    question, prompt = ranked.question, ranked.prompt
    read = torch.cat([question.prompt[0], question.later, question.target])
    read = read[:-1] if len(question.target) > 1 or len(question.later) else read
    values = []

    def note(module, inputs, output):
        values.append(output[0])

    model.config._attn_implementation = "eager"
    attentions = [each for each in model.modules() if hasattr(each, "v_proj") and hasattr(each, "o_proj")]
    hooks = [each.v_proj.register_forward_hook(note) for each in attentions]
    with torch.no_grad():
        weights = model(read[None], output_attentions=True, use_cache=False).attentions
    for hook in hooks:
        hook.remove()
    first = prompt.tokens + max(0, len(question.later) - 1)
    rows = []
    for module, seen, weight, positions in zip(attentions, values, weights, prompt.positions, strict=True):
        heads, width = len(positions), module.head_dim
        query_heads = weight.shape[1]
        value = seen.view(-1, heads, width)[: prompt.tokens]
        projection = module.o_proj.weight.view(-1, query_heads, width)
        lengths = torch.stack(
            [(value[:, h // (query_heads // heads)] @ projection[:, h].T).norm(dim=-1) for h in range(query_heads)]
        )
        held = torch.stack([lengths[h, positions[h // (query_heads // heads)]] for h in range(query_heads)])
        by_query_head = weight[0, :, first:, : prompt.tokens].amax(dim=1) * lengths / held.mean()
        rows.append(by_query_head.view(heads, -1, prompt.tokens).amax(dim=1))
    return rows


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "gemma3", "granite"])
@pytest.mark.parametrize("protocol", ["aware", "agnostic"])
def test_utility_is_attention_times_length_of_the_projected_value(family, protocol, tokenizer):
    model = tiny_model(family, vocab_size=len(tokenizer), max_position_embeddings=512)
    engine = engine_of(model, tokenizer, examples(tokenizer, protocol=protocol))
    found, expected = engine.utility(), slow_utility(model, engine)
    for layer, positions in enumerate(engine._held[0].prompt.positions):
        by_rank = expected[layer].gather(1, positions).numpy()
        np.testing.assert_allclose(found[layer, :, : by_rank.shape[1]], by_rank, rtol=2e-3, atol=1e-6)
        assert not found[layer, :, by_rank.shape[1] :].any()


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next", "jamba", "bamba", "lfm2", "phi3", "stablelm", "cohere2"])
@pytest.mark.parametrize("metric", ["logprob", "fidelity"])
def test_every_family_is_calibrated(family, metric, tokenizer):
    model = tiny_model(family, vocab_size=len(tokenizer), max_position_embeddings=512)
    found = engine_of(model, tokenizer, examples(tokenizer), metric).utility()
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    # Somebody reads something in each head.
    assert (found.sum(axis=2) > 0).all()


def test_utility_in_blocks_of_queries_is_the_same(small, monkeypatch):
    some = examples(small[1], 1)
    at_once = engine_of(*small, some).utility()
    monkeypatch.setattr("evolkv.cache.utility.BLOCK_BYTES", 1)
    np.testing.assert_allclose(engine_of(*small, some).utility(), at_once, rtol=1e-5)


def test_a_layers_projection_is_looked_at_once_for_all_prompts(small, monkeypatch):
    seen = []
    plain = utility.output_grams
    monkeypatch.setattr(utility, "output_grams", lambda module, *rest: seen.append(module) or plain(module, *rest))
    some = examples(small[1], 3)
    together = engine_of(*small, some).utility()
    assert len(seen) == len(set(seen)) == LAYERS
    one_by_one = sum(engine_of(*small, [each]).utility() for each in some)
    np.testing.assert_allclose(together, one_by_one, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_utility_in_half_precision_is_near_that_in_float32(small, dtype):
    model, tokenizer = small
    half = type(model)(model.config).eval()
    half.load_state_dict(model.state_dict())
    curves = [engine_of(each, tokenizer, examples(tokenizer)).utility().cumsum(-1) for each in (model, half.to(dtype))]
    assert curves[1].dtype == np.float32
    # Single ranks move where scores are close; what a head is worth does not.
    np.testing.assert_allclose(curves[1][..., -1], curves[0][..., -1], rtol=0.1)


def test_shards_sum_what_their_examples_say(small):
    some = examples(small[1], 4)
    backend = LocalBackend(*small)
    sharded = ShardedEngine(backend, some, get_selector("snapkv:window=4"), "logprob", CEILING)
    alone = sum(engine_of(*small, [each]).utility() for each in some)
    np.testing.assert_allclose(sharded.utility(), alone, rtol=1e-4, atol=1e-6)
    backend.close()


def test_an_answer_of_one_token_is_read(small):
    (example,) = examples(small[1], 1)
    engine = engine_of(*small, [example])
    question = engine._held[0].question
    engine._held[0] = engine._held[0]._replace(
        question=type(question)(**{**vars(question), "target": question.target[:1]})
    )
    assert engine.utility().any()


def test_a_metric_of_generated_texts_has_no_calibration(small):
    with pytest.raises(UsageError, match="metric 'contains' has no answer that is read"):
        engine_of(*small, examples(small[1]), "contains").utility()


def test_a_model_whose_output_projection_has_another_name_is_refused(tokenizer):
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)

    engine = engine_of(model, tokenizer, examples(tokenizer))
    for layer in model.model.layers:
        layer.self_attn.mixer_out = layer.self_attn.o_proj
        del layer.self_attn.o_proj
    with pytest.raises(ModelError, match="LlamaAttention has none"):
        engine.utility()


def slow_majorant(worth, floor, ceiling):
    """The least concave function above the cumulative utility between floor and ceiling, by its definition."""
    total = np.concatenate([[0.0], np.cumsum(worth[floor:ceiling])])
    points = np.arange(len(total))
    best = total.copy()
    for left in points:
        for right in points[left + 1 :]:
            inner = points[left + 1 : right]
            line = total[left] + (total[right] - total[left]) * (inner - left) / (right - left)
            best[left + 1 : right] = np.maximum(best[left + 1 : right], line)
    return np.diff(best)


SETTINGS = settings(max_examples=60, deadline=None)


@st.composite
def cases(draw):
    shape = draw(st.sampled_from([(1,), (3,), (2, 2)]))
    ranks = draw(st.integers(1, 12))
    worth = draw(
        st.lists(
            st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.0]),
            min_size=int(np.prod(shape)) * ranks,
            max_size=int(np.prod(shape)) * ranks,
        )
    )
    size = int(np.prod(shape))
    low = np.array(draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))).reshape(shape)
    high = low + np.array(draw(st.lists(st.integers(0, 14), min_size=size, max_size=size))).reshape(shape)
    total = draw(st.integers(int(low.sum()), int(high.sum())))
    return np.array(worth).reshape(*shape, ranks), total, low, high


@given(cases())
@SETTINGS
def test_budgets_meet_the_total_within_floor_and_ceiling(case):
    worth, total, low, high = case
    budgets = lukv(worth, total, low, high)
    assert budgets.shape == low.shape
    assert budgets.sum() == total
    assert (low <= budgets).all()
    assert (budgets <= high).all()


@given(cases())
@SETTINGS
def test_marginal_utility_is_the_slope_of_the_concave_majorant(case):
    worth, _, low, high = case
    worth = np.pad(worth, [(0, 0)] * low.ndim + [(0, 20)])
    found = marginal_utility(worth, low, high)
    for at in np.ndindex(low.shape):
        inside = found[at][low[at] : high[at]]
        np.testing.assert_allclose(inside, slow_majorant(worth[at], low[at], high[at]), atol=1e-12)
        assert np.isneginf(found[at][: low[at]]).all()
        assert np.isneginf(found[at][high[at] :]).all()


@given(cases())
@SETTINGS
def test_no_entry_left_out_is_worth_more_than_one_taken(case):
    worth, total, low, high = case
    budgets = lukv(worth, total, low, high)
    marginal = marginal_utility(np.pad(worth, [(0, 0)] * low.ndim + [(0, 20)]), low, high)
    taken = [marginal[at][low[at] : budgets[at]] for at in np.ndindex(low.shape)]
    left = [marginal[at][budgets[at] : high[at]] for at in np.ndindex(low.shape)]
    least = min((part.min() for part in taken if part.size), default=np.inf)
    assert all(part.max() <= least for part in left if part.size)


@given(cases(), st.data())
@SETTINGS
def test_a_larger_total_takes_from_no_head(case, data):
    worth, total, low, high = case
    more = data.draw(st.integers(total, int(high.sum())))
    assert (lukv(worth, total, low, high) <= lukv(worth, more, low, high)).all()


def test_heads_that_are_worth_the_same_share_alike():
    assert lukv(np.ones((4, 10)), 22, 1, 10).tolist() == [6, 6, 5, 5]


def test_a_useful_entry_behind_useless_ones_is_charged_for_them():
    # The selector of the first head finds what is useful at once, that of the second only in its fifth entry.
    worth = [[1.0, 0.5, 0, 0, 0, 0], [0, 0, 0, 0, 2.0, 0]]
    assert lukv(worth, 2, 0, 6).tolist() == [2, 0]
    assert lukv(worth, 7, 0, 6).tolist() == [2, 5]


def test_a_total_out_of_reach_is_refused():
    with pytest.raises(BudgetError, match="below the sum of the floors"):
        lukv(np.ones((2, 4)), 3, 2, 4)
    with pytest.raises(BudgetError, match="above the sum of the ceilings"):
        lukv(np.ones((2, 4)), 9, 2, 4)


SEARCH = {
    "task": "niah:context=200",
    "budget": 48,
    "train": 4,
    "val": 2,
    "seed": 0,
    "gradient_steps": 2,
    "start": "lukv",
    "granularity": "layer",
}


@pytest.fixture(scope="module")
def found(small, tmp_path_factory):
    storage = str(tmp_path_factory.mktemp("studies") / "study.db")
    return evolkv.search(*small, **SEARCH, max_evals=16, storage=storage), storage


def test_a_search_starts_from_lukv_and_has_to_beat_it(found):
    result, _ = found
    rows = {row["name"]: row for row in result.validation}
    assert rows["lukv"]["budgets"] == result.history[0]["budgets"]
    assert not rows["lukv"]["evolved"]
    assert rows[result.chosen]["score"] >= rows["lukv"]["score"]
    assert result.settings["start"] == "lukv"
    # Layer budgets, at the exact total.
    assert np.ptp(rows["lukv"]["budgets"], axis=1).tolist() == [0] * LAYERS
    assert np.sum(rows["lukv"]["budgets"]) == 48 * LAYERS * KV_HEADS
    assert np.min(rows["lukv"]["budgets"]) >= result.settings["floor"]


def test_a_continued_search_takes_the_calibration_from_its_study(small, found, monkeypatch):
    result, storage = found
    monkeypatch.setattr(ReplayEngine, "utility", None)
    again = evolkv.search(*small, **SEARCH, max_evals=24, storage=storage)
    assert again.history[:16] == result.history


def test_a_search_that_never_began_leaves_no_calibration_to_another(small, tmp_path):
    storage = str(tmp_path / "study.db")

    def fail(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedEngine, "score", fail)
        with pytest.raises(KeyboardInterrupt):
            evolkv.search(*small, **SEARCH, max_evals=8, storage=storage, selector="streaming_llm")
    other = {**SEARCH, "max_evals": 8, "selector": "knorm"}
    kept = evolkv.search(*small, **other, storage=storage)
    assert kept.history[0]["budgets"] == evolkv.search(*small, **other).history[0]["budgets"]


def test_the_strategy_start_gives_lukv_as_it_is(small):
    result = evolkv.search(*small, **{**SEARCH, "granularity": "head"}, strategy="start")
    assert (result.chosen, result.improved, result.evaluations) == ("lukv", False, 1)
    assert [row["name"] for row in result.validation] == ["lukv"]
    assert result.profile.budgets.tolist() == result.history[0]["budgets"]
    assert np.ptp(result.profile.budgets, axis=1).any()
    assert result.profile.total == 48 * LAYERS * KV_HEADS


def test_one_calibration_serves_every_budget(small, monkeypatch):
    settings = {key: value for key, value in SEARCH.items() if key != "budget"}
    calls = []
    calibrate = ShardedEngine.utility
    monkeypatch.setattr(ShardedEngine, "utility", lambda engine: calls.append(1) or calibrate(engine))
    curve = evolkv.evolution.search_curve(*small, **settings, budgets=[40, 48], strategy="start")
    assert calls == [1]
    assert [result.chosen for result in curve.results] == ["lukv", "lukv"]
    assert [point["source"] for point in curve.points] == ["lukv", "lukv"]
    small_ones, large_ones = (result.profile.budgets for result in curve.results)
    assert (small_ones <= large_ones).all()
    assert [small_ones.mean(), large_ones.mean()] == [40, 48]


def test_lukv_is_among_the_choices_of_every_search_that_can_calibrate(small):
    short = {**SEARCH, "start": "uniform", "max_evals": 8, "train": 2}
    for changes, there in (
        ({"strategy": "random"}, True),
        ({"metric": "fidelity"}, True),
        ({"metric": "contains"}, False),
    ):
        names = {row["name"] for row in evolkv.search(*small, **{**short, **changes}).validation}
        assert ("lukv" in names) == there


def test_a_model_without_a_known_projection_is_searched_without_lukv(small, monkeypatch, caplog):
    monkeypatch.setattr("evolkv.cache.utility._PROJECTIONS", ("other",))
    short = {**SEARCH, "max_evals": 8, "train": 2}
    result = evolkv.search(*small, **{**short, "start": "uniform"})
    assert "lukv" not in {row["name"] for row in result.validation}
    assert "lukv is not among the allocations" in caplog.text
    with pytest.raises(ModelError, match="LU-KV"):
        evolkv.search(*small, **short)


def test_tokens_without_embeddings_are_an_error_and_no_reason_to_warn_of_lukv(small, caplog):
    model = tiny_model(vocab_size=100, max_position_embeddings=8192)
    with pytest.raises(ModelError, match="but the model has embeddings for 100 tokens"):
        evolkv.search(model, small[1], **{**SEARCH, "start": "uniform"})
    assert "lukv" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric": "contains"}, "metric 'contains' reads no answer"),
        ({"engine": "naive"}, "engine 'naive' reads no answer"),
        ({"strategy": "evolkv"}, "starts from uniform budgets"),
        ({"start": "lukvv"}, "Did you mean 'lukv'"),
    ],
)
def test_a_start_that_cannot_be_calibrated_is_refused(small, changes, words):
    with pytest.raises(UsageError, match=words):
        evolkv.search(*small, **{**SEARCH, **changes})


@pytest.mark.parametrize("name", ["lukv+snapkv", "lukv"])
def test_the_name_alone_is_no_method_and_the_error_says_how_to_get_the_profile(name):
    with pytest.raises(UsageError, match="--strategy start --start lukv"):
        get_method(name)
