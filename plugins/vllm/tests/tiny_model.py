"""A random Llama of a few layers, written as a folder that both transformers and vLLM can serve."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, KV_HEADS, VOCABULARY = 6, 2, 256


def write_tiny_model(folder: Path, window: int | None = None) -> Path:
    """Write the model to a folder, in float32, and return the folder.

    Args:
        folder: is made.
        window: sliding window of every other layer in tokens, or None for full attention everywhere.
    """
    shape = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        # Large enough that heads look at different tokens, and that no two next tokens are nearly as likely.
        "initializer_range": 0.25,
        "head_dim": 32,
    }
    torch.manual_seed(0)
    if window is None:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        kinds = ["full_attention", "sliding_attention"] * (LAYERS // 2)
        model = Qwen2ForCausalLM(
            Qwen2Config(**shape, use_sliding_window=True, sliding_window=window, layer_types=kinds)
        )
    model.to(torch.float32).save_pretrained(folder)
    return folder
