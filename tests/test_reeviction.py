"""Evicting again: prompts read in chunks, second turns and long generations, against masking and slow definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import evolkv.cache.attend
from evolkv import BudgetProfile, CompressedCache, compress
from evolkv.cache.chunks import lengths_of_chunks
from evolkv.errors import RunError, UsageError
from evolkv.selectors import SELECTORS, get_selector
from evolkv.tasks import encode_prompt, get_task
from test_compressed_cache import check_beams
from test_selectors import prompt as random_prompt
from tiny import (
    EAGER_ONLY,
    FAMILIES,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    STRETCHING,
    WINDOW,
    failing,
    padded,
    stretching_model,
    tiny_model,
    tokens,
)

SNAPKV = {"name": "snapkv", "window": 4}
#: Every selector, small enough for tiny budgets.
EVERY = [
    SNAPKV,
    {"name": "h2o", "window": 4},
    {"name": "tova"},
    {"name": "streaming_llm"},
    {"name": "knorm"},
    {"name": "keydiff"},
    {"name": "chunkkv", "window": 4, "chunk": 3, "reuse": 1},
    {"name": "expected_attention"},
]
RAGGED = [[7, 12], [9, 9], [5, 30], [16, 5]]
BUDGETS = pytest.mark.parametrize("budgets", [9, RAGGED], ids=["dense", "ragged"])
GREEDY = {"do_sample": False, "eos_token_id": None}


def names(selectors):
    return [selector["name"] for selector in selectors]


def profile(model, budgets, selector=None):
    if isinstance(budgets, int):
        return BudgetProfile.uniform(model, budgets, selector or SNAPKV)
    return BudgetProfile.from_budgets(model, budgets, selector or SNAPKV)


def matrix(budgets):
    return np.broadcast_to(np.array(budgets), (LAYERS, KV_HEADS))


def counts(cache):
    """Entries that each head holds, ``[layers, batch * kv_heads]``."""
    held = np.zeros((len(cache.kv_layers), cache.num_rows * cache.kv_layers[0].num_kv_heads), dtype=int)
    for number, layer in enumerate(cache.kv_layers):
        for group in layer.groups:
            held[number, group.rows.numpy()] = group.keys.shape[1]
    return held


@pytest.fixture
def most_attended(monkeypatch):
    """The most entries that any head attended to, new tokens included, in calls other than the first."""
    most = [0]
    own = evolkv.cache.attend.attention

    def attention(query, key, *rest):
        most[0] = max(most[0], key.shape[1])
        return own(query, key, *rest)

    monkeypatch.setattr(evolkv.cache.attend, "attention", attention)
    return most


def held_after_each_call(model, cache, ids, calls):
    """Logits of all tokens, and before each call which tokens each head holds, ``[layers, kv_heads, tokens]``."""
    logits, held, start = [], [], 0
    for length in calls:
        seen = torch.zeros(LAYERS, KV_HEADS, ids.shape[1], dtype=torch.bool)
        if start:
            for layer in range(LAYERS):
                # What came after the last cut is held.
                seen[layer, :, cache.kv_layers[layer].prompt_lengths[0] : start] = True
                for head in range(KV_HEADS):
                    seen[layer, head, cache.positions[layer][head]] = True
        held.append(seen)
        logits.append(model(ids[:, start : start + length], cache=cache).logits)
        start += length
    return torch.cat(logits, dim=1), held


def masking_reference(model, ids, calls, held):
    """The same calls with a cache that keeps everything, and a mask over what is not held: the slow, obvious way."""
    at = [None]

    def attention(module, query, key, value, mask, scaling=None, **kwargs):
        fold = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(fold, 1).transpose(2, 3) * scaling
        if kwargs.get("softcap") is not None:
            logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
        if mask is not None:
            logits = logits + mask[..., : key.shape[2]]
        seen = at[0][module.layer_idx, :, : key.shape[2]].clone()
        seen[:, key.shape[2] - query.shape[2] :] = True
        logits = logits.masked_fill(~seen.repeat_interleave(fold, 0)[None, :, None], float("-inf"))
        return (logits.softmax(-1) @ value.repeat_interleave(fold, 1)).transpose(1, 2), None

    AttentionInterface.register("masking_reference", attention)
    AttentionMaskInterface.register("masking_reference", eager_mask)
    own = model.config._attn_implementation
    model.config._attn_implementation = "masking_reference"
    try:
        cache, logits, start = DynamicCache(), [], 0
        for length, at[0] in zip(calls, held, strict=True):
            logits.append(model(ids[:, start : start + length], cache=cache).logits)
            start += length
        return torch.cat(logits, dim=1)
    finally:
        model.config._attn_implementation = own


# Chunks.


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_change_nothing_where_budgets_cover_the_prompt(family, attention):
    model = tiny_model(family, "eager" if family in EAGER_ONLY else attention)
    if family in ("jamba", "bamba"):
        with (
            pytest.raises(UsageError, match="by one token at a time"),
            compress(model, profile(model, 400), prefill_chunk=16),
        ):
            pass
        return
    expected = model(tokens(1, 60)).logits
    with compress(model, profile(model, 400), prefill_chunk=16):
        output = model(tokens(1, 60))
    # One call's output, of every token, though it was read in four pieces.
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=0)
    assert output.cache.get_seq_length() == 60


@BUDGETS
@pytest.mark.parametrize("selector", EVERY, ids=names(EVERY))
def test_a_prompt_of_one_chunk_is_cut_as_without_chunks(selector, budgets):
    model = tiny_model("gemma3")
    with compress(model, profile(model, budgets, selector)):
        expected = model(tokens(2, 40)).cache
    with compress(model, profile(model, budgets, selector), prefill_chunk=40):
        cache = model(tokens(2, 40)).cache
    for layer, other in zip(cache.positions, expected.positions, strict=True):
        for head, same in zip(layer, other, strict=True):
            assert [row.tolist() for row in head] == [row.tolist() for row in same]


@pytest.mark.parametrize(
    ("family", "budgets"), [("llama", 9), ("llama", RAGGED), ("gemma3", RAGGED)], ids=["dense", "ragged", "sliding"]
)
@pytest.mark.parametrize("selector", EVERY, ids=names(EVERY))
def test_a_head_never_holds_more_than_its_budget_and_a_chunk(family, selector, budgets, most_attended):
    model = tiny_model(family)
    chosen = profile(model, budgets, selector)
    cache = CompressedCache(model, chosen, prefill_chunk=8)
    pieces = []

    def see(module, args, kwargs, output):
        pieces.append(counts(cache))

    handle = model.model.register_forward_hook(see, with_kwargs=True)
    model(tokens(1, 75), cache=cache)
    handle.remove()
    assert len(pieces) == 10
    assert all((piece <= matrix(budgets)).all() for piece in pieces)
    assert most_attended[0] <= matrix(budgets).max() + 8
    windows = np.array([layer.sliding_window or 75 for layer in cache.kv_layers])
    assert (pieces[-1] == np.minimum(matrix(budgets), windows[:, None])).all()
    entries = np.minimum(matrix(budgets), windows[:, None]).sum()
    assert cache.kv_bytes == entries * HEAD_DIM * 2 * 4


@BUDGETS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_call_in_chunks_equals_a_call_for_each(attention, budgets):
    model = tiny_model("gemma3", attention)
    ids = tokens(2, 50)
    whole, parts = (CompressedCache(model, profile(model, budgets), prefill_chunk=13) for _ in range(2))
    logits = model(ids, cache=whole).logits
    expected = [model(part, cache=parts).logits for part in ids.split([13, 13, 12, 12], dim=1)]
    assert torch.equal(logits, torch.cat(expected, dim=1))
    embedded = CompressedCache(model, profile(model, budgets), prefill_chunk=13)
    states = model.get_decoder()(inputs_embeds=model.get_input_embeddings()(ids), cache=embedded).last_hidden_state
    assert torch.equal(model.lm_head(states), logits)


@BUDGETS
def test_a_head_attends_to_its_own_budget_and_a_chunk_at_most(budgets):
    model = tiny_model()
    cache = CompressedCache(model, profile(model, budgets), prefill_chunk=8)
    attended = np.zeros((LAYERS, KV_HEADS), dtype=int)

    def before(module, args, kwargs):
        nonlocal attended
        new = kwargs["hidden_states"].shape[1]
        held = counts(cache)[module.layer_idx] if cache.kv_layers[module.layer_idx].is_initialized else 0
        attended[module.layer_idx] = np.maximum(attended[module.layer_idx], held + new)

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(before, with_kwargs=True)
    model(tokens(1, 90), cache=cache)
    assert (attended <= matrix(budgets) + 8).all()
    assert (attended > matrix(budgets)).all()


@pytest.mark.parametrize(
    ("family", "budgets", "selector"),
    [("llama", 9, SNAPKV), ("gemma2", RAGGED, SNAPKV), *(("llama", RAGGED, selector) for selector in EVERY)],
    ids=["dense", "softcap", *names(EVERY)],
)
def test_evicting_again_equals_masking(family, selector, budgets):
    # Sliding windows wide enough that nothing leaves them here: they have a test of their own.
    model = tiny_model(family, **({"sliding_window": 400} if family == "gemma2" else {}))
    ids = tokens(1, 60)
    calls = [12, 9, 10, 11, 1, 1, 1, 1, 8, 1, 1, 1, 1, 1, 1]
    cache = CompressedCache(model, profile(model, budgets, selector), prefill_chunk=12, evict="again", evict_every=4)
    logits, held = held_after_each_call(model, cache, ids, calls)
    assert (counts(cache) <= matrix(budgets) + 3).all()
    torch.testing.assert_close(logits, masking_reference(model, ids, calls, held), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows_slide_over_chunks(family):
    model = tiny_model(family)
    expected = model(tokens(1, 90)).logits
    cache = CompressedCache(model, profile(model, 400), prefill_chunk=100)
    logits = [model(part, cache=cache).logits for part in tokens(1, 90).split([30, 25, 1, 10, 1, 23], dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-5, rtol=0)
    for layer in cache.kv_layers:
        if layer.sliding_window is not None:
            assert max(group.keys.shape[1] for group in layer.groups) == WINDOW


@pytest.mark.parametrize("chunk", [7, 16, 25])
def test_chunks_of_generate_are_one_prompt(chunk):
    model = tiny_model()
    ids = tokens(1, 58)
    by_hand = CompressedCache(model, profile(model, RAGGED), prefill_chunk=30)
    for part in ids.split(chunk, dim=1):
        output = model(part, cache=by_hand)
    expected = [output.logits[:, -1].argmax(-1)]
    for _ in range(5):
        expected.append(model(expected[-1][:, None], cache=by_hand).logits[:, -1].argmax(-1))
    with compress(model, profile(model, RAGGED), prefill_chunk=30):
        output = model.generate(
            ids, prefill_chunk_size=chunk, max_new_tokens=6, return_dict_in_generate=True, use_cache=True, **GREEDY
        )
    assert output.sequences[0, 58:].tolist() == torch.cat(expected).tolist()
    # The prompt is cut to its budgets, and the five tokens that were fed back are kept.
    assert (counts(output.cache).reshape(LAYERS, -1) == matrix(RAGGED) + 5).all()


def test_a_prompt_ends_with_the_first_generated_token():
    model = tiny_model()
    cache = CompressedCache(model, profile(model, 9), prefill_chunk=20)
    model(tokens(1, 20), cache=cache)
    model(tokens(1, 20, seed=1), cache=cache)
    assert (counts(cache) == 9).all()
    model(tokens(1, 1), cache=cache)
    model(tokens(1, 50, seed=2), cache=cache)
    assert (counts(cache) == 9 + 1 + 50).all()


def test_a_prompt_ends_where_it_is_said_to():
    model = tiny_model()
    cache = CompressedCache(model, profile(model, 9), prefill_chunk=20)
    model(tokens(1, 40), cache=cache)
    cache.end_prompt()
    model(tokens(1, 15, seed=1), cache=cache)
    assert (counts(cache) == 9 + 15).all()


@pytest.mark.parametrize("tokens_and_chunk", [(1, 8), (8, 8), (9, 8), (75, 8), (5, 4), (1000, 512)])
def test_pieces_are_equal_and_never_a_single_token(tokens_and_chunk):
    length, chunk = tokens_and_chunk
    pieces = lengths_of_chunks(length, chunk)
    assert sum(pieces) == length
    assert max(pieces) - min(pieces) <= 1
    assert max(pieces) <= chunk
    assert min(pieces) > 1 or length == 1


@pytest.mark.parametrize("selector", [SNAPKV, *EVERY[1:3], EVERY[-1]], ids=["snapkv", "h2o", "tova", "expected"])
@pytest.mark.parametrize(
    ("side", "family", "budgets"), [("left", "gemma2", RAGGED), ("right", "gemma2", RAGGED), ("left", "llama", 9)]
)
def test_each_row_of_a_padded_batch_in_chunks_equals_the_prompt_alone(side, family, selector, budgets):
    model, chunk = tiny_model(family), 15
    rows, batch, mask = padded([45, 38, 13], side)
    more = tokens(1, 5, seed=7)
    settings = {"prefill_chunk": chunk, "evict": "again", "evict_every": 2}
    chosen = profile(model, budgets, selector)

    def read(ids, mask, sizes):
        """Logits of the last real token and of five more, and positions held."""
        cache, start, length = CompressedCache(model, chosen, **settings), 0, mask.sum(-1)
        places, last = (mask.cumsum(-1) - 1).clamp(min=0), []
        for size in sizes:
            part = slice(start, start + size)
            output = model(
                ids[:, part], attention_mask=mask[:, : start + size], position_ids=places[:, part], cache=cache
            )
            last.append(output.logits)
            start += size
        ends = (mask * torch.arange(mask.shape[1])).argmax(-1)
        logits = [torch.cat(last, 1)[torch.arange(len(ids)), ends]]
        for step in range(5):
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
            output = model(
                more[:, step : step + 1].expand(len(ids), -1),
                attention_mask=mask,
                position_ids=(length + step)[:, None],
                cache=cache,
            )
            logits.append(output.logits[:, -1])
        return torch.stack(logits, 1), cache

    together, cache = read(batch, mask, [chunk] * 3)
    for i, row in enumerate(rows):
        sizes = [int(part.sum()) for part in mask[i].split(chunk) if part.any()]
        alone, single = read(row[None], torch.ones_like(row)[None], sizes)
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=0)
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                assert cache.positions[layer][head][i].tolist() == single.positions[layer][head].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_read_in_chunks_changes_nothing_where_budgets_cover_it(side):
    for family in ("gemma2", "gemma3", "llama"):
        model = tiny_model(family)
        _, batch, mask = padded([45, 38, 9], side)
        arguments = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        expected = model(batch, **arguments).logits
        with compress(model, profile(model, 400), prefill_chunk=12):
            logits = model(batch, **arguments).logits
        torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


# Second turns.


@BUDGETS
def test_turns_of_a_conversation_stay_within_the_budgets(budgets):
    model = tiny_model()
    cache = CompressedCache(model, profile(model, budgets), evict="again")
    text = torch.empty(1, 0, dtype=torch.long)
    for turn in range(4):
        text = torch.cat([text, tokens(1, 40, seed=turn)], dim=1)
        text = model.generate(text, cache=cache, max_new_tokens=6, **GREEDY)
        # Of the six new tokens the last was not fed back.
        assert (counts(cache) == matrix(budgets) + 5).all()
    assert cache.get_seq_length() == 4 * 46 - 1


@pytest.mark.parametrize("budgets", [9, RAGGED])
def test_padding_in_a_single_column_is_no_token(budgets):
    model = tiny_model()
    prompt, steps, turn, last = (tokens(2, n, seed=n) for n in (30, 4, 5, 1))

    def read(rows, padding):
        """Logits after the last token of a second turn, and the positions held."""
        cache = CompressedCache(model, profile(model, budgets), evict="again")
        columns = [prompt[rows], *steps[rows].unbind(1), turn[rows], last[rows]]
        mask = torch.empty(len(rows), 0, dtype=torch.long)
        for step, column in enumerate(columns):
            column = column.view(len(rows), -1)
            new = torch.ones_like(column)
            if step - 1 == padding:
                new[-1] = 0
            if step - 1 == padding and len(rows) == 1:
                continue
            mask = torch.cat([mask, new], dim=1)
            places = (mask.cumsum(-1) - 1)[:, -column.shape[1] :]
            output = model(column, attention_mask=mask, position_ids=places, cache=cache)
        return output.logits[-1], [[head[-1] if len(rows) > 1 else head for head in layer] for layer in cache.positions]

    together, alone = read([0, 1], 2), read([1], 2)
    torch.testing.assert_close(*(logits[-1] for logits, _ in (together, alone)), atol=1e-5, rtol=0)
    assert all(map(torch.equal, *([head for layer in held for head in layer] for _, held in (together, alone))))


def test_a_second_turn_is_ranked_with_its_own_queries():
    model = tiny_model()
    chosen = profile(model, 12)
    ids, calls = tokens(1, 70), [40, 30]
    cache = CompressedCache(model, chosen, evict="again")
    held_after_each_call(model, cache, ids, calls)
    first = CompressedCache(model, chosen)
    model(ids[:, :40], cache=first)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            kept = cache.positions[layer][head].tolist()
            assert kept[-4:] == [66, 67, 68, 69]
            assert set(kept) <= {*first.positions[layer][head].tolist(), *range(40, 70)}
    other = CompressedCache(model, chosen, evict="again")
    model(ids[:, :40], cache=other)
    model(tokens(1, 30, seed=5), cache=other)
    old = [
        [[p for p in head.tolist() if p < 40] for layer in held.positions for head in layer] for held in (cache, other)
    ]
    assert old[0] != old[1]


def test_evicting_once_is_the_default():
    model = tiny_model()
    cache = CompressedCache(model, profile(model, 9))
    model(tokens(1, 40), cache=cache)
    model(tokens(1, 30, seed=1), cache=cache)
    assert (counts(cache) == 39).all()


# Long generations.


@BUDGETS
@pytest.mark.parametrize("selector", EVERY, ids=names(EVERY))
def test_generation_stays_within_budget_and_interval(selector, budgets, most_attended):
    model = tiny_model()
    cache = CompressedCache(model, profile(model, budgets, selector), evict_every=5)
    output = model(tokens(2, 40), cache=cache)
    for step in range(23):
        newest = output.logits[:, -1:].argmax(-1)
        output = model(newest, cache=cache)
        assert (counts(cache).reshape(LAYERS, 2, KV_HEADS) == matrix(budgets)[:, None] + (step + 1) % 5).all()
    assert cache.get_seq_length() == 63
    newest_cut = 60
    for layer in cache.positions:
        for head in layer:
            assert all(row.tolist() == sorted(set(row.tolist())) and int(row.max()) < newest_cut for row in head)


def test_streaming_llm_holds_sinks_and_the_latest_tokens_of_any_length():
    model = tiny_model()
    with compress(model, profile(model, 12, "streaming_llm"), prefill_chunk=10, evict_every=1):
        cache = model.generate(tokens(1, 47), max_new_tokens=20, return_dict_in_generate=True, **GREEDY).cache
    assert all(head.tolist() == [0, 1, 2, 3, *range(58, 66)] for layer in cache.positions for head in layer)


def test_h2o_goes_on_summing_over_chunks_and_generated_tokens():
    model = tiny_model(num_hidden_layers=1)
    ids, calls, window, budget = tokens(1, 47), [15, 12, 11, 1, 1, 1, 1, 1, 1, 1, 1, 1], 4, 10
    cuts = [15, 27, 38, 41, 44, 47]
    cache = CompressedCache(
        model, BudgetProfile.uniform(model, budget, {"name": "h2o", "window": window}), prefill_chunk=15, evict_every=3
    )
    start = 0
    for length in calls:
        model(ids[:, start : start + length], cache=cache)
        start += length
    # Of the only layer, queries and keys do not depend on what was evicted. So sum up from the whole attention.
    plain = tiny_model(attention="eager", num_hidden_layers=1)
    seen = {}

    def attention(module, query, key, value, mask, scaling=None, **kwargs):
        seen.update(query=query, key=key, scaling=scaling)
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("seeing", attention)
    plain.config._attn_implementation = "seeing"
    plain(ids)
    logits = seen["query"].unflatten(1, (KV_HEADS, -1)) @ seen["key"][:, :, None].transpose(-1, -2) * seen["scaling"]
    for head in range(KV_HEADS):
        held, total, before = [], torch.zeros(47), 0
        for cut in cuts:
            held += range(before, cut)
            for asking in range(before, cut):
                visible = torch.tensor([p for p in held if p <= asking])
                total[visible] += logits[0, head, :, asking][:, visible].softmax(-1).mean(0)
            older = sorted(held[:-window], key=lambda p: -float(total[p]))
            held, before = sorted(older[: budget - window] + held[-window:]), cut
        assert cache.positions[0][head].tolist() == held


def test_beams_of_a_cache_that_evicts_again_equal_generating_from_each_beam_alone():
    model = tiny_model()
    for selector in (SNAPKV, {"name": "h2o", "window": 4}):
        with compress(model, profile(model, RAGGED, selector), evict_every=2):
            check_beams(model, new=8)


def test_reset_cache_serves_another_prompt():
    model = tiny_model()
    cache = CompressedCache(model, profile(model, RAGGED), prefill_chunk=10, evict="again", evict_every=3)
    runs = []
    for _ in range(2):
        runs.append([model(part, cache=cache).logits for part in tokens(1, 60).split([40, 1, 1, 18], dim=1)])
        cache.reset()
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


# Scoring what is held.


def some_held(of, counts, seed=0):
    """What is left of a prompt: of each head so many entries, the last five among them, with their queries."""
    random = np.random.default_rng(seed)
    longest, length = max(counts), of.num_tokens
    positions = torch.full((1, len(counts), longest), -1)
    key, value = (torch.zeros(1, len(counts), longest, x.shape[-1]) for x in (of.key, of.value))
    for head, count in enumerate(counts):
        old = np.sort(random.choice(length - 5, count - 5, replace=False))
        kept = torch.tensor([*old.tolist(), *range(length - 5, length)])
        positions[0, head, longest - count :] = kept
        key[0, head, longest - count :] = of.key[0, head, kept]
        value[0, head, longest - count :] = of.value[0, head, kept]
    return replace(
        of, query=of.query[:1, :, -5:], key=key, value=value, first_query=longest - 5, positions=positions, seen=length
    )


@pytest.mark.parametrize("selector", EVERY, ids=names(EVERY))
@pytest.mark.parametrize("window", [None, 20])
def test_a_whole_prompt_scores_the_same_whether_or_not_positions_are_told(selector, window):
    of = random_prompt(window)
    told = replace(of, positions=of.places, seen=of.num_tokens)
    chosen = get_selector(selector)
    torch.testing.assert_close(chosen.score(told), chosen.score(of))
    assert torch.equal(chosen.rank(told), chosen.rank(of))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 30])
def test_probabilities_of_what_is_held_are_attention_with_a_mask(window, softcap):
    of = random_prompt(window, softcap)
    held = some_held(of, [20, 12])
    whole = of.probabilities(45, 50)[0]
    found = held.probabilities(15, 20)[0]
    for head, count in enumerate([20, 12]):
        kept = held.positions[0, head, 20 - count :]
        expected = whole[head][..., kept]
        torch.testing.assert_close(found[head][..., 20 - count :], expected / expected.sum(-1, keepdim=True))
        assert not found[head][..., : 20 - count].any()


@pytest.mark.parametrize("selector", [s for s in EVERY if s["name"] not in ("tova", "chunkkv")], ids=str)
def test_a_head_that_holds_less_scores_as_if_alone(selector):
    held, chosen = some_held(random_prompt(), [20, 12]), get_selector(selector)
    alone = replace(
        held,
        query=held.query[:, 3:],
        key=held.key[:, 1:, 8:],
        value=held.value[:, 1:, 8:],
        positions=held.positions[:, 1:, 8:],
        first_query=7,
    )
    torch.testing.assert_close(chosen.score(held)[:, 1:, 8:], chosen.score(alone))
    assert torch.equal(chosen.rank(held)[:, 1:, :12] - 8, chosen.rank(alone))


def test_tova_averages_over_the_heads_that_hold_a_token():
    held = some_held(random_prompt(), [20, 12])
    found = get_selector("tova").score(held)
    last = held.probabilities(19, 20)[0, :, :, 0].mean(1)
    for head in range(2):
        for slot in range(20 - [20, 12][head], 19):
            place = int(held.positions[0, head, slot])
            votes = [last[h][held.positions[0, h] == place] for h in range(2)]
            torch.testing.assert_close(found[0, head, slot], torch.cat(votes).mean())


def test_chunkkv_averages_over_what_is_held_of_a_chunk():
    held = some_held(random_prompt(), [20, 12])
    selector = get_selector({"name": "chunkkv", "chunk": 8, "window": 2, "reuse": 1})
    found, votes = selector.score(held), held.probabilities(18, 20)[0].mean((1, 2))
    for head in range(2):
        for slot in range(20 - [20, 12][head], 18):
            chunk = int(held.positions[0, head, slot]) // 8
            # The last chunk is shared with the window.
            if chunk < 48 // 8:
                places = held.positions[0]
                same = votes[(places >= 0) & (places // 8 == chunk)]
                torch.testing.assert_close(found[0, head, slot], same.mean())
    assert torch.isinf(found[..., 18:]).all()


def test_what_has_left_a_sliding_window_is_ranked_last():
    held = some_held(random_prompt(20), [20, 12])
    for selector in EVERY:
        ranking = get_selector(selector).rank(held)[0]
        for head in range(2):
            places = held.positions[0, head][ranking[head]]
            inside = int((places >= 30).sum())
            assert (places[:inside] >= 30).all()


# Refusals.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefill_chunk": 3}, "prefill_chunk is 3; expected at least 4"),
        ({"evict_every": 0}, "evict_every is 0; expected at least 1"),
        ({"evict": "twice"}, "evict is 'twice'; expected 'once'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    model = tiny_model()
    with pytest.raises(UsageError, match=message):
        CompressedCache(model, profile(model, 9), **settings)
    with pytest.raises(UsageError, match=message), compress(model, profile(model, 9), **settings):
        pass


@pytest.mark.parametrize("settings", [{"prefill_chunk": 16}, {"evict": "again"}, {"evict_every": 4}])
def test_methods_that_cannot_evict_again_are_refused(settings):
    model = tiny_model()
    with pytest.raises(UsageError, match=r"adakv.*cannot evict again"):
        CompressedCache(model, "adakv+snapkv", 64, **settings)
    with pytest.raises(UsageError, match=r"chunkkv.*reuse=1"):
        CompressedCache(model, "chunkkv", 64, **settings)


def test_every_selector_can_evict_again_or_is_refused():
    refused = {name for name, selector in SELECTORS.items() if selector.rereads or selector.layer is not None}
    assert set(names(EVERY)) == set(SELECTORS) - refused


def test_taking_tokens_back_is_refused_once_later_tokens_may_be_evicted():
    model = tiny_model()
    for settings in ({"evict": "again"}, {"evict_every": 4}):
        cache = CompressedCache(model, profile(model, 9), **settings)
        model(tokens(1, 20), cache=cache)
        model(tokens(1, 1), cache=cache)
        with pytest.raises(RunError, match="take back 1 tokens"):
            cache.crop(-1)
    cache = CompressedCache(model, profile(model, 9), prefill_chunk=8)
    model(tokens(1, 20), cache=cache)
    held = [group.keys.clone() for layer in cache.kv_layers for group in layer.groups]
    model(tokens(1, 1), cache=cache)
    model(tokens(1, 3), cache=cache)
    cache.crop(-4)
    assert all(map(torch.equal, held, (group.keys for layer in cache.kv_layers for group in layer.groups)))


def test_what_chunks_cannot_give_is_refused():
    model = tiny_model()
    with compress(model, profile(model, 9), prefill_chunk=8):
        with pytest.raises(UsageError, match="output_hidden_states"):
            model(tokens(1, 20), output_hidden_states=True)
        with pytest.raises(UsageError, match="prepared one"):
            model(tokens(1, 20), attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool).tril())


@pytest.mark.parametrize("kind", STRETCHING)
def test_chunks_of_a_text_beyond_the_limit_of_its_rotary_embedding_are_refused(kind):
    model = stretching_model(kind, 32)
    with compress(model, profile(model, 100), prefill_chunk=16):
        with pytest.raises(UsageError, match="beyond 32 tokens, and the first pieces of a text of 33"):
            model(tokens(1, 33))
        model(tokens(1, 32))


def test_what_chunks_of_experts_or_images_cannot_give_is_refused():
    experts = tiny_model("mixtral")
    cache = CompressedCache(experts, profile(experts, 9), prefill_chunk=8)
    with pytest.raises(UsageError, match="output_router_logits"):
        experts(tokens(1, 20), cache=cache, output_router_logits=True)
    model = tiny_model()
    cache = CompressedCache(model, profile(model, 9), prefill_chunk=8)
    with pytest.raises(UsageError, match="cannot take 'visual_pos_masks' apart"):
        model(tokens(1, 20), cache=cache, visual_pos_masks=torch.zeros(1, 20, dtype=torch.bool))


@pytest.mark.parametrize("when", [{"evict": "again"}, {"evict_every": 4}, {"prefill_chunk": 8}])
def test_caches_that_evict_later_are_not_merged(when):
    model = tiny_model()
    caches = [CompressedCache(model, profile(model, 9), **when) for _ in range(2)]
    for cache in caches:
        model(tokens(1, 20), cache=cache)
    with pytest.raises(UsageError, match="cannot be merged"):
        CompressedCache.merge(model, caches)


def test_caches_of_prompts_that_were_read_in_chunks_are_merged():
    model = tiny_model()
    caches = [CompressedCache(model, profile(model, budget), prefill_chunk=8) for budget in (9, 17)]
    for cache in caches:
        model(tokens(1, 30), cache=cache)
        cache.end_prompt()
    alone = [cache.copy() for cache in caches]
    merged = CompressedCache.merge(model, caches, room=4)
    for number in range(4):
        new = tokens(2, 1, seed=number)
        places = torch.full((2, 1), 30 + number)
        logits = model(new, position_ids=places, cache=merged).logits
        for i, cache in enumerate(alone):
            expected = model(new[i : i + 1], position_ids=places[:1], cache=cache).logits
            torch.testing.assert_close(logits[i : i + 1], expected)
    assert merged.kv_bytes_by_sequence == [cache.kv_bytes for cache in alone]


def test_a_failed_call_leaves_nothing_behind():
    model = tiny_model()
    expected = CompressedCache(model, profile(model, 9), prefill_chunk=8)
    logits = model(tokens(1, 20), cache=expected).logits
    cache = CompressedCache(model, profile(model, 9), prefill_chunk=8)
    with failing(model.model.layers[0], call=3):
        model(tokens(1, 20), cache=cache)
    cache.reset()
    assert torch.equal(model(tokens(1, 20), cache=cache).logits, logits)


@pytest.mark.model
def test_smollm2_finds_a_needle_in_a_prompt_read_in_chunks(smollm2):
    model, tokenizer = smollm2
    example = get_task("niah:context=400").examples("report", 1, tokenizer)[0]
    ids = encode_prompt(tokenizer, example)
    with torch.inference_mode(), compress(model, profile(model, 200, "keydiff"), prefill_chunk=100):
        output = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    answer = tokenizer.decode(output.sequences[0, ids.shape[1] :])
    assert example.references[0] in answer
    assert (counts(output.cache) <= 200 + 12).all()


def test_what_goes_on_by_a_single_token_cannot_be_cut_after_a_turn():
    model = tiny_model("bamba")
    with pytest.raises(UsageError, match="by one token at a time"):
        CompressedCache(model, profile(model, 9), evict="again")
    CompressedCache(model, profile(model, 9), evict_every=8)


@pytest.mark.parametrize("settings", [{"prefill_chunk": 16}, {"evict": "again"}, {"evict_every": 8}])
def test_assisted_decoding_is_refused_by_caches_that_evict_again(settings):
    model = tiny_model()
    cache = CompressedCache(model, profile(model, 9), **settings)
    with pytest.raises(UsageError, match="needs a cache that evicts once"):
        model.generate(tokens(1, 40), cache=cache, prompt_lookup_num_tokens=3, max_new_tokens=6, eos_token_id=None)


def test_another_number_of_sequences_is_refused_in_words():
    model = tiny_model()
    cache = CompressedCache(model, profile(model, 9), evict="again")
    model(tokens(2, 40), cache=cache)
    with pytest.raises(UsageError, match="holds 2 sequences, but this call brings 3"):
        model(tokens(3, 5), cache=cache)


def test_chunks_of_a_call_with_its_cache_by_position():
    model = tiny_model()
    expected = model.model(tokens(1, 60)).last_hidden_state
    cache = CompressedCache(model, profile(model, 400), prefill_chunk=16)
    pieces = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: pieces.append(args[0].shape[1]))
    output = model.model(tokens(1, 60), None, None, cache)
    handle.remove()
    assert pieces == [15] * 4
    torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-5, rtol=0)
