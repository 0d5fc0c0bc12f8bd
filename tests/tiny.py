"""Tiny random models of each family: for exactness and shapes, never for quality."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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
_FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": WINDOW, "query_pre_attn_scalar": 16}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
    ),
    # Phi-3 derives the head size from the hidden size.
    "phi3": (Phi3ForCausalLM, Phi3Config, {"hidden_size": 8 * HEAD_DIM}),
}
FAMILIES = tuple(_FAMILIES)


def tiny_model(family="llama", attention=None, seed=0, **changes):
    """A float32 model with random weights; Gemma 2 gets eager attention, which its soft cap needs."""
    cls, config_cls, own = _FAMILIES[family]
    torch.manual_seed(seed)
    attention = attention or ("eager" if family == "gemma2" else "sdpa")
    config = config_cls(**{**_SHAPE, **own, **changes}, attn_implementation=attention)
    return cls(config).eval().requires_grad_(False)


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
