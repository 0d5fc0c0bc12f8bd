"""Caches that evict again, and caches of hybrid models: saved, loaded and copied they go on as if nothing had been."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open

from evolkv import BudgetProfile, CompressedCache, compress
from evolkv.errors import UsageError
from test_cache_files import edited, refused
from tiny import HYBRIDS, LAYERS, padded, tiny_model, tokens

SNAPKV = {"name": "snapkv", "window": 4}
H2O = {"name": "h2o", "window": 4}
#: One that keeps some queries, one that sums attention over all, one that looks at all since the last cut, one at none.
SELECTORS = [SNAPKV, H2O, {"name": "expected_attention"}, {"name": "streaming_llm"}]
# The others are slow.
SNAPKV_FIRST = [SNAPKV, *(pytest.param(each, marks=pytest.mark.slow) for each in SELECTORS[1:])]
DENSE = [9] * LAYERS
RAGGED = [[7, 12], [9, 9], [5, 30], [16, 5]]
SETTINGS = {
    "turns": {"evict": "again"},
    # Shorter than a window of queries, so that those of one cut serve the next.
    "interval": {"evict_every": 3},
    "chunks": {"prefill_chunk": 16},
    "all": {"prefill_chunk": 16, "evict": "again", "evict_every": 3},
}
HOW = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
# The other has fewer tokens than a window, so that a cut after it needs queries from before.
QUESTION, OTHER = tokens(1, 6, seed=9), tokens(1, 2, seed=10)
GREEDY = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}


def prefilled(model, budgets=RAGGED, lengths=(40,), selector=SNAPKV, **settings):
    _, batch, mask = padded(lengths, "left")
    return CompressedCache.prefill(model, BudgetProfile.from_budgets(model, budgets, selector), batch, mask, **settings)


def turn(model, cache, question, count=8):
    """Asks, and says so to the cache; the logits of the answer and what is held after it."""
    output = model.generate(**cache.followed_by(question), max_new_tokens=count, **GREEDY)
    cache.input_ids = output.sequences
    return torch.stack(output.logits), str(cache.positions), cache.kv_bytes


def same(one, other):
    return torch.equal(one[0], other[0]) and one[1:] == other[1:]


def reloaded(cache, model, folder):
    cache.save(folder / "a.cache")
    return CompressedCache.load(folder / "a.cache", model)


@pytest.mark.parametrize(
    ("family", "budgets", "lengths", "selector"),
    [
        ("gemma3", RAGGED, (40, 33, 15), SNAPKV),
        *(pytest.param("gemma3", RAGGED, (40, 33, 15), each, marks=pytest.mark.slow) for each in SELECTORS[1:]),
        pytest.param("llama", DENSE, (40,), SNAPKV, marks=pytest.mark.slow),
        ("llama", RAGGED, (40,), H2O),
        pytest.param("mistral", DENSE, (40, 33, 15), H2O, marks=pytest.mark.slow),
    ],
    ids=str,
)
@HOW
def test_a_loaded_cache_goes_on_evicting_bit_for_bit_as_the_saved_one(
    tmp_path, family, settings, budgets, lengths, selector
):
    model = tiny_model(family)
    cache = prefilled(model, budgets, lengths, selector, **settings)
    loaded = reloaded(cache, model, tmp_path)
    assert loaded.reeviction == cache.reeviction
    assert same(turn(model, loaded, QUESTION, 9), turn(model, cache, QUESTION, 9))
    # Again in the middle of a conversation, between two cuts.
    loaded = reloaded(cache, model, tmp_path)
    assert same(turn(model, loaded, OTHER), turn(model, cache, OTHER))
    assert same(turn(model, loaded, QUESTION), turn(model, cache, QUESTION))


@pytest.mark.parametrize("selector", [SNAPKV, H2O], ids=["snapkv", "h2o"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_next", "lfm2"])
def test_a_prompt_is_saved_in_its_middle(tmp_path, family, selector):
    model = tiny_model(family)
    profile = BudgetProfile.from_budgets(model, RAGGED, selector)
    cache = CompressedCache(model, profile, prefill_chunk=8)
    model(tokens(1, 30), cache=cache)
    loaded = reloaded(cache, model, tmp_path)
    for part in (tokens(1, 21, seed=1), tokens(1, 1, seed=2), tokens(1, 5, seed=3)):
        expected, found = (model(part, cache=each).logits for each in (cache, loaded))
        assert torch.equal(found, expected)
        assert str(loaded.positions) == str(cache.positions)
    # The single token ended the prompt: what came then was kept whole.
    assert loaded.kv_layers[0].appended == 6


def test_a_sequence_that_is_all_padding_so_far_is_saved_too(tmp_path):
    model = tiny_model()
    _, batch, mask = padded((40, 10), "left")
    cache = CompressedCache(model, BudgetProfile.from_budgets(model, RAGGED, H2O), prefill_chunk=10)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    model(batch[:, :25], attention_mask=mask[:, :25], position_ids=places[:, :25], cache=cache)
    assert cache.kv_layers[0].prompt_lengths == [25, 0]
    loaded = reloaded(cache, model, tmp_path)
    rest = {"attention_mask": mask, "position_ids": places[:, 25:]}
    expected, found = (model(batch[:, 25:], **rest, cache=each).logits for each in (cache, loaded))
    assert torch.equal(found, expected)


def test_a_loaded_cache_that_evicts_again_serves_another_prompt_after_reset(tmp_path):
    model = tiny_model()
    loaded = reloaded(prefilled(model, **SETTINGS["all"]), model, tmp_path)
    loaded.reset()
    fresh = CompressedCache(model, BudgetProfile.from_budgets(model, RAGGED, SNAPKV), **SETTINGS["all"])
    for each in (loaded, fresh):
        model(tokens(1, 50, seed=4), cache=each)
    assert str(loaded.positions) == str(fresh.positions)


# Hybrid models.


#: Jamba and Bamba read later tokens one by one, and so have no turns to cut after.
OF_HYBRIDS = [
    pytest.param(family, settings, id=f"{family}-{name}")
    for family in HYBRIDS
    for name, settings in (("once", {}), ("turns", SETTINGS["turns"]), ("interval", SETTINGS["interval"]))
    if name != "turns" or family not in ("jamba", "bamba")
]


@pytest.mark.parametrize(("family", "settings"), OF_HYBRIDS)
def test_a_loaded_cache_of_a_hybrid_answers_bit_for_bit_as_the_saved_one(tmp_path, family, settings):
    model = tiny_model(family)
    cache = prefilled(model, RAGGED, (40, 33, 15), **settings)
    loaded = reloaded(cache, model, tmp_path)
    assert same(turn(model, loaded, QUESTION), turn(model, cache, QUESTION))
    loaded = reloaded(cache, model, tmp_path)
    assert same(turn(model, loaded, OTHER), turn(model, cache, OTHER))


@pytest.mark.parametrize("family", HYBRIDS)
def test_half_precision_of_a_hybrid_survives(tmp_path, family):
    model = tiny_model(family).to(torch.bfloat16)
    cache = prefilled(model)
    loaded = reloaded(cache, model, tmp_path)
    for mine, other in zip(loaded.state_layers, cache.state_layers, strict=True):
        assert {name: part.dtype for name, part in mine.parts().items()} == {
            name: part.dtype for name, part in other.parts().items()
        }
    assert same(turn(model, loaded, QUESTION), turn(model, cache, QUESTION))


# Copies.


@HOW
@pytest.mark.parametrize("selector", [SNAPKV, H2O], ids=["snapkv", "h2o"])
def test_branches_of_a_cache_that_evicts_again_do_not_know_of_each_other(settings, selector):
    model = tiny_model("gemma3")

    def made():
        cache = prefilled(model, RAGGED, (40, 33, 15), selector, **settings)
        turn(model, cache, QUESTION)
        return cache

    expected = [turn(model, made(), question) for question in (QUESTION, OTHER)]
    cache = made()
    branches = cache, cache.copy(), copy.deepcopy(cache)
    assert same(turn(model, branches[0], QUESTION), expected[0])
    assert same(turn(model, branches[1], OTHER), expected[1])
    assert same(turn(model, branches[2], QUESTION), expected[0])


@pytest.mark.parametrize(("family", "settings"), OF_HYBRIDS)
def test_branches_of_a_hybrid_do_not_know_of_each_other(family, settings):
    model = tiny_model(family)
    expected = [turn(model, prefilled(model, **settings), question) for question in (QUESTION, OTHER)]
    cache = prefilled(model, **settings)
    branch = cache.copy()
    assert same(turn(model, cache, QUESTION), expected[0])
    assert same(turn(model, branch, OTHER), expected[1])


def test_a_hybrid_that_was_read_with_gradients_can_be_copied_and_saved(tmp_path):
    model = tiny_model("lfm2").requires_grad_(True)
    cache = CompressedCache(model, BudgetProfile.from_budgets(model, RAGGED, SNAPKV))
    cache.input_ids = tokens(1, 40)
    model(cache.input_ids, cache=cache)
    branch, loaded = cache.copy(), reloaded(cache, model, tmp_path)
    expected = turn(model, cache, QUESTION)
    assert same(turn(model, branch, QUESTION), expected)
    assert same(turn(model, loaded, QUESTION), expected)


# Going on after a cut.


@HOW
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_each_sequence_of_a_conversation_that_evicts_again_is_answered_as_if_alone(family, settings):
    # Chunks are cut by columns, padding included: alone they would be others.
    settings = {**settings, "prefill_chunk": None}
    model = tiny_model(family)
    lengths, texts = (40, 33, 15), [QUESTION, OTHER, QUESTION]
    together = prefilled(model, RAGGED, lengths, **settings)
    logits = [turn(model, together, text, 4)[0] for text in texts]
    for i, row in enumerate(padded(lengths, "left")[0]):
        profile = BudgetProfile.from_budgets(model, RAGGED, SNAPKV)
        alone = CompressedCache.prefill(model, profile, row[None], **settings)
        for text, found in zip(texts, logits, strict=True):
            answered = turn(model, alone, text, 4)[0]
            torch.testing.assert_close(found[:, i : i + 1], answered, atol=1e-4, rtol=0)


@pytest.mark.parametrize("every", [3, 50], ids=["cut", "not yet cut"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_padding_of_a_later_turn_is_not_read_when_going_on(tmp_path, family, every):
    model = tiny_model(family)
    profile = BudgetProfile.from_budgets(model, RAGGED, SNAPKV)
    first, second = padded((40, 33), "left"), padded((4, 8), "left")
    cache = CompressedCache.prefill(model, profile, *first[1:], evict_every=every)
    mask = torch.cat([first[2], second[2]], dim=1)
    places = (mask.cumsum(-1) - 1)[:, 40:]
    model(second[1], attention_mask=mask, position_ids=places, cache=cache)
    cache.input_ids = torch.cat([first[1], second[1]], dim=1)
    asked = cache.followed_by(QUESTION)
    assert asked["attention_mask"].sum(1).tolist() == [40 + 4 + 6, 33 + 8 + 6]
    loaded = reloaded(cache, model, tmp_path)
    together = turn(model, cache, QUESTION, 2)
    assert same(turn(model, loaded, QUESTION, 2), together)
    for i, (one, other) in enumerate(zip(first[0], second[0], strict=True)):
        alone = CompressedCache.prefill(model, profile, one[None], evict_every=every)
        model(other[None], cache=alone)
        alone.input_ids = torch.cat([one, other])[None]
        torch.testing.assert_close(together[0][:, i : i + 1], turn(model, alone, QUESTION, 2)[0], atol=1e-4, rtol=0)


@HOW
@pytest.mark.parametrize("selector", SNAPKV_FIRST, ids=str)
@pytest.mark.parametrize("window", [None, 200], ids=["full", "sliding"])
def test_rows_that_ended_before_others_go_on_evicting_as_if_alone(settings, selector, window):
    # A cut in the middle of the padding would take it for text.
    settings = {**settings, "prefill_chunk": None, "evict_every": settings.get("evict_every") and 50}
    model = tiny_model("llama") if window is None else tiny_model("mistral", sliding_window=window)
    prompts, question, more = tokens(2, 40), tokens(2, 5, seed=9), tokens(2, 9, seed=8)
    plain = {"do_sample": False, "max_new_tokens": 12}
    profile = BudgetProfile.from_budgets(model, RAGGED, selector)
    told = model.generate(
        **CompressedCache.prefill(model, profile, prompts, **settings).followed_by(question), eos_token_id=None, **plain
    )
    end = int(told[0, 47])
    assert end not in told[1, 45:]

    def conversation(rows):
        cache = CompressedCache.prefill(model, profile, prompts[rows], **settings)
        cache.input_ids = model.generate(**cache.followed_by(question[rows]), eos_token_id=end, pad_token_id=0, **plain)
        return [turn(model, cache, text[rows], 4)[0] for text in (more, question)]

    together = conversation(slice(0, 2))
    for i in range(2):
        for found, expected in zip(together, conversation(slice(i, i + 1)), strict=True):
            torch.testing.assert_close(found[:, i : i + 1], expected, atol=1e-4, rtol=0)


# Files that cannot be used.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A cache of a model with sliding windows whose tokens since the last cut have padding among them."""
    model = tiny_model("gemma3")
    path = tmp_path_factory.mktemp("caches") / "a.cache"
    first, second = padded((40, 33), "left"), padded((4, 8), "left")
    profile = BudgetProfile.from_budgets(model, RAGGED, H2O)
    cache = CompressedCache.prefill(model, profile, *first[1:], evict_every=50)
    model(second[1], attention_mask=torch.cat([first[2], second[2]], dim=1), cache=cache)
    cache.save(path)
    return path, model


def test_a_file_says_what_there_is_for_the_next_cut(saved):
    with safe_open(saved[0], framework="pt") as file:
        said, names = json.loads(file.metadata()["cache"]), set(file.keys())
    assert said["reeviction"] == {"prefill_chunk": None, "evict": "once", "evict_every": 50, "open": False}
    assert {"real", "0.queries.0", "0.queries.1", "0.0.received"} <= names


def change(name, how):
    return lambda tensors, metadata, said: tensors.update({name: how(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda tensors, metadata, said: tensors.pop("0.queries.1"), "0.queries.1"),
        (change("0.queries.1", lambda queries: queries[:1]), "8 heads of 16 channels"),
        (change("0.queries.1", lambda queries: queries.repeat(1, 30, 1)), "more than there can be"),
        (change("0.queries.1", lambda queries: queries.half()), "float16"),
        (change("3.0.received", lambda received: received[:, 1:]), "3.0.received has the wrong shape"),
        (change("3.0.received", lambda received: torch.cat([received, received], 1)), "3.0.received has the wrong"),
        (change("real", lambda real: real[:, 1:]), "real does not fit"),
        (change("real", lambda real: real.int()), "real is"),
        (lambda tensors, metadata, said: tensors.pop("real"), "positions are out of range"),
        (lambda tensors, metadata, said: said["reeviction"].update(evict_every=0), "evict_every is 0"),
        (lambda tensors, metadata, said: said["reeviction"].update(evict="often"), "evict"),
        (lambda tensors, metadata, said: said["reeviction"].update(evict_every=None), "say never"),
        (lambda tensors, metadata, said: said.pop("reeviction"), "reeviction"),
        (lambda tensors, metadata, said: said.update(selector={"name": "chunkkv"}), "reuse=1"),
        (lambda tensors, metadata, said: said["states"].append({"parts": [], "updated": []}), "states of 1 layers"),
    ],
)
def test_damaged_files_of_caches_that_evict_again_are_refused(saved, tmp_path, edit, complaint):
    refused(edited(saved[0], tmp_path / "a", edit), saved[1], complaint)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    model, path = tiny_model("bamba"), tmp_path_factory.mktemp("caches") / "a.cache"
    prefilled(model).save(path)
    return path, model


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda tensors, metadata, said: tensors.pop("states.0.0.recurrent"), "states.0.0.recurrent"),
        (change("states.0.0.conv", lambda state: state.repeat(2, 1, 1)), "states.0.0.conv does not fit its sequences"),
        (change("states.0.0.conv", lambda state: state.long()), "states.0.0.conv does not fit its sequences"),
        (lambda tensors, metadata, said: said["states"].pop(), "states of 0 layers, but the model keeps 1"),
        (lambda tensors, metadata, said: said["states"][0].update(updated=[]), "other states"),
        (
            lambda tensors, metadata, said: (
                said["states"][0]["parts"].append("1.conv"),
                tensors.update({"states.0.1.conv": tensors["states.0.0.conv"].clone()}),
            ),
            "other states",
        ),
    ],
)
def test_damaged_files_of_hybrids_are_refused(hybrid, tmp_path, edit, complaint):
    refused(edited(hybrid[0], tmp_path / "a", edit), hybrid[1], complaint)


def test_what_a_cache_that_evicts_again_does_not_know_it_asks_for():
    model = tiny_model()
    cache = prefilled(model, **SETTINGS["all"])
    turn(model, cache, QUESTION)
    cache.input_ids = cache.input_ids[:, :30]
    with pytest.raises(UsageError, match="seen 53 tokens and knows the ids of 30"):
        cache.followed_by(QUESTION)


# --- what cannot be gone on from ------------------------------------------------------------------------------------


def test_a_text_that_was_read_to_its_end_needs_something_to_go_on_with():
    model = tiny_model()
    cache = prefilled(model)
    with pytest.raises(UsageError, match="at least one token"):
        cache.followed_by(QUESTION[:, :0])
    # Of an answer the last token is still to be read.
    cache.input_ids = model.generate(**cache.followed_by(QUESTION), max_new_tokens=3, do_sample=False)
    assert cache.followed_by(QUESTION[:, :0])["input_ids"].shape == cache.input_ids.shape


def test_the_text_so_far_is_token_ids_and_nothing_else():
    model = tiny_model()
    cache = prefilled(model)
    document = cache.input_ids
    for other in (turn, document.tolist(), document[0], document.float()):
        with pytest.raises(UsageError, match=r"input_ids is .*; expected a tensor of token ids \[batch, tokens\]"):
            cache.input_ids = other
    assert cache.input_ids is document
    cache.input_ids = None


def test_a_cache_of_another_model_is_refused():
    model, other = tiny_model(), tiny_model(seed=3)
    cache = prefilled(model)
    with compress(other, BudgetProfile.from_budgets(other, RAGGED, SNAPKV)):
        for mine in (cache, CompressedCache(model, BudgetProfile.from_budgets(model, RAGGED, SNAPKV))):
            with pytest.raises(UsageError, match="made for another model"):
                other(QUESTION, cache=mine)
    assert turn(model, cache, QUESTION)


@pytest.mark.parametrize("settings", [{}, {"evict": "again"}])
def test_sequences_are_chosen_as_from_any_tensor(settings):
    model = tiny_model()
    chosen = []
    for indices in (torch.tensor([-1, 0]), [2, 0], torch.tensor([True, False, True])):
        cache = prefilled(model, lengths=(40, 33, 15), **settings)
        cache.batch_select_indices(indices)
        chosen.append(cache)
    assert str(chosen[0].positions) == str(chosen[1].positions)
    assert torch.equal(chosen[0].input_ids, chosen[1].input_ids)
    assert torch.equal(chosen[2].input_ids, chosen[1].input_ids.flip(0))
    cache = prefilled(model, lengths=(40, 33), **settings)
    before = str(cache.positions)
    for indices in (torch.tensor([0, 5]), torch.tensor([-3]), torch.tensor([True]), [0.0, 1.0]):
        with pytest.raises(UsageError, match="does not choose among 2 sequences"):
            cache.batch_select_indices(indices)
    assert str(cache.positions) == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"evict_every": 2.5}, "evict_every is 2.5; expected a whole number"),
        ({"evict_every": True}, "evict_every is True"),
        ({"prefill_chunk": "64"}, "prefill_chunk is '64'"),
        ({"budget": 64.5}, "the budget is 64.5"),
        ({"profile": None}, "None is no method"),
    ],
)
def test_settings_of_another_type_are_refused(settings, words):
    with pytest.raises(UsageError) as caught:
        CompressedCache(tiny_model(), **{"profile": "snapkv", "budget": 40, **settings})
    assert words in str(caught.value)


def test_a_profile_may_be_given_by_its_path(tmp_path):
    model = tiny_model()
    BudgetProfile.from_budgets(model, RAGGED, SNAPKV).save(tmp_path / "p.json")
    cache = CompressedCache.prefill(model, tmp_path / "p.json", tokens(1, 40))
    assert [[len(head) for head in layer] for layer in cache.positions] == RAGGED
