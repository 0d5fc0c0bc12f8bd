"""The compressed cache: exactness, memory and positions, on tiny models of every family and on SmolLM2."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from itertools import product

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from evolkv import BudgetProfile, CompressedCache, compress
from evolkv.cache.rows import RowGroup
from evolkv.errors import ModelError, ProfileError, UsageError
from evolkv.models.layers import continues_by_token
from tiny import EAGER_ONLY, FAMILIES, HEAD_DIM, HYBRIDS, KV_HEADS, LAYERS, WINDOW, failing, padded, tiny_model, tokens

SNAPKV = {"name": "snapkv", "window": 4}
RAGGED = [[7, 12], [9, 9], [5, 30], [16, 4]]
#: How the 7 tokens after the prompt are fed: single tokens, and several at once.
STEPS = [(0, 1), (1, 2), (2, 6), (6, 7)]


def profile(model, budgets, selector=None):
    if isinstance(budgets, int):
        return BudgetProfile.uniform(model, budgets, selector or SNAPKV)
    return BudgetProfile.from_budgets(model, budgets, selector or SNAPKV)


def run(model, prompt, mask=None, cache=None):
    """Logits at the end of the prompt and after each of 7 more tokens, ``[batch, 8, vocabulary]``, and the cache."""
    batch = len(prompt)
    mask = torch.ones_like(prompt) if mask is None else mask
    more = tokens(1, 7, seed=7).expand(batch, -1)
    output = model(prompt, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), cache=cache)
    cache = output.cache
    last = (mask * torch.arange(mask.shape[1])).argmax(-1)
    logits = [output.logits[torch.arange(batch), last]]
    length = mask.sum(-1, keepdim=True)
    # Some plain models cannot take several tokens here: their recurrent states would start from nothing.
    steps = [(i, i + 1) for i in range(7)] if continues_by_token(model) else STEPS
    for start, stop in steps:
        mask = torch.cat([mask, mask.new_ones(batch, stop - start)], dim=1)
        output = model(
            more[:, start:stop],
            attention_mask=mask,
            position_ids=length + torch.arange(start, stop),
            cache=cache,
        )
        logits += list(output.logits.unbind(1))
    return torch.stack(logits, 1), cache


WITH_SDPA = [family for family in FAMILIES if family not in EAGER_ONLY]


@pytest.mark.parametrize(("family", "attention"), [*product(FAMILIES, ["eager"]), *product(WITH_SDPA, ["sdpa"])])
@pytest.mark.parametrize("length", [20, 40])
def test_budget_covering_prompt_changes_nothing(family, attention, length):
    model = tiny_model(family, attention)
    expected, _ = run(model, tokens(1, length))
    with compress(model, profile(model, 400)):
        logits, cache = run(model, tokens(1, length))
    assert isinstance(cache, CompressedCache)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_budget_covering_padded_prompts_changes_nothing(family):
    model = tiny_model(family)
    _, batch, mask = padded([40, 33, 29], "left")
    expected, _ = run(model, batch, mask)
    with compress(model, profile(model, 400)):
        logits, _ = run(model, batch, mask)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_budget_covering_right_padded_prompts_changes_nothing():
    model = tiny_model("llama")
    _, batch, mask = padded([40, 33, 29], "right")
    expected, _ = run(model, batch, mask)
    with compress(model, profile(model, 400)):
        logits, _ = run(model, batch, mask)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "budgets",
    [
        pytest.param(400, id="covering", marks=pytest.mark.slow),
        pytest.param(9, id="dense", marks=pytest.mark.slow),
        pytest.param(RAGGED, id="ragged"),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_padded_batch_equals_the_prompt_alone(family, side, budgets):
    if family in HYBRIDS and side == "right":
        pytest.skip("a recurrent state runs on into padding on the right, in transformers as well")
    model = tiny_model(family)
    rows, batch, mask = padded([40, 33, 15], side)
    with compress(model, profile(model, budgets)):
        together, cache = run(model, batch, mask)
        for i, row in enumerate(rows):
            alone, single = run(model, row[None])
            torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=0)
            for layer in range(LAYERS):
                for head in range(KV_HEADS):
                    assert cache.positions[layer][head][i].tolist() == single.positions[layer][head].tolist()


def masking_reference(model, prompt, positions):
    """What `run` gives when every entry is held and evicted ones are masked: the slow, obvious way."""
    kept = torch.zeros(LAYERS, KV_HEADS, prompt.shape[1] + 7, dtype=torch.bool)
    kept[..., prompt.shape[1] :] = True
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            kept[layer, head, positions[layer][head]] = True

    def attention(module, query, key, value, mask, scaling=None, **kwargs):
        fold = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(fold, 1).transpose(2, 3) * scaling
        if kwargs.get("softcap") is not None:
            logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
        if mask is not None:
            logits = logits + mask[..., : key.shape[2]]
        if key.shape[2] > query.shape[2]:
            seen = kept[module.layer_idx, :, : key.shape[2]].repeat_interleave(fold, 0)[None, :, None]
            logits = logits.masked_fill(~seen, float("-inf"))
        return (logits.softmax(-1) @ value.repeat_interleave(fold, 1)).transpose(1, 2), None

    AttentionInterface.register("masking_reference", attention)
    AttentionMaskInterface.register("masking_reference", eager_mask)
    own = model.config._attn_implementation
    model.config._attn_implementation = "masking_reference"
    try:
        # A plain cache of full layers, so that positions are indices even where the model slides a window.
        return run(model, prompt, cache=DynamicCache())[0]
    finally:
        model.config._attn_implementation = own


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "phi3"])
def test_evicting_equals_masking(family, seed):
    random = np.random.default_rng(seed)
    # Sliding windows wide enough that nothing leaves them here: they have a test of their own.
    wide = {"sliding_window": 400} if family.startswith("gemma") else {}
    model = tiny_model(family, seed=seed, **wide)
    prompt = tokens(1, int(random.integers(10, 60)), seed=seed)
    budgets = random.integers(4, prompt.shape[1] + 5, size=(LAYERS, KV_HEADS))
    with compress(model, profile(model, budgets)):
        logits, cache = run(model, prompt)
    torch.testing.assert_close(logits, masking_reference(model, prompt, cache.positions), atol=1e-5, rtol=0)


@pytest.mark.parametrize("budgets", [10, RAGGED], ids=["dense", "ragged"])
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_sliding_layers_never_hold_more_than_their_window(family, budgets):
    model = tiny_model(family)
    with compress(model, profile(model, 200 if budgets == 10 else budgets)):
        cache = model(tokens(1, 60)).cache
        for step in range(30):
            model(tokens(1, 1, seed=step), cache=cache)
            sliding = [layer for layer in cache.layers if layer.sliding_window is not None]
            assert sliding
            for layer in sliding:
                assert max(group.keys.shape[1] for group in layer.groups) <= WINDOW


@pytest.mark.parametrize("method", ["snapkv", "pyramid+snapkv", "cake+snapkv", "dynamickv+snapkv", "adakv+snapkv"])
def test_a_sliding_window_smaller_than_the_selectors_is_held_whole(method):
    model = tiny_model("gemma3")
    cache = CompressedCache(model, method, 64)
    model(tokens(1, 300), cache=cache)
    held = [[len(positions) for positions in layer] for layer in cache.positions]
    assert held[:3] == [[WINDOW] * KV_HEADS] * 3
    assert sum(held[3]) == KV_HEADS * (LAYERS * 64 - 3 * WINDOW)


@pytest.mark.parametrize("budgets", [[WINDOW] * 3 + [184], [[WINDOW] * KV_HEADS] * 3 + [[100, 268]]])
def test_a_profile_gives_a_narrow_sliding_layer_its_window(budgets, tmp_path):
    model = tiny_model("gemma3")
    profile = BudgetProfile.from_budgets(model, budgets)
    profile.save(tmp_path / "p.json")
    assert BudgetProfile.load(tmp_path / "p.json") == profile
    assert profile.expand(96, [WINDOW] * 3 + [512]).budgets[:3].tolist() == [[WINDOW] * KV_HEADS] * 3
    cache = CompressedCache(model, profile)
    model(tokens(1, 300), cache=cache)
    assert [len(positions) for positions in cache.positions[3]] == profile.budgets[3].tolist()
    with pytest.raises(ProfileError, match=r"budgets\[0\]\[0\] is 23, expected at least 24"):
        BudgetProfile.from_budgets(model, [23, 24, 24, 184])
    with pytest.raises(ProfileError, match=r"budgets\[3\]\[0\] is 24, expected at least 32"):
        BudgetProfile.from_budgets(model, [24] * 4, budget=32)


def test_sliding_layer_keeps_only_tokens_within_its_window():
    model = tiny_model("mistral")
    cache = CompressedCache(model, profile(model, 10))
    model(tokens(1, 60), cache=cache)
    for layer in cache.positions:
        for head in layer:
            assert len(head) == 10
            assert int(head.min()) >= 60 - WINDOW


@pytest.mark.parametrize("budgets", [9, RAGGED, 400], ids=["dense", "ragged", "covering"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_kv_bytes_are_exact(family, budgets):
    model = tiny_model(family)
    length = 37
    cache = CompressedCache(model, profile(model, budgets))
    model(tokens(1, length), cache=cache)
    entries = np.minimum(np.broadcast_to(np.array(budgets), (LAYERS, KV_HEADS)), length).sum()
    assert cache.kv_bytes == entries * HEAD_DIM * 2 * 4
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for group in layer.groups
        for tensor in (group.keys, group.values)
    }
    assert sum(storages.values()) == cache.kv_bytes
    model(tokens(1, 1), cache=cache)
    assert cache.kv_bytes == (entries + LAYERS * KV_HEADS) * HEAD_DIM * 2 * 4


@pytest.mark.parametrize("budgets", [9, RAGGED, 400], ids=["dense", "ragged", "covering"])
def test_nothing_else_of_the_prompt_stays_alive(budgets):
    # Phi-3 projects queries, keys and values at once: a slice of that would keep all of it alive.
    model = tiny_model("phi3")
    alive = []
    for layer in model.model.layers:
        layer.self_attn.qkv_proj.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    cache = CompressedCache(model, profile(model, budgets))
    model(tokens(1, 50), cache=cache)
    gc.collect()
    assert len(alive) == LAYERS
    assert not any(reference() is not None for reference in alive)
    # `type(...) is` rather than isinstance, which would wake lazy modules among all objects.
    large = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.ndim == 4 and x.shape[-2:] == (50, HEAD_DIM)]
    assert not large


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, lambda model, cache: cache.batch_select_indices([0])),
        ({"evict": "again"}, lambda model, cache: model(tokens(2, 5), cache=cache)),
        ({"prefill_chunk": 8}, lambda model, cache: model(tokens(2, 20), cache=cache)),
    ],
    ids=["select", "again", "chunk"],
)
def test_what_was_cut_or_chosen_from_does_not_wait_for_the_next_token(settings, change):
    model = tiny_model()
    cache = CompressedCache(model, profile(model, RAGGED), **settings)
    for new in (20, 3):
        model(tokens(2, new), cache=cache)
    before = [weakref.ref(group) for layer in cache.kv_layers for group in layer.groups]
    change(model, cache)
    assert not any(reference() is not None for reference in before)


# Gradients.


def loss(model, embedded, cache):
    """Of a prompt's embeddings, through what a cache keeps of them; tokens are read singly and together."""
    model(inputs_embeds=embedded, cache=cache)
    logits = [model(tokens(len(embedded), n, seed=n), cache=cache).logits for n in (3, 1, 1)]
    return torch.cat(logits, dim=1).sin().sum()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradients_pass_through_a_covered_prompt_as_through_a_dynamic_cache(family):
    model = tiny_model(family).requires_grad_(True)
    found = []
    for cache in (DynamicCache(config=model.config), CompressedCache(model, profile(model, 200))):
        model.zero_grad()
        embedded = model.get_input_embeddings()(tokens(2, 40)).detach().requires_grad_(True)
        loss(model, embedded, cache).backward()
        found.append([embedded.grad, *(each.grad for each in model.parameters())])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (RAGGED, {}),
        (RAGGED, {"evict": "again"}),
        (RAGGED, {"evict_every": 4}),
        (RAGGED, {"prefill_chunk": 16}),
        ("adakv+snapkv:window=4", {}),
        ("cake+snapkv:window=4", {}),
    ],
    ids=str,
)
def test_gradients_pass_through_what_is_kept(method, settings):
    # Its norms compute in the format of their input, Llama's in float32.
    model = tiny_model("stablelm").double()
    kept = (method, 9) if isinstance(method, str) else (profile(model, method),)
    embedded = model.get_input_embeddings()(tokens(2, 40)).detach().requires_grad_(True)
    loss(model, embedded, CompressedCache(model, *kept, **settings)).backward()
    change = torch.randn(embedded.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1)) * 1e-6
    with torch.no_grad():
        up, down = (loss(model, embedded + s * change, CompressedCache(model, *kept, **settings)) for s in (1, -1))
    torch.testing.assert_close((embedded.grad * change).sum(), (up - down) / 2, rtol=1e-4, atol=0)


def test_large_groups_are_not_written_to_where_a_gradient_may_be_asked_for():
    prompt = torch.ones(2, 5000, HEAD_DIM, requires_grad=True)
    group = RowGroup(torch.arange(2), prompt * 1, prompt * 1, torch.zeros(2, 0))
    total = torch.zeros(())
    for _ in range(2):
        group.append(torch.ones(2, 1, HEAD_DIM), torch.ones(2, 1, HEAD_DIM))
        total = total + group.keys.square().sum()
    total.backward()
    assert torch.equal(prompt.grad, torch.full_like(prompt, 4.0))
    # Without gradients it has room as ever.
    with torch.no_grad():
        group.append(torch.ones(2, 1, HEAD_DIM), torch.ones(2, 1, HEAD_DIM))
    assert group.nbytes > group.keys.nbytes + group.values.nbytes
    assert not group.keys.requires_grad


def test_without_gradients_no_graph_is_held():
    model = tiny_model().requires_grad_(True)
    cache = CompressedCache(model, profile(model, RAGGED))
    with torch.no_grad():
        model(tokens(1, 40), cache=cache)
    assert not any(
        x.requires_grad for layer in cache.layers for group in layer.groups for x in (group.keys, group.values)
    )


def test_positions_are_true_positions():
    model = tiny_model()
    budgets = np.add(RAGGED, 1)
    cache = CompressedCache(model, profile(model, budgets, "streaming_llm"))
    model(tokens(1, 40), cache=cache)
    for layer, row in enumerate(budgets.tolist()):
        for head, budget in enumerate(row):
            expected = [*range(4), *range(40 - (budget - 4), 40)]
            assert cache.positions[layer][head].tolist() == expected
            assert cache.positions[layer][head].dtype == torch.int64
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_reset_cache_serves_another_prompt(family):
    model = tiny_model(family)
    cache = CompressedCache(model, profile(model, RAGGED))
    first, _ = run(model, tokens(1, 40), cache=cache)
    cache.reset()
    assert cache.kv_bytes == 0
    again, _ = run(model, tokens(1, 40), cache=cache)
    assert torch.equal(first, again)


def test_explicit_cache_equals_with_block():
    model = tiny_model()
    chosen = profile(model, RAGGED)
    with compress(model, chosen):
        expected, _ = run(model, tokens(1, 40))
    logits, _ = run(model, tokens(1, 40), cache=CompressedCache(model, chosen))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    "settings", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}, {"num_beams": 3, "do_sample": False}]
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generate_with_covering_budget_gives_the_same_text(family, settings):
    model = tiny_model(family)
    _, batch, mask = padded([40, 33, 15], "left")
    texts = []
    for budget in (None, 400):
        torch.manual_seed(3)
        arguments = {"attention_mask": mask, "max_new_tokens": 30, "eos_token_id": None, **settings}
        if budget is None:
            texts.append(model.generate(batch, **arguments))
        else:
            with compress(model, profile(model, budget)):
                texts.append(model.generate(batch, **arguments))
    assert torch.equal(*texts)


def test_generate_takes_an_explicit_cache():
    model = tiny_model()
    chosen = profile(model, RAGGED)
    cache = CompressedCache(model, chosen)
    text = model.generate(tokens(1, 40), cache=cache, max_new_tokens=5, do_sample=False, eos_token_id=None)
    with compress(model, chosen):
        expected = model.generate(tokens(1, 40), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(text, expected)
    assert cache.kv_bytes == (np.sum(RAGGED) + 4 * LAYERS * KV_HEADS) * HEAD_DIM * 2 * 4


def check_beams(model, new):
    """Beam search over `new` tokens, inside `compress`, scores each beam as generating from it alone does."""
    beams = model.generate(
        tokens(1, 40), num_beams=4, num_return_sequences=4, max_new_tokens=new, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for sequence, score in zip(beams.sequences, beams.sequences_scores, strict=True):
        output = model(tokens(1, 40))
        log_probs = [output.logits[0, -1].log_softmax(-1)[sequence[40]]]
        for at in range(40, 39 + new):
            output = model(sequence[None, at : at + 1], cache=output.cache)
            log_probs.append(output.logits[0, -1].log_softmax(-1)[sequence[at + 1]])
        torch.testing.assert_close(torch.stack(log_probs).mean(), score, atol=1e-4, rtol=0)


def test_beam_search_on_a_ragged_cache_equals_generating_from_each_beam_alone():
    model = tiny_model()
    with compress(model, profile(model, RAGGED)):
        check_beams(model, new=6)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_model_is_restored_on_leaving():
    model = tiny_model()
    hooks = (dict(model._forward_pre_hooks), dict(model.model._forward_pre_hooks))
    expected, plain = run(model, tokens(1, 40))
    with compress(model, profile(model, 8)):
        assert model.config._attn_implementation == "evolkv_sdpa"
    assert model.config._attn_implementation == "sdpa"
    assert hooks == (dict(model._forward_pre_hooks), dict(model.model._forward_pre_hooks))
    with pytest.raises(ZeroDivisionError), compress(model, profile(model, 8)):
        raise ZeroDivisionError
    after, cache = run(model, tokens(1, 40))
    assert model.config._attn_implementation == "sdpa"
    assert type(cache) is type(plain) is DynamicCache
    assert torch.equal(after, expected)


def test_model_is_restored_when_the_last_explicit_cache_goes():
    model = tiny_model()
    first, second = (CompressedCache(model, profile(model, 8)) for _ in range(2))
    del first
    gc.collect()
    assert model.config._attn_implementation == "evolkv_sdpa"
    second.release()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded])
@pytest.mark.parametrize("block", [False, True], ids=["explicit cache", "with block"])
def test_copies_and_pickles_of_a_hooked_model_are_models_of_their_own(how, block):
    model, prompt = tiny_model(), tokens(1, 40)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    plain, chosen = model.generate(prompt, **settings), profile(model, RAGGED)
    expected = model.generate(prompt, cache=CompressedCache(model, chosen), **settings)
    with compress(model, chosen) if block else contextlib.nullcontext():
        cache = CompressedCache(model, chosen)
        twin = how(model)
        assert twin.config._attn_implementation == "sdpa"
        assert torch.equal(twin.generate(prompt, **settings), plain)
    for _ in range(2):
        # In pieces, so that hooks that were there twice would show.
        pieces = CompressedCache(twin, chosen, prefill_chunk=16)
        twin(prompt, cache=pieces)
        assert pieces.get_seq_length() == 40
        assert torch.equal(twin.generate(prompt, cache=CompressedCache(twin, chosen), **settings), expected)
        del pieces
        gc.collect()
        assert twin.config._attn_implementation == "sdpa"
        assert not any(module._forward_pre_hooks for module in twin.modules())
    assert model.config._attn_implementation == "evolkv_sdpa"
    assert torch.equal(model.generate(prompt, cache=cache, **settings), expected)


@pytest.mark.slow
def test_a_pickled_model_works_where_no_cache_ever_lived(tmp_path):
    model = tiny_model()
    cache = CompressedCache(model, profile(model, 8))
    torch.save(model, tmp_path / "model.pt")
    model.save_pretrained(tmp_path / "folder")
    assert cache.get_seq_length() == 0
    assert "evolkv" not in (tmp_path / "folder" / "config.json").read_text()
    code = "import sys, torch; torch.load(sys.argv[1], weights_only=False)(torch.tensor([[5, 6]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.pt"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_cache_that_the_block_has_made_can_be_gone_on_from_and_released_after_it():
    model = tiny_model()
    with compress(model, profile(model, 8)):
        output = model(tokens(1, 40))
    assert model(tokens(1, 1), cache=output.cache).cache.get_seq_length() == 41
    output.cache.release()
    assert model.config._attn_implementation == "sdpa"
    assert not model.model._forward_pre_hooks


def test_two_models_around_one_decoder_share_its_hooks():
    model = tiny_model()
    first, second = (CompressedCache(each, profile(each, 8)) for each in (model, model.model))
    assert len(model.model._forward_pre_hooks) == 1
    first.release()
    assert model.model(tokens(1, 40), cache=second).last_hidden_state.shape[1] == 40
    second.release()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("write", [pickle.dumps, lambda cache: torch.save(cache, io.BytesIO())])
def test_a_cache_is_saved_rather_than_pickled(write):
    model = tiny_model()
    with pytest.raises(UsageError, match=r"cannot be pickled; write it with cache.save\(path\)"):
        write(CompressedCache(model, profile(model, 8)))


def test_a_cache_is_true_whatever_it_holds():
    model = tiny_model()
    cache = CompressedCache(model, profile(model, 8))
    assert cache
    model(tokens(1, 40), cache=cache)
    assert cache


def test_attention_chosen_while_a_cache_lives_is_used_and_stays():
    model = tiny_model()
    prompt, token = tokens(1, 40), tokens(1, 1)
    cache, expected = (CompressedCache(model, profile(model, RAGGED)) for _ in range(2))
    for each in (cache, expected):
        model(prompt, cache=each)
    logits = model(token, cache=expected).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(token, cache=cache).logits, logits, atol=1e-5, rtol=0)
    assert cache.get_seq_length() == 41
    assert model.config._attn_implementation == "evolkv_eager"
    model.set_attn_implementation("sdpa")
    another = CompressedCache(model, profile(model, RAGGED))
    assert model.config._attn_implementation == "evolkv_sdpa"
    model.set_attn_implementation("eager")
    for each in (cache, expected, another):
        each.release()
    assert model.config._attn_implementation == "eager"


def test_cache_that_attention_does_not_know_is_noticed_in_the_same_call():
    model = tiny_model()
    chosen = profile(model, 8)
    cache, other = (CompressedCache(model, chosen) for _ in range(2))
    model(tokens(1, 40), cache=cache)
    with pytest.raises(ModelError, match="made for another model"):
        tiny_model()(tokens(1, 40), cache=other)
    other.release()
    cache.release()
    with pytest.raises(ModelError, match="was released"):
        model(tokens(1, 1), cache=cache)


FAILING = pytest.mark.parametrize(
    ("family", "settings", "at"),
    [
        ("llama", {}, 0),
        ("llama", {}, 2),
        ("gemma3", {"evict": "again"}, 1),
        ("llama", {"prefill_chunk": 16}, 2),
        # Its first layer has a state, and no keys and values.
        ("bamba", {}, 3),
        ("qwen3_next", {}, 1),
    ],
)


@FAILING
@pytest.mark.parametrize("holds_a_prompt", [False, True])
def test_a_call_that_failed_half_way_is_not_gone_on_from(tmp_path, family, settings, at, holds_a_prompt):
    model = tiny_model(family)
    prompt, more = tokens(1, 40), tokens(1, 5, seed=1)
    chosen = profile(model, 12)
    expected = model(prompt, cache=CompressedCache(model, chosen, **settings)).logits
    cache = CompressedCache(model, chosen, **settings)
    if holds_a_prompt:
        model(prompt, cache=cache)

    layer = model.model.layers[at]
    with failing(layer.mlp if hasattr(layer, "mlp") else layer.feed_forward):
        model(more if holds_a_prompt else prompt, cache=cache)
    for go_on in (lambda: model(more, cache=cache), cache.copy, lambda: cache.save(tmp_path / "cache")):
        with pytest.raises(UsageError, match="failed half-way"):
            go_on()
    cache.reset()
    assert torch.equal(model(prompt, cache=cache).logits, expected)


def test_a_call_that_failed_between_two_chunks_is_not_gone_on_from():
    model = tiny_model()
    cache = CompressedCache(model, profile(model, 12), prefill_chunk=16)
    with failing(model.model.layers[0], call=2):
        model(tokens(1, 40), cache=cache)
    with pytest.raises(UsageError, match="failed half-way"):
        model(tokens(1, 40), cache=cache)


def test_only_caches_right_after_their_prompts_are_merged():
    model = tiny_model()
    read, asked, failed = (CompressedCache.prefill(model, SNAPKV, tokens(1, 20), budget=9) for _ in range(3))
    model(tokens(1, 1), cache=asked)
    with failing(model.model.layers[1]):
        model(tokens(1, 1), cache=failed)
    for caches in ([], [read, asked], [read, CompressedCache(model, SNAPKV, 9)]):
        with pytest.raises(UsageError, match="right after their prompts"):
            CompressedCache.merge(model, caches)
    with pytest.raises(UsageError, match="failed half-way"):
        CompressedCache.merge(model, [read, failed])


def test_a_call_that_was_refused_before_any_layer_leaves_the_cache_as_it_was():
    model = tiny_model()
    cache, expected = (CompressedCache(model, profile(model, 12)) for _ in range(2))
    for each in (cache, expected):
        model(tokens(1, 40), cache=each)
    with pytest.raises(UsageError, match="holds 1 sequences"):
        model(tokens(2, 1), cache=cache)
    assert torch.equal(model(tokens(1, 1), cache=cache).logits, model(tokens(1, 1), cache=expected).logits)


@pytest.mark.parametrize("method", ["snapkv", "pyramidinfer", "adakv+snapkv"])
@pytest.mark.parametrize("budget", [40, "20%"])
def test_cache_does_not_keep_its_model_alive(method, budget):
    model = tiny_model()
    reference = weakref.ref(model)
    cache = CompressedCache(model, method, budget)
    del model
    gc.collect()
    assert reference() is None
    cache.release()


def test_inner_block_counts():
    model = tiny_model()
    with compress(model, profile(model, 20)):
        with compress(model, profile(model, 8)):
            inner = model(tokens(1, 40)).cache.kv_bytes
        outer = model(tokens(1, 40)).cache.kv_bytes
    assert (inner, outer) == (8 * 8 * HEAD_DIM * 8, 20 * 8 * HEAD_DIM * 8)


def test_plain_cache_and_no_cache_work_as_before_inside_the_block():
    model = tiny_model()
    expected, plain = run(model, tokens(1, 40), cache=DynamicCache(config=model.config))
    with compress(model, profile(model, 8)):
        no_cache = model(tokens(1, 40), use_cache=False)
        more = model(tokens(1, 1), cache=plain)
    assert no_cache.cache is None
    torch.testing.assert_close(no_cache.logits[:, -1], expected[:, 0])
    assert type(more.cache) is DynamicCache


def test_arguments_by_position_are_those_by_name():
    model = tiny_model()
    prompt, mask = tokens(1, 40), torch.ones(1, 40, dtype=torch.long)
    with compress(model, profile(model, 8)):
        expected = model(prompt, attention_mask=mask)
        found = model(prompt, mask, None, None)
        own = CompressedCache(model, profile(model, 20))
        assert model(prompt, mask, None, own).cache is own
    assert type(found.cache) is CompressedCache
    assert found.cache.kv_bytes == expected.cache.kv_bytes < own.kv_bytes
    assert torch.equal(found.logits, expected.logits)


def test_static_cache_is_refused_clearly():
    model = tiny_model()
    with compress(model, profile(model, 8)), pytest.raises(UsageError, match="StaticCache"):
        model.generate(tokens(1, 40), max_new_tokens=2, cache_implementation="static")


def test_profile_of_another_model_is_refused():
    other = tiny_model("llama", seed=1)
    chosen = profile(other, 8)
    model = tiny_model("llama", seed=0)
    with pytest.raises(ProfileError, match="fingerprint"):
        CompressedCache(model, chosen)
    with pytest.raises(ProfileError, match="fingerprint"), compress(model, chosen):
        pass
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.model
def test_smollm2_with_covering_budget_gives_the_same_logits(smollm2):
    model, tokenizer = smollm2
    prompt = tokenizer("The lighthouse keeper counted the ships. " * 20, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected, _ = run(model, prompt)
        with compress(model, profile(model, 2000)):
            logits, _ = run(model, prompt)
    assert float((logits - expected).abs().max()) <= 1e-4


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("budget", [2000, 60])
def test_smollm2_padded_batch_equals_single_prompts(smollm2, budget):
    model, tokenizer = smollm2
    rows = [tokenizer("The quiet harbour woke slowly. " * n, return_tensors="pt").input_ids[0] for n in (30, 22, 12)]
    width = max(map(len, rows))
    batch = torch.zeros(3, width, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for i, row in enumerate(rows):
        batch[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    with torch.inference_mode():
        if budget == 2000:
            expected, _ = run(model, batch, mask)
        with compress(model, profile(model, budget)):
            logits, _ = run(model, batch, mask)
            if budget != 2000:
                expected = torch.cat([run(model, row[None])[0] for row in rows])
    assert float((logits - expected).abs().max()) <= 1e-4


@pytest.mark.gemma
def test_gemma3_with_covering_budget_gives_the_same_logits_beyond_its_window(gemma3):
    model, tokenizer = gemma3
    prompt = tokenizer("The lighthouse keeper counted the ships. " * 80, return_tensors="pt").input_ids
    assert prompt.shape[1] > 512
    with torch.inference_mode():
        expected, _ = run(model, prompt)
        with compress(model, profile(model, 2000)):
            logits, cache = run(model, prompt)
    assert float((logits - expected).abs().max()) <= 1e-3
    held = [max(group.keys.shape[1] for group in layer.groups) for layer in cache.layers]
    assert held == [512 if layer.sliding_window else prompt.shape[1] + 7 for layer in cache.layers]


@pytest.mark.parametrize("name", ["snapkv:window=4", "pyramidinfer", "adakv+snapkv:window=4"])
def test_a_prepared_mask_for_all_sequences_says_which_tokens_of_each_are_real(name):
    model, ids = tiny_model("llama"), tokens(2, 40)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    mask[:, :5] = False
    prepared = torch.zeros(1, 1, 40, 40).masked_fill(~mask, torch.finfo(torch.float32).min)
    caches = []
    for rows in (ids, ids[:1], ids[1:]):
        caches.append(CompressedCache(model, name, 16))
        with torch.no_grad():
            model(rows, attention_mask=prepared, cache=caches[-1])
    together, *alone = (cache.positions for cache in caches)
    for layer, head, row in product(range(LAYERS), range(KV_HEADS), range(2)):
        assert torch.equal(together[layer][head][row], alone[row][layer][head])


@pytest.mark.parametrize("settings", [{}, {"evict": "again"}])
def test_a_prepared_mask_for_all_sequences_hides_tokens_after_the_prompt(settings):
    model, ids = tiny_model("llama"), tokens(2, 24)
    places = torch.arange(24).expand(2, -1)
    logits = []
    for shape in ((1, 1), (2, 1)):
        cache = CompressedCache(model, "snapkv:window=4", 12, **settings)
        with torch.no_grad():
            for start, stop in ((0, 18), (18, 22), (22, 24)):
                # Of what comes before the last cut all is held that can be seen.
                seen = cache.kv_layers[0].appended if start else 0
                mask = torch.ones(stop - start, seen + stop - start, dtype=torch.bool).tril(seen)
                mask[:, seen] = False
                prepared = torch.zeros(*shape, *mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
                output = model(
                    ids[:, start:stop], attention_mask=prepared, position_ids=places[:, start:stop], cache=cache
                )
        logits.append(output.logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
def test_a_mask_of_any_type_says_which_tokens_are_real(dtype):
    # Above 256 not every whole number is a bfloat16.
    model, ids, mask = tiny_model(), tokens(1, 400), torch.ones(1, 400, dtype=torch.int64)
    mask[:, :5] = 0
    masks = mask.to(dtype), mask
    caches = [CompressedCache.prefill(model, "snapkv:window=4", ids, each, 500) for each in masks]
    keys, expected = ([layer.groups[0].keys for layer in cache.kv_layers] for cache in caches)
    assert all(map(torch.equal, keys, expected))
    asked = caches[0].followed_by(tokens(1, 2), torch.tensor([[0.0, 0.5]]))
    assert torch.equal(asked["attention_mask"][0], torch.tensor([0] * 5 + [1] * 395 + [0, 1]))


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 2, 3]], None, "input_ids is list; expected a tensor"),
        (torch.tensor([1, 2, 3]), None, r"input_ids is a tensor of torch\.int64 and shape \[3\]; expected a"),
        (
            torch.rand(1, 3),
            None,
            r"input_ids is a tensor of torch\.float32 and shape \[1, 3\]; expected a tensor of token",
        ),
        (torch.zeros(1, 0, dtype=torch.long), None, "input_ids is empty"),
        (torch.ones(1, 3, dtype=torch.long), [[1, 1, 1]], "attention_mask is list; expected a tensor of shape"),
        (
            torch.ones(1, 3, dtype=torch.long),
            torch.ones(1, 2),
            r"attention_mask is of shape \[1, 2\]; expected a tensor of shape \[1, 3\] \(that of input_ids\)",
        ),
    ],
)
def test_prefill_wants_a_batch_of_prompts(ids, mask, message):
    model = tiny_model()
    with pytest.raises(UsageError, match=message):
        CompressedCache.prefill(model, "keydiff", ids, mask, budget=8)


@pytest.mark.parametrize("token", [-1, 128])
def test_prefill_wants_tokens_that_the_model_knows(token):
    with pytest.raises(ModelError, match=f"token {token}, but the model has embeddings for 128 tokens"):
        CompressedCache.prefill(tiny_model(), "keydiff", torch.tensor([[5, token, 7]]), budget=8)
