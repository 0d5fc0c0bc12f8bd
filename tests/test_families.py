"""Models and attention implementations beyond the common path: what is refused and why, hybrids, backends, dtypes."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import evolkv
from evolkv import BudgetProfile, CompressedCache, compress
from evolkv.cache.masks import boolean_mask, padding_of
from evolkv.errors import ModelError, ProfileError
from evolkv.evaluation.scoring import encode_examples
from evolkv.models import describe_model, model_facts
from evolkv.models.facts import cache_shape
from evolkv.tasks import Example
from test_compressed_cache import RAGGED, profile, run
from tiny import HEAD_DIM, HYBRIDS, KV_HEADS, LAYERS, VOCABULARY, WINDOW, padded, tiny_model, tokens

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
_LATENT |= {"num_key_value_heads": 4, "first_k_dense_replace": 2, "n_routed_experts": 4}
_MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
_BYPASS = "does not go through transformers' attention interface"
#: Class of the model and of its config, settings of its own, and the reason that the message has to give.
_REFUSED = {
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", _LATENT, "latent attention"),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _LATENT, "latent attention"),
    "llama4_text": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 16},
        "chunked attention",
    ),
    "gemma3n_text": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "intermediate_size": [64] * 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "activation_sparsity_pattern": [0.0] * 4,
            "laurel_rank": 8,
        },
        "layers that share one KV cache",
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        "is an encoder-decoder",
    ),
    "Mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 8},
        "has a key-value cache; there is nothing",
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {"head_dim": None},
        "does not go through transformers' attention interface",
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"n_head": 4},
        "does not go through transformers' attention interface",
    ),
    "FalconH1": ("FalconH1ForCausalLM", "FalconH1Config", _MAMBA, "attention and a recurrent state at once"),
    # Its full layers have larger heads than its sliding ones.
    "gemma4_text": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {"num_hidden_layers": 6, "vocab_size_per_layer_input": VOCABULARY, "num_global_key_value_heads": 2},
        "different numbers of channels",
    ),
    "minimax": ("MiniMaxForCausalLM", "MiniMaxConfig", {"num_local_experts": 2}, "a cache class of its own"),
    "diffllama": ("DiffLlamaForCausalLM", "DiffLlamaConfig", {}, "attends twice"),
    "doge": ("DogeForCausalLM", "DogeConfig", {}, "masks tokens by the values"),
    "jetmoe": (
        "JetMoeForCausalLM",
        "JetMoeConfig",
        {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        "repeats its keys and values for each expert",
    ),
    "mimo_v2_flash": (
        "MiMoV2FlashForCausalLM",
        "MiMoV2FlashConfig",
        {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "v_head_dim": 16},
        "different numbers of KV heads",
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {"lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
        "does not give its cache back",
    ),
    "mllama_text_model": (
        "MllamaForCausalLM",
        "MllamaTextConfig",
        {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "cross-attention",
    ),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_attention_that_cannot_be_compressed_is_refused_by_name_with_the_reason(name):
    model_class, config_class, own, reason = _REFUSED[name]
    sizes = {key: value for key, value in {**_SIZES, **own}.items() if value is not None}
    config = getattr(transformers, config_class)(**sizes)
    model = getattr(transformers, model_class)(config).eval()
    for use in (describe_model, lambda model: CompressedCache(model, "snapkv:window=4", 8)):
        with pytest.raises(ModelError, match=reason) as caught:
            use(model)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_learned_tokens_before_a_text_are_not_left_out():
    # As a model of PEFT says that it was tuned so.
    model = tiny_model()
    model.active_peft_config = SimpleNamespace(is_prompt_learning=True)
    for read in (
        lambda: CompressedCache.prefill(model, "snapkv:window=4", tokens(1, 20), budget=8),
        lambda: encode_examples(None, model, [Example("e", "a prompt", ("an answer",))]),
    ):
        with pytest.raises(ModelError, match="reads learned tokens before each text"):
            read()


def test_keys_that_never_reach_attention_are_noticed_at_the_next_token():
    cache = CompressedCache(tiny_model(), "snapkv:window=4", 8)
    keys = torch.randn(1, KV_HEADS, 5, HEAD_DIM)
    cache.update(keys, keys, 0)
    with pytest.raises(ModelError, match="bypasses transformers' attention interface"):
        cache.update(keys, keys, 0)


def test_keys_of_the_only_layer_that_never_reach_attention_are_noticed_in_the_same_call():
    model = tiny_model(num_hidden_layers=1)
    cache = CompressedCache(model, "snapkv:window=4", 8)
    layer = model.model.layers[0].self_attn
    layer.config = copy.copy(layer.config)
    layer.config._attn_implementation_internal = "sdpa"
    with pytest.raises(ModelError, match="bypasses transformers' attention interface"):
        model(tokens(1, 20), cache=cache)


def test_values_that_reach_attention_changed_or_twice_are_noticed_at_once():
    model = tiny_model()
    cache = CompressedCache(model, "snapkv:window=4", 8)
    attend, module = ALL_ATTENTION_FUNCTIONS["evolkv_sdpa"], model.model.layers[0].self_attn
    keys = torch.randn(1, KV_HEADS, 5, HEAD_DIM)
    keys, values = cache.update(keys, keys, 0)
    with pytest.raises(ModelError, match="changes its values"):
        attend(module, keys, keys, values * 2, None)
    attend(module, keys, keys, values, None)
    with pytest.raises(ModelError, match="more than once"):
        attend(module, keys, keys, values, None)


def test_heads_that_the_config_does_not_know_of_are_noticed_at_once():
    cache = CompressedCache(tiny_model(), "snapkv:window=4", 8)
    keys = torch.randn(1, 2 * KV_HEADS, 5, HEAD_DIM)
    with pytest.raises(ModelError, match=f"{2 * KV_HEADS} KV heads where its model's config says {KV_HEADS}"):
        cache.update(keys, keys, 0)


def test_a_mask_given_by_name_is_the_mask():
    model = transformers.AfmoeForCausalLM(
        transformers.AfmoeConfig(**_SIZES, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32)
    )
    _, prompt, mask = padded([40, 25], "left")
    with torch.no_grad():
        model.eval()
        expected, _ = run(model, prompt, mask)
        found, _ = run(model, prompt, mask, CompressedCache(model, BudgetProfile.uniform(model, 40)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_biases_by_position_are_refused_where_they_would_be_left_out():
    model = tiny_model()
    cache = CompressedCache(model, profile(model, RAGGED))
    model(tokens(1, 40), cache=cache)
    with pytest.raises(ModelError, match="adds 'position_bias' to its attention"):
        model(tokens(1, 1), position_bias=torch.zeros(1, 8, 1, 1), cache=cache)


# Hybrids.


@pytest.mark.parametrize("family", HYBRIDS)
def test_budgets_of_a_hybrid_are_for_its_layers_with_keys_and_values(family):
    model = tiny_model(family)
    facts = model_facts(model)
    kept, others = facts.kv_layers, facts.other_layers
    total = model.config.num_hidden_layers
    assert [layer.index for layer in kept] == [i for i in range(total) if i not in {other.index for other in others}]
    assert describe_model(model).num_layers == len(kept) == LAYERS < total
    assert cache_shape(model.config)[1:] == (LAYERS, facts.num_kv_heads)
    cache = CompressedCache(model, profile(model, RAGGED))
    model(tokens(1, 40), cache=cache)
    assert [[len(positions) for positions in layer] for layer in cache.positions] == RAGGED
    assert cache.kv_bytes == np.sum(RAGGED) * HEAD_DIM * 2 * 4


@pytest.mark.parametrize("family", HYBRIDS)
def test_other_layers_of_a_hybrid_keep_what_the_models_own_cache_keeps(family):
    model = tiny_model(family)
    _, batch, mask = padded([40, 33], "left")
    plain = DynamicCache(config=model.config)
    cache = CompressedCache(model, profile(model, 400))
    for given in (plain, cache):
        model(batch, attention_mask=mask, cache=given)
        for step in range(1, 4):
            seen = torch.cat([mask, mask.new_ones(2, step)], dim=1)
            model(tokens(2, 1, seed=step), attention_mask=seen, cache=given)
    for place in model_facts(model).other_layers:
        own, ours = plain.layers[place.index], cache.layers[place.index]
        for name in ("conv_states", "recurrent_states"):
            for at, state in getattr(own, name).items():
                if state is None:
                    assert getattr(ours, name)[at] is None
                else:
                    torch.testing.assert_close(getattr(ours, name)[at], state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen3_next", "bamba"])
def test_cache_of_a_hybrid_serves_another_batch_after_reset(family):
    model = tiny_model(family)
    cache = CompressedCache(model, profile(model, RAGGED))
    expected, _ = run(model, tokens(3, 40, seed=1), cache=cache)
    cache.reset()
    run(model, tokens(1, 30), cache=cache)
    cache.reset()
    again, _ = run(model, tokens(3, 40, seed=1), cache=cache)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("family", ["gpt_oss", *HYBRIDS])
def test_beam_search_reorders_every_layer(family):
    model = tiny_model(family)
    settings = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tokens(2, 30), **settings)
    with compress(model, profile(model, 400)):
        assert torch.equal(model.generate(tokens(2, 30), **settings), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bamba", "gpt_oss"])
def test_search_and_evaluation_run_on_hybrids_and_on_attention_sinks(tokenizer, family):
    model = tiny_model(family, vocab_size=len(tokenizer), pad_token_id=None, max_position_embeddings=1024)
    task, budget = "niah:context=120", 40
    results = [
        evolkv.search(
            model, tokenizer, task=task, budget=budget, train=2, val=2, max_evals=4, metric="logprob", engine=engine,
            selector={"name": "snapkv", "window": 4}, granularity="head", seed=1, start="uniform",
        )
        for engine in ("replay", "naive")
    ]  # fmt: skip
    replayed, naive = ([entry["score"] for entry in result.history] for result in results)
    np.testing.assert_allclose(replayed, naive, rtol=1e-3)
    assert results[0].profile.budgets.shape == (LAYERS, KV_HEADS)
    methods = ["full", "snapkv:window=4", "cake+adakv+snapkv:window=4"]
    rows = evolkv.evaluate(model, tokenizer, task=task, methods=methods, budgets=[budget], samples=2)
    assert [row["mean_budget"] for row in rows[1:]] == [budget, budget]


@pytest.mark.model
def test_a_search_gives_layers_whose_window_is_below_the_selectors_their_window(smollm2, tmp_path):
    _, tokenizer = smollm2
    model = tiny_model(
        "gemma3", vocab_size=len(tokenizer), pad_token_id=None, layer_types=None, sliding_window_pattern=2
    )
    settings = {"task": "niah:context=120", "budget": 40, "train": 2, "val": 2, "max_evals": 8, "population": 4}
    settings["selector"] = "snapkv"
    found = evolkv.search(model, tokenizer, **settings, granularity="head", storage=str(tmp_path / "study.db"))
    held = np.array([entry["budgets"] for entry in found.history])
    assert (held[:, ::2] == WINDOW).all()
    assert (held.sum(axis=(1, 2)) == 40 * LAYERS * KV_HEADS).all()
    again = evolkv.search(model, tokenizer, **settings, granularity="head", storage=str(tmp_path / "study.db"))
    assert again.history == found.history


# Attention implementations.


@pytest.fixture
def flex_eagerly():
    """Flex attention as it is, without minutes of compilation."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.filterwarnings("ignore:.*flex_attention.*:UserWarning")
@pytest.mark.parametrize(
    ("family", "budgets"),
    [
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("llama", 400), ("llama", RAGGED))),
        ("gemma2", 9),
        ("gemma3", RAGGED),
    ],
    ids=str,
)
def test_flex_attention_gives_what_eager_attention_gives(flex_eagerly, family, budgets):
    for lengths, side in [([40], "left"), ([40, 33, 15], "right")]:
        _, batch, mask = padded(lengths, side)
        logits = []
        for attention in ("eager", "flex_attention"):
            model = tiny_model(family, attention)
            with compress(model, profile(model, budgets)):
                logits.append(run(model, batch, mask)[0])
        torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("queries", [3, 1])
def test_masks_of_every_implementation_mean_the_same(queries):
    # A prompt of 8, then 2 + `queries` tokens, of which the second row's first is padding.
    masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    seen = torch.ones(2, 10 + queries, dtype=torch.bool)
    seen[1, 8] = False
    sizes = {"batch_size": 2, "q_length": queries, "kv_length": 2 + queries, "q_offset": 10, "kv_offset": 8}
    expected = (torch.arange(2 + queries) <= torch.arange(2, 2 + queries)[:, None]) & seen[:, None, None, 8:]
    torch.compiler.set_stance("force_eager")
    for name in ("eager", "sdpa", "flex_attention", "flash_attention_2"):
        mask = masks[name](**sizes, attention_mask=seen, dtype=torch.float32)
        visible = boolean_mask(mask, 2, queries, 2 + queries, torch.device("cpu"))
        assert torch.equal(visible.expand(2, 1, queries, 2 + queries), expected), name
    torch.compiler.set_stance("default")


def test_padding_is_found_in_masks_that_the_caller_prepared():
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    booleans = causal & padding[:, None, None].bool()
    added = torch.where(booleans, 0.0, torch.finfo(torch.float32).min)
    block = torch.nn.attention.flex_attention.create_block_mask(
        lambda b, h, q, k: (k <= q) & padding[b, k].bool(), 2, None, 5, 5, device="cpu"
    )
    for mask in (padding, padding.bool(), booleans, added, block):
        assert torch.equal(padding_of(mask), padding.bool())


def flash(query, key, value, mask, query_length, is_causal, softmax_scale=None, sliding_window=None, softcap=None,
          attn_implementation=None, s_aux=None, **kwargs):  # fmt: skip
    """What flash attention's kernels compute, from what transformers hands them: tokens before heads, 2-D masks."""
    assert attn_implementation == "flash_attention_2"
    assert softcap is None
    assert s_aux is None
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    keys = key.shape[2]
    asking, position = torch.arange(keys - query_length, keys)[:, None], torch.arange(keys)
    visible = (position <= asking) if is_causal else torch.ones(query_length, keys, dtype=torch.bool)
    if sliding_window is not None:
        visible = visible & (position > asking - sliding_window)
    if mask is not None:
        assert mask.ndim == 2
        visible = visible & mask[:, None, None].bool()
    output = F.scaled_dot_product_attention(query, key, value, visible, scale=softmax_scale, enable_gqa=True)
    return output.nan_to_num().transpose(1, 2)


@pytest.mark.parametrize("budgets", [400, 9, RAGGED], ids=["covering", "dense", "ragged"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_flash_attention_is_called_as_it_expects_and_gives_what_sdpa_gives(monkeypatch, family, budgets):
    # The kernels need a GPU; everything around them runs here.
    monkeypatch.setattr("transformers.integrations.flash_attention._flash_attention_forward", flash)
    for lengths in ([40], [40, 33, 15]):
        _, batch, mask = padded(lengths, "left")
        logits = []
        for attention in ("sdpa", "flash_attention_2"):
            model = tiny_model(family)
            model.config._attn_implementation_internal = attention
            with compress(model, profile(model, budgets)):
                logits.append(run(model, batch, mask)[0])
                assert model.config._attn_implementation == f"evolkv_{attention}"
        torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("attention", "words"), [("paged|sdpa", "for continuous batching"), ("no_such_attention", "cannot be compressed")]
)
def test_attention_implementations_that_cannot_be_wrapped_are_refused(attention, words):
    model = tiny_model()
    model.config._attn_implementation_internal = attention
    with pytest.raises(ModelError, match=words):
        CompressedCache(model, profile(model, 9))
    assert model.config._attn_implementation == attention


# Dtypes and places.


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "lfm2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_what_float32_gives_within_its_rounding(family, dtype):
    expected = run(tiny_model(family), tokens(1, 40))[0]
    model = tiny_model(family).to(dtype)
    for budgets in (400, [[200, 300]] * LAYERS):
        with compress(model, profile(model, budgets)):
            logits, cache = run(model, tokens(1, 40))
        assert all(group.keys.dtype == dtype for layer in cache.kv_layers for group in layer.groups)
        torch.testing.assert_close(logits.float(), expected, atol=0.02, rtol=0.05)


def test_offloaded_weights_have_the_same_fingerprint_and_give_the_same_logits(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    chosen = profile(model, RAGGED)
    with compress(model, chosen):
        expected, _ = run(model, tokens(1, 40))
    fingerprint = describe_model(model).fingerprint
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    accelerate.dispatch_model(
        model, {**places, "lm_head": "disk"}, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    assert describe_model(model).fingerprint == fingerprint
    with compress(model, chosen):
        logits, _ = run(model, tokens(1, 40))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_offloaded_embeddings_read_documents_and_load_caches(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    chosen, settings = profile(model, RAGGED), {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}
    CompressedCache.prefill(model, chosen, tokens(1, 40)).save(tmp_path / "a.cache")
    cache = CompressedCache.load(tmp_path / "a.cache", model)
    expected = model.generate(**cache.followed_by(tokens(1, 4)), **settings)
    del cache
    accelerate.cpu_offload(model)
    assert model.device.type == "meta"
    read, loaded = (
        CompressedCache.prefill(model, chosen, tokens(1, 40)),
        CompressedCache.load(tmp_path / "a.cache", model),
    )
    for each in (read, loaded):
        assert torch.equal(model.generate(**each.followed_by(tokens(1, 4)), **settings), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["torchao", "optimum.quanto", "bitsandbytes"])
def test_quantized_models_are_compressed_and_take_a_profile_of_the_original(tmp_path, library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        settings = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    elif library == "optimum.quanto":
        settings = transformers.QuantoConfig(weights="int8")
    else:
        settings = transformers.BitsAndBytesConfig(load_in_4bit=True)
    original = tiny_model("llama", hidden_size=128, head_dim=HEAD_DIM, intermediate_size=128)
    original.save_pretrained(tmp_path)
    chosen = profile(original, RAGGED)
    load = transformers.LlamaForCausalLM.from_pretrained
    model = load(tmp_path, dtype=torch.bfloat16, quantization_config=settings).eval()
    before = describe_model(model).fingerprint
    assert describe_model(model).num_layers == LAYERS
    with pytest.raises(ProfileError, match=r"quantized.*BudgetProfile\.from_budgets"), compress(model, chosen):
        pass
    with torch.inference_mode():
        expected, _ = run(model, tokens(1, 40))
        with compress(model, profile(model, 400)):
            logits, _ = run(model, tokens(1, 40))
        torch.testing.assert_close(logits, expected, atol=0.02, rtol=0.05)
        # Some libraries pack weights anew when they are first used.
        assert describe_model(model).fingerprint == before
        with compress(model, BudgetProfile.from_budgets(model, chosen.budgets, chosen.selector)):
            _, cache = run(model, tokens(1, 40))
    assert [[len(positions) for positions in layer] for layer in cache.positions] == RAGGED


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_go_on_by_several_tokens_as_by_one_after_the_other(family):
    # Plain Jamba and Bamba do not: in a call of several tokens their mixers start from nothing.
    model = tiny_model(family)
    everything = tokens(1, 46)
    plain = DynamicCache(config=model.config)
    cache = CompressedCache(model, profile(model, 400))
    for given in (plain, cache):
        model(everything[:, :40], cache=given)
    expected = [model(everything[:, at : at + 1], cache=plain).logits for at in range(40, 46)]
    output = model(everything[:, 40:], cache=cache)
    torch.testing.assert_close(output.logits, torch.cat(expected, dim=1), atol=1e-5, rtol=0)
