"""Compressed caches that outlive a call: saved and loaded, copied, asked later."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evolkv
from evolkv import BudgetProfile, CompressedCache
from evolkv.errors import CacheFileError, EvolKVError, ProfileError, UsageError
from tiny import LAYERS, add_adapters, padded, tiny_model, tokens

SNAPKV = {"name": "snapkv", "window": 4}
RAGGED = [[7, 12], [9, 9], [5, 30], [16, 4]]
BUDGETS = pytest.mark.parametrize("budgets", [[9] * LAYERS, RAGGED, [400] * LAYERS], ids=["dense", "ragged", "full"])
FAMILIES = pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
GREEDY = {
    "do_sample": False,
    "eos_token_id": None,
    "max_new_tokens": 12,
    "return_dict_in_generate": True,
    "output_logits": True,
}
QUESTION, OTHER = tokens(1, 6, seed=9), tokens(1, 9, seed=10)


def prefilled(model, budgets, lengths=(40,)):
    _, batch, mask = padded(lengths, "left")
    profile = BudgetProfile.from_budgets(model, budgets, SNAPKV)
    return CompressedCache.prefill(model, profile, batch, mask)


def answer(model, cache, question=QUESTION):
    """Token ids and logits of the answer."""
    output = model.generate(**cache.followed_by(question), **GREEDY)
    return output.sequences, torch.stack(output.logits)


def same(left, right):
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@BUDGETS
@FAMILIES
@pytest.mark.parametrize("lengths", [(40,), (40, 33, 15)], ids=["one", "batch"])
def test_a_loaded_cache_answers_bit_for_bit_as_the_saved_one(tmp_path, family, budgets, lengths):
    model = tiny_model(family)
    cache = prefilled(model, budgets, lengths)
    cache.save(tmp_path / "document.cache")
    loaded = CompressedCache.load(tmp_path / "document.cache", model)
    assert loaded.kv_bytes == cache.kv_bytes
    assert torch.equal(loaded.input_ids, cache.input_ids)
    for layer in range(LAYERS):
        for one, other in zip(loaded.positions[layer], cache.positions[layer], strict=True):
            pairs = [(one, other)] if len(lengths) == 1 else zip(one, other, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert same(answer(model, loaded), answer(model, cache))
    assert [path.name for path in tmp_path.iterdir()] == ["document.cache"]


@BUDGETS
@FAMILIES
def test_a_conversation_is_saved_after_some_turns(tmp_path, family, budgets):
    model = tiny_model(family)
    cache = prefilled(model, budgets, (40, 33))
    cache.input_ids, _ = answer(model, cache)
    cache.save(tmp_path / "talk.cache")
    loaded = CompressedCache.load(tmp_path / "talk.cache", model)
    assert loaded.get_seq_length() == 40 + 6 + 11
    assert same(answer(model, loaded, OTHER), answer(model, cache, OTHER))


def test_an_adaptive_method_and_half_precision_survive(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    cache = CompressedCache.prefill(model, "cake+adakv+snapkv:window=4", tokens(2, 40), budget=10)
    cache.save(tmp_path / "a.cache")
    loaded = CompressedCache.load(tmp_path / "a.cache", model)
    assert loaded.layers[0].groups[0].keys.dtype == torch.bfloat16
    assert same(answer(model, loaded), answer(model, cache))


def test_text_that_nobody_said_is_not_made_up(tmp_path):
    model = tiny_model()
    cache = prefilled(model, RAGGED)
    cache.input_ids = None
    cache.save(tmp_path / "a.cache")
    loaded = CompressedCache.load(tmp_path / "a.cache", model)
    with pytest.raises(UsageError, match="knows the ids of 0"):
        loaded.followed_by(QUESTION)


@pytest.mark.parametrize("method", ["snapkv:window=4", "adakv+snapkv:window=4"])
def test_budgets_that_were_laid_out_for_a_text_serve_no_other(method, tmp_path):
    model = tiny_model()
    cache = CompressedCache.prefill(model, method, tokens(1, 40), budget="50%")
    cache.save(tmp_path / "a.cache")
    loaded = CompressedCache.load(tmp_path / "a.cache", model)
    with pytest.raises(UsageError, match="make a new CompressedCache"):
        loaded.reset()
    assert loaded.get_seq_length() == 40
    cache.reset()


def test_what_reading_a_prompt_cost_is_known_of_copies_files_and_merged_caches(tmp_path):
    model = tiny_model()
    caches = [
        CompressedCache.prefill(model, "kvzip:words=false", tokens(1, 40), budget=8),
        CompressedCache.prefill(model, "kvzip:words=false,chunk=20,overlap=5", tokens(1, 60), budget=8),
    ]
    factors = [cache.prefill_factor for cache in caches]
    assert factors == pytest.approx([2, 2 + 10 / 60])
    assert caches[1].copy().prefill_factor == factors[1]
    caches[1].save(tmp_path / "a.cache")
    assert CompressedCache.load(tmp_path / "a.cache", model).prefill_factor == factors[1]
    assert CompressedCache.merge(model, caches).prefill_factor == pytest.approx(2.1)


def test_a_loaded_cache_serves_another_prompt_after_reset(tmp_path):
    model = tiny_model()
    prefilled(model, RAGGED).save(tmp_path / "a.cache")
    loaded = CompressedCache.load(tmp_path / "a.cache", model)
    loaded.reset()
    model(tokens(1, 50, seed=4), cache=loaded)
    fresh = CompressedCache(model, BudgetProfile.from_budgets(model, RAGGED, SNAPKV))
    model(tokens(1, 50, seed=4), cache=fresh)
    assert str(loaded.positions) == str(fresh.positions)


def test_a_file_holds_nothing_but_what_the_cache_does(tmp_path):
    model = tiny_model()
    cache = prefilled(model, RAGGED)
    # Rows with room for more are stored without it.
    with_room = CompressedCache.merge(model, [cache.copy(), cache.copy()], room=500)
    with_room.save(tmp_path / "a.cache")
    assert (tmp_path / "a.cache").stat().st_size < 2 * cache.kv_bytes + 20_000


def test_only_known_tensors_and_json_are_in_a_file(tmp_path):
    model = tiny_model()
    prefilled(model, RAGGED).save(tmp_path / "a.cache")
    with safe_open(tmp_path / "a.cache", framework="pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert metadata["format"] == "evolkv.cache/1"
    said = json.loads(metadata["cache"])
    assert said["model"]["dtype"] == "float32"
    assert (said["prompt_lengths"], said["appended"], said["selector"]["name"]) == ([40], 0, "snapkv")
    parts = ("rows", "positions", "keys", "values")
    groups = [(i, j) for i, layer in enumerate(said["layers"]) for j in range(layer["groups"])]
    assert names == {"input_ids", *(f"{i}.{j}.{part}" for i, j in groups for part in parts)}


# Files that cannot be used.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "a.cache"
    model = tiny_model()
    prefilled(model, RAGGED).save(path)
    return path, model


def edited(path, target, change):
    """A copy of a cache file, with its tensors, metadata or description changed, and the checksums that fit."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, said = load_file(path), json.loads(metadata["cache"])
    change(tensors, metadata, said)
    said["crc32"] = {name: zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy()) for name, tensor in tensors.items()}
    save_file(tensors, target, {"cache": json.dumps(said), **{k: v for k, v in metadata.items() if k != "cache"}})
    return target


def refused(path, model, *words):
    with pytest.raises(CacheFileError) as caught:
        CompressedCache.load(path, model)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message


def test_missing_foreign_and_cut_files_are_refused(saved, tmp_path):
    path, model = saved
    whole = path.read_bytes()
    refused(tmp_path / "nowhere.cache", model, "no such file")
    for name, content in {
        "text": b"hello",
        "empty": b"",
        "cut": whole[:-100],
        "head": whole[:50],
        "long header": b"\xff" * 8 + whole[8:],
        "pickle": b"\x80\x04K*.",
    }.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, model, "no cache, or cut off")
    save_file({"weights": torch.zeros(3)}, tmp_path / "weights.safetensors")
    refused(tmp_path / "weights.safetensors", model, "the format is ''")


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_changed_bit_is_noticed(saved, tmp_path, bit):
    path, model = saved
    content = bytearray(path.read_bytes())
    content[-40] ^= 1 << bit
    (tmp_path / "a").write_bytes(content)
    refused(tmp_path / "a", model, "does not hold what was written")


def test_a_file_without_checksums_is_read(saved, tmp_path):
    path, model = saved
    early = edited(path, tmp_path / "a", lambda tensors, metadata, said: None)
    loaded, expected = CompressedCache.load(early, model), CompressedCache.load(path, model)
    for layer, other in zip(loaded.kv_layers, expected.kv_layers, strict=True):
        assert all(torch.equal(a.keys, b.keys) for a, b in zip(layer.groups, other.groups, strict=True))


def test_another_version_is_refused(saved, tmp_path):
    path, model = saved
    later = edited(path, tmp_path / "a", lambda tensors, metadata, said: metadata.update(format="evolkv.cache/2"))
    refused(later, model, "'evolkv.cache/2'", "this version reads 'evolkv.cache/1'")


def test_another_model_is_refused(saved):
    path, _ = saved
    refused(path, tiny_model(seed=1), "made with llama", "but the model is llama")
    refused(path, tiny_model("qwen2"), "but the model is qwen2")
    refused(path, tiny_model().to(torch.bfloat16), "made in float32", "dtype='float32'")
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    refused(path, tiny_model(rope_parameters=scaled), "made with rotary")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors, metadata, said: tensors.pop("0.0.keys"), "0.0.keys"),
        (
            lambda tensors, metadata, said: tensors.update({"0.0.keys": tensors["0.0.keys"][:, :2].contiguous()}),
            "wrong shape",
        ),
        (
            lambda tensors, metadata, said: tensors.update({"0.0.keys": tensors["0.0.keys"][..., :4].contiguous()}),
            "16 channels",
        ),
        (
            lambda tensors, metadata, said: tensors.update({"0.0.values": tensors["0.0.values"][..., :4].contiguous()}),
            "0.0.values do not have the model's 16 channels",
        ),
        (lambda tensors, metadata, said: said["layers"][0].update(budgets=[2**63, 9]), "budgets"),
        (lambda tensors, metadata, said: said["layers"][0].update(budgets=[-1, 9]), "budgets"),
        (lambda tensors, metadata, said: said.update(prompt_width=2**70), "prompt_width"),
        (lambda tensors, metadata, said: said.update(appended=2**70), "appended"),
        (lambda tensors, metadata, said: said["selector"].update(window=2**31), "selector: ['window'] is out of range"),
        (lambda tensors, metadata, said: tensors.update({"0.0.keys": tensors["0.0.keys"].half()}), "float16"),
        (lambda tensors, metadata, said: tensors.update({"0.0.rows": tensors["0.0.rows"] + 7}), "not rows of"),
        (lambda tensors, metadata, said: tensors.update({"0.0.rows": 1 - tensors["0.0.rows"]}), "each row once"),
        (lambda tensors, metadata, said: tensors.update({"0.0.positions": tensors["0.0.positions"] + 90}), "positions"),
        (lambda tensors, metadata, said: said.update(appended=3), "positions"),
        (lambda tensors, metadata, said: said.update(prompt_lengths=[50]), "prompt_lengths"),
        (lambda tensors, metadata, said: said.update(prompt_lengths="x"), "prompt_lengths"),
        (lambda tensors, metadata, said: said["layers"].pop(), "number of layers"),
        (lambda tensors, metadata, said: said["layers"][0].update(budgets=[1, 2, 3]), "budgets"),
        (lambda tensors, metadata, said: said["layers"][0].update(budgets=[[1, 2], [3]]), "budgets"),
        (lambda tensors, metadata, said: said.update(selector={"name": "os.system"}), "selector"),
        (lambda tensors, metadata, said: tensors.update(input_ids=torch.zeros(2, 40, dtype=torch.int64)), "input_ids"),
    ],
)
def test_damaged_files_are_refused(saved, tmp_path, change, complaint):
    path, model = saved
    refused(edited(path, tmp_path / "a", change), model, complaint)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_ids_of_any_whole_numbers_are_read_and_saved(tmp_path, dtype):
    model = tiny_model()
    cache = CompressedCache.prefill(model, BudgetProfile.uniform(model, 9, SNAPKV), tokens(1, 40).to(dtype))
    cache.input_ids = tokens(1, 41).to(dtype)
    cache.save(tmp_path / "a.cache")
    assert torch.equal(CompressedCache.load(tmp_path / "a.cache", model).input_ids, tokens(1, 41))


def test_what_cannot_be_saved_is_refused(tmp_path):
    model = tiny_model()
    empty = CompressedCache(model, BudgetProfile.uniform(model, 9, SNAPKV))
    with pytest.raises(UsageError, match="holds nothing yet"):
        empty.save(tmp_path / "a")
    with pytest.raises(UsageError, match="is a folder"):
        prefilled(model, RAGGED).save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(EvolKVError, match="cannot write"):
        prefilled(model, RAGGED).save(tmp_path / "file" / "a")


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk": 16, "evict_every": 50}], ids=["once", "again"])
def test_what_was_loaded_goes_where_its_layer_computes(tmp_path, settings):
    model = tiny_model("gemma3")
    _, batch, mask = padded((40, 33), "left")
    chosen = BudgetProfile.from_budgets(model, RAGGED, {"name": "h2o", "window": 4})
    CompressedCache.prefill(model, chosen, batch, mask, **settings).save(tmp_path / "a.cache")
    loaded = CompressedCache.load(tmp_path / "a.cache", model)
    for layer in loaded.kv_layers:
        layer.real = torch.ones(2, 0, dtype=torch.bool)
        # There is no second device here that computes.
        layer.update(torch.empty(2, 2, 1, 16, device="meta"), torch.empty(2, 2, 1, 16, device="meta"))
        held = [part for group in layer.groups for part in (group.rows, group.keys, group.values, group.positions)]
        held += [layer.real, *getattr(layer, "queries", []), *getattr(layer, "received", [])]
        assert {part.device.type for part in [*held, layer]} == {"meta"}


@pytest.mark.slow
def test_loading_holds_the_entries_once(tmp_path):
    path = tmp_path / "a.cache"
    script = f"""
import torch
from evolkv import CompressedCache
from tiny import tiny_model, tokens

def anonymous():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

model = tiny_model(max_position_embeddings=60000)
cache = CompressedCache.prefill(model, "streaming_llm", tokens(1, 10), budget=9)
for layer in cache.layers:
    for group in layer.groups:
        # As if 25,000 tokens had followed.
        group.append(torch.ones(2, 25000, 16), torch.ones(2, 25000, 16))
    layer.appended = 25000
cache.save({str(path)!r})
size = cache.kv_bytes
del cache, layer, group
CompressedCache.load({str(path)!r}, model)
before = anonymous()
kept = CompressedCache.load({str(path)!r}, model)
print((anonymous() - before) / size)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.3


def _environment():
    folders = [str(Path(__file__).parent), str(Path(evolkv.__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}


# Copies.


@pytest.mark.parametrize("budgets", [[9] * LAYERS, RAGGED], ids=["dense", "ragged"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, *(pytest.param(each, marks=pytest.mark.slow) for each in (CompressedCache.copy, copy.copy))],
)
def test_two_questions_on_one_document_are_answered_as_on_two(family, budgets, how):
    model = tiny_model(family)
    cache = prefilled(model, budgets, (40, 33))
    branch = how(cache)
    asked = answer(model, cache)
    assert same(answer(model, branch, OTHER), answer(model, prefilled(model, budgets, (40, 33)), OTHER))
    assert same(asked, answer(model, prefilled(model, budgets, (40, 33))))


def held(*caches):
    """Bytes of all memory behind some caches' keys and values, shared memory once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for cache in caches
        for layer in cache.layers
        for group in layer.groups
        for tensor in (group.keys, group.values)
    }
    return sum(storages.values())


def test_a_copy_costs_no_memory_until_it_grows():
    model = tiny_model()
    cache = prefilled(model, RAGGED)
    branches = [cache.copy() for _ in range(5)]
    assert held(cache, *branches) == cache.kv_bytes
    answer(model, branches[0])
    assert held(cache, *branches) == cache.kv_bytes + branches[0].kv_bytes


def test_copies_keep_apart_where_room_was_reserved():
    model = tiny_model()
    cache = CompressedCache.merge(model, [prefilled(model, RAGGED)], room=50)
    cache.input_ids = prefilled(model, RAGGED).input_ids
    branch = cache.copy()
    first = answer(model, cache)
    assert same(answer(model, branch, OTHER), answer(model, prefilled(model, RAGGED), OTHER))
    assert same(first, answer(model, prefilled(model, RAGGED)))


def test_copies_keep_apart_when_one_takes_tokens_back():
    model = tiny_model()
    cache = prefilled(model, RAGGED)
    cache.input_ids, _ = answer(model, cache)
    branch, untouched = cache.copy(), cache.copy()
    expected = answer(model, untouched, OTHER)
    branch.crop(-9)
    model(tokens(1, 9, seed=3), cache=branch)
    assert same(answer(model, cache, OTHER), expected)


def test_the_text_so_far_ends_where_tokens_are_taken_back(tmp_path):
    model = tiny_model()
    cache = prefilled(model, RAGGED)
    document = cache.input_ids
    cache.input_ids, _ = answer(model, cache)
    cache.crop(0)
    assert cache.input_ids.shape[1] == cache.get_seq_length() + 1
    cache.crop(40 - cache.get_seq_length())
    assert torch.equal(cache.input_ids, document)
    cache.save(tmp_path / "a.cache")
    assert torch.equal(CompressedCache.load(tmp_path / "a.cache", model).input_ids, document)
    assert same(answer(model, cache, OTHER), answer(model, prefilled(model, RAGGED), OTHER))
    with pytest.raises(UsageError, match=r"crop\(-5\) to take back 5 tokens"):
        cache.crop(5)


def test_a_copy_of_an_adaptive_cache_serves_another_prompt():
    model = tiny_model()
    cache = CompressedCache.prefill(model, "cake+adakv+snapkv:window=4", tokens(1, 40), budget=10)
    twin, positions = cache.copy(), str(cache.positions)
    twin.reset()
    model(tokens(1, 50, seed=4), cache=twin)
    fresh = CompressedCache.prefill(model, "cake+adakv+snapkv:window=4", tokens(1, 50, seed=4), budget=10)
    assert str(twin.positions) == str(fresh.positions)
    assert str(cache.positions) == positions


def test_a_copy_works_when_the_original_is_gone():
    model = tiny_model()
    cache = prefilled(model, RAGGED)
    expected = answer(model, cache.copy())
    branch = copy.deepcopy(cache)
    del cache
    assert same(answer(model, branch), expected)


@pytest.mark.model
def test_a_document_is_read_once_and_asked_later(smollm2, tmp_path):
    model, tokenizer = smollm2
    document = "The harbour has three piers. " * 12 + "The keeper's name is Ulla. " + "Ships come at noon. " * 12
    ids = tokenizer(document, return_tensors="pt").input_ids
    profile = BudgetProfile.uniform(model, 64, "keydiff")
    question = tokenizer("\nThe name of the keeper is", return_tensors="pt").input_ids
    CompressedCache.prefill(model, profile, ids).save(tmp_path / "document.cache")
    cache = CompressedCache.load(tmp_path / "document.cache", model)
    settings = {"max_new_tokens": 6, "do_sample": False}
    told = model.generate(**cache.followed_by(question), **settings)
    whole = CompressedCache(model, profile)
    model(ids, cache=whole)
    expected = model.generate(torch.cat([ids, question], 1), cache=whole, **settings)
    assert torch.equal(told, expected)


def test_a_cache_read_with_one_adapter_is_not_gone_on_with_another(tmp_path):
    model = tiny_model()
    switch = add_adapters(model, "a", "b")
    cache = CompressedCache.prefill(model, "knorm", tokens(1, 40), budget=9)
    copied, merged = cache.copy(), CompressedCache.merge(model, [cache.copy()])
    merged.input_ids = cache.input_ids
    cache.save(tmp_path / "a.cache")
    profile = BudgetProfile.uniform(model, 9, selector="knorm")
    uses = (
        lambda: cache.followed_by(QUESTION),
        lambda: merged.followed_by(QUESTION),
        lambda: copied.save(tmp_path / "b.cache"),
    )
    for name in ("b", None):
        switch(name)
        for use in uses:
            with pytest.raises(UsageError, match="with other adapters than are active now"):
                use()
        with pytest.raises(UsageError, match="with other adapters than are active now"):
            model.generate(torch.cat([tokens(1, 40), QUESTION], dim=1), cache=cache, **GREEDY)
        with pytest.raises(CacheFileError, match="made with"):
            CompressedCache.load(tmp_path / "a.cache", model)
        with pytest.raises(ProfileError, match="made for"):
            CompressedCache(model, profile)
    switch("a")
    loaded = CompressedCache.load(tmp_path / "a.cache", model)
    again = loaded.copy()
    assert same(answer(model, copied), answer(model, loaded))
    switch("b")
    with pytest.raises(UsageError, match="with other adapters than are active now"):
        again.followed_by(QUESTION)
