"""Keys and values as vLLM's GPU backends lay them out: a block holds its tokens in order. Not run on a GPU yet."""

from __future__ import annotations

import torch
from torch import Tensor


class PagedStorage:
    """Blocks ``[blocks, kv_heads, block_size, 2 * head_dim]``, keys before values; see `compaction.Storage`."""

    def read(self, kv_cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of some blocks, ``[kv_heads, blocks * block_size, head_dim]`` each."""
        held = kv_cache[blocks].transpose(0, 1).flatten(1, 2)
        key, value = held.chunk(2, dim=-1)
        return key, value

    def write(self, kv_cache: Tensor, blocks: Tensor, key: Tensor, value: Tensor) -> None:
        """Fill some blocks from the first slot on with ``[kv_heads, entries, head_dim]``."""
        at = torch.arange(key.shape[1], device=blocks.device)
        block, slot = blocks[at // kv_cache.shape[2]], at % kv_cache.shape[2]
        kv_cache.transpose(1, 2)[block, slot] = torch.cat([key, value], dim=-1).transpose(0, 1)
