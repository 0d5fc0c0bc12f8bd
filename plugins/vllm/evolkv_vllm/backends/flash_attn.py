"""FlashAttention. Not run on a GPU yet."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from evolkv_vllm.backends.paged import PagedStorage
from evolkv_vllm.builder import BudgetBuilder
from evolkv_vllm.compaction import Compactor


class EvolKVFlashBuilder(BudgetBuilder, FlashAttentionMetadataBuilder):
    """Builds the metadata of a group of layers."""


class EvolKVFlashImpl(FlashAttentionImpl):
    """One layer's attention, which compresses prompts after it has attended to them."""

    compactor: Compactor | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return the attention of the batch; see vLLM's own."""
        output: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        rows = getattr(attn_metadata, "prompt_rows", None)
        if rows and self.compactor is not None:
            self.compactor.run(rows, query, kv_cache, PagedStorage())
        return output


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
