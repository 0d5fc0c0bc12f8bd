"""vLLM's Triton attention. Not run on a GPU yet."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from evolkv_vllm.backends.paged import PagedStorage
from evolkv_vllm.builder import BudgetBuilder
from evolkv_vllm.compaction import Compactor


class EvolKVTritonBuilder(BudgetBuilder, TritonAttentionMetadataBuilder):
    """Builds the metadata of a group of layers."""


class EvolKVTritonImpl(TritonAttentionImpl):
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
