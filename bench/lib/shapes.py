"""Models of real shape with random weights: what inference costs does not depend on what the weights say."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

import evolkv

_PREFIX = "random:"


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        **{"vocab_size": 128_256, "max_position_embeddings": 131_072, **more},
    )


#: By name, what makes the configuration: the shapes of the published models.
SHAPES = {
    "llama-8b": lambda: _llama(4096, 32, 32, 8, 14_336),
    "llama-3b": lambda: _llama(3072, 28, 24, 8, 8192, tie_word_embeddings=True),
    "llama-1b": lambda: _llama(2048, 16, 32, 8, 8192, head_dim=64, tie_word_embeddings=True),
    "qwen3-8b": lambda: Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=12_288,
        max_position_embeddings=131_072,
    ),
    "smollm2-135m": lambda: _llama(576, 30, 9, 3, 1536, vocab_size=49_152, tie_word_embeddings=True),
    # For trying a benchmark out.
    "tiny": lambda: _llama(96, 4, 6, 2, 128, vocab_size=512),
}


def load(name: str, dtype: str, device: str | None) -> PreTrainedModel:
    """A model by alias, path or id; or ``random:SHAPE``, with random weights."""
    if not name.startswith(_PREFIX):
        return evolkv.load_model(name, dtype=dtype, device=device)[0]
    shape = name.removeprefix(_PREFIX)
    if shape not in SHAPES:
        raise SystemExit(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with where:
        model = AutoModelForCausalLM.from_config(
            SHAPES[shape](), dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)
