"""vLLM's Triton attention. Not run on a GPU yet."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from evolkv_vllm.attention import CompressingAttention
from evolkv_vllm.builder import BudgetBuilder


class EvolKVTritonBuilder(BudgetBuilder, TritonAttentionMetadataBuilder):
    """Builds the metadata of a group of layers."""


class EvolKVTritonImpl(CompressingAttention, TritonAttentionImpl):
    """One layer's attention, which compresses prompts after it has attended to them."""


class EvolKVTritonBackend(TritonAttentionBackend):
    """vLLM's backend with the builder and the attention above."""

    @staticmethod
    def get_impl_cls() -> type[EvolKVTritonImpl]:
        """Return the attention."""
        return EvolKVTritonImpl

    @staticmethod
    def get_builder_cls() -> type[EvolKVTritonBuilder]:
        """Return the builder."""
        return EvolKVTritonBuilder
