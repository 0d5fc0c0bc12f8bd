"""The attention of all backends: a prompt is compressed after it has been attended to."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from evolkv_vllm.backends.paged import PagedStorage
from evolkv_vllm.compaction import Compactor, Part, Storage


class CompressingAttention:
    """One layer's attention, or one KV head's; goes before vLLM's among the bases of a class."""

    compactor: Compactor | None = None
    #: The number of the KV head, where each has blocks of its own.
    part = 0

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
        plain = super().forward  # type: ignore[misc]
        output: Tensor = plain(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        rows = getattr(attn_metadata, "prompt_rows", None)
        if rows and self.compactor is not None:
            self.compactor.run(Part(rows, query, kv_cache, self.storage(layer)), self.part)
        return output

    def storage(self, layer: Any) -> Storage:
        """Return how keys and values are laid out in blocks: by default as on GPUs.

        Args:
            layer: vLLM's `Attention`.
        """
        return PagedStorage()
