"""FlashAttention. Not run on a GPU yet."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from evolkv_vllm.attention import CompressingAttention
from evolkv_vllm.builder import BudgetBuilder


class EvolKVFlashBuilder(BudgetBuilder, FlashAttentionMetadataBuilder):
    """Builds the metadata of a group of layers."""


class EvolKVFlashImpl(CompressingAttention, FlashAttentionImpl):
    """One layer's attention, which compresses prompts after it has attended to them."""


class EvolKVFlashBackend(FlashAttentionBackend):
    """vLLM's backend with the builder and the attention above."""

    @staticmethod
    def get_impl_cls() -> type[EvolKVFlashImpl]:
        """Return the attention."""
        return EvolKVFlashImpl

    @staticmethod
    def get_builder_cls() -> type[EvolKVFlashBuilder]:
        """Return the builder."""
        return EvolKVFlashBuilder
