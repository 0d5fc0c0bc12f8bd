"""A random model of a few layers, written as a folder that both transformers and vLLM can serve."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAYERS, KV_HEADS, VOCABULARY = 6, 2, 258
_END, _PADDING = "<end>", "<padding>"


def write_tiny_model(folder: Path, window: int | None = None) -> Path:
    """Write the model and a tokenizer of bytes to a folder, in float32, and return the folder.

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
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 257,
    }
    torch.manual_seed(0)
    if window is None:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        # Gemma 2 has a cap on the attention logits, too.
        kinds = ["full_attention", "sliding_attention"] * (LAYERS // 2)
        config = Gemma2Config(**shape, sliding_window=window, layer_types=kinds, query_pre_attn_scalar=32)
        model = Gemma2ForCausalLM(config)
    model.to(torch.float32).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, _END, _PADDING])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_PADDING)
    made.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    return made
