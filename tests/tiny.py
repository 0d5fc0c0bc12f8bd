"""Tiny random models of each family: for exactness and shapes, never for quality."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from torch import nn

VOCABULARY, LAYERS, KV_HEADS, HEAD_DIM, WINDOW = 128, 4, 2, 16, 24

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
# All experts for every token: which two are the best is decided by rounding where they are close, and that differs
# between processors and numbers of threads.
_MOE = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
#: By family: the name that its classes begin with, and what its config says besides the common shape.
_FAMILIES = {
    "llama": ("Llama", {}),
    "llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", _MOE),
    "gemma2": ("Gemma2", {"sliding_window": WINDOW, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
    ),
    # Phi-3 derives the head size from the hidden size.
    "phi3": ("Phi3", {"hidden_size": 8 * HEAD_DIM}),
    # Layer 3 has no position embedding.
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1, 0, 1]}),
    # Sliding and full layers in turn, each head with an attention sink.
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 4, "sliding_window": WINDOW, "rope_parameters": {"rope_type": "default"}},
    ),
    "granite": ("Granite", {"attention_multiplier": 0.1}),
    "olmo2": ("Olmo2", {"hidden_size": 8 * HEAD_DIM}),
    # Sliding layers with, and a full one without position embedding.
    "cohere2": ("Cohere2", {"sliding_window": WINDOW}),
    "stablelm": ("StableLm", {"hidden_size": 8 * HEAD_DIM, "qk_layernorm": True}),
}
#: Families with layers that have a state and no keys and values; four layers of each have keys and values.
_HYBRIDS = {
    "qwen3_next": (
        "Qwen3Next",
        {
            "num_hidden_layers": 2 * LAYERS,
            "layer_types": ["linear_attention", "full_attention"] * LAYERS,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            **_MOE,
        },
    ),
    "jamba": (
        "Jamba",
        {
            "num_hidden_layers": 2 * LAYERS,
            "hidden_size": 8 * HEAD_DIM,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": (
        "Bamba",
        {
            "num_hidden_layers": LAYERS + 1,
            "hidden_size": 8 * HEAD_DIM,
            "attn_layer_indices": [0, 1, 3, 4],
            **_MAMBA,
            "mamba_n_heads": 16,
        },
    ),
    "lfm2": (
        "Lfm2",
        {"num_hidden_layers": LAYERS + 2, "hidden_size": 8 * HEAD_DIM, "full_attn_idxs": [1, 2, 4, 5]},
    ),
}
#: Families that some tests need for what is special in them.
_OTHERS = {
    # Turns neighbouring channels together, and half of them.
    "glm": ("Glm", {}),
}
HYBRIDS = tuple(_HYBRIDS)
#: What sdpa does not compute.
EAGER_ONLY = ("gemma2", "gpt_oss")
FAMILIES = (*_FAMILIES, *_HYBRIDS)


def tiny_model(family="llama", attention=None, seed=0, **changes):
    """A float32 model with random weights; Gemma 2 and GPT-OSS get eager attention, for soft cap and sinks."""
    name, own = {**_FAMILIES, **_HYBRIDS, **_OTHERS}[family]
    torch.manual_seed(seed)
    attention = attention or ("eager" if family in EAGER_ONLY else "sdpa")
    config_class = getattr(transformers, f"{name}TextConfig" if family == "gemma3" else f"{name}Config")
    config = config_class(**{**_SHAPE, **own, **changes}, attn_implementation=attention)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            parameter.normal_()
    return model


#: Rotary embeddings that turn all tokens otherwise in long texts.
STRETCHING = ("longrope", "dynamic")


def stretching_model(kind, limit):
    """A tiny Phi-3 (longrope) or Llama (dynamic) that turns keys otherwise in texts of more than `limit` tokens."""
    rope = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
        return tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=limit)
    return tiny_model("llama", rope_parameters={**rope, "factor": 2.0}, max_position_embeddings=limit)


@contextlib.contextmanager
def failing(module, call=1):
    """Has a call of a module raise ZeroDivisionError, which is expected: the first, or number `call`."""
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == call:
            raise ZeroDivisionError

    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        yield
    handle.remove()


def tokens(*shape, seed=0):
    """Random token ids without the special ones."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padded(lengths, side):
    """Random prompts of these lengths: each alone, as one batch padded on a side, and its attention mask."""
    rows = [tokens(length, seed=i) for i, length in enumerate(lengths)]
    batch = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(batch)
    for i, row in enumerate(rows):
        where = slice(max(lengths) - len(row), None) if side == "left" else slice(0, len(row))
        batch[i, where], mask[i, where] = row, 1
    return rows, batch, mask


class Adapted(nn.Module):
    """A linear layer with low-rank adapters, named and switched as in PEFT."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer, names, rank=2):
        super().__init__()
        self.base_layer, self.active_adapters, self.disabled, self.merged_adapters = base_layer, [names[0]], False, []
        self.scaling = dict.fromkeys(names, 1.0)
        self.lora_A = nn.ModuleDict({name: nn.Linear(base_layer.in_features, rank, bias=False) for name in names})
        self.lora_B = nn.ModuleDict({name: nn.Linear(rank, base_layer.out_features, bias=False) for name in names})

    @property
    def disable_adapters(self):
        return self.disabled

    def forward(self, x):
        added = [] if self.disabled else self.active_adapters
        return self.base_layer(x) + sum(self.lora_B[n](self.lora_A[n](x)) * self.scaling[n] for n in added)


def add_adapters(model, *names):
    """Gives the value projections of a Llama adapters, of which the first is active, and returns a switch for all."""
    adapted = [Adapted(layer.self_attn.v_proj, names) for layer in model.model.layers]
    for layer, part in zip(model.model.layers, adapted, strict=True):
        layer.self_attn.v_proj = part.requires_grad_(False)

    def switch(name):
        for part in adapted:
            part.disabled, part.active_adapters = name is None, [name] if name else part.active_adapters

    return switch


@contextlib.contextmanager
def tokens_read(model):
    """Yields a list of how many tokens each call of the model reads."""
    counts = []
    handle = model.register_forward_pre_hook(lambda model, arguments: counts.append(arguments[0].shape[1]))
    try:
        yield counts
    finally:
        handle.remove()


def scored_texts(engine, budgets):
    """The texts that an engine scores, sorted: replay and naive go through examples and candidates in other orders."""
    said = []
    scorer = engine.questions[0].scorer
    score = type(scorer).score

    def recorded(*given):
        answers = score(scorer, *given)
        said.extend(answer.text for answer in answers)
        return answers

    scorer.score = recorded
    engine.score(budgets)
    return sorted(said)
