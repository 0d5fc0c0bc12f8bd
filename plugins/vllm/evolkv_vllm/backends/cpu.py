"""vLLM's attention on CPUs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from evolkv.errors import RunError
from evolkv_vllm.attention import CompressingAttention
from evolkv_vllm.builder import BudgetBuilder
from evolkv_vllm.compaction import Storage


class EvolKVCPUBuilder(BudgetBuilder, CPUAttentionMetadataBuilder):
    """Builds the metadata of a group of layers."""

    #: Builds those of all groups, where this is the builder of the first of several.
    all_groups: Any = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Read once, because vLLM looks a variable up in the environment each time.
        self._split_kv = envs.VLLM_CPU_ATTN_SPLIT_KV

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Return vLLM's metadata for what the layers of the group still hold."""
        if self.all_groups is not None:
            return self.all_groups.build(common_attn_metadata)
        return super().build(common_prefix_len, common_attn_metadata, fast_build)

    def build_plain(self, common: Any) -> Any:
        """Return vLLM's metadata as it is."""
        return CPUAttentionMetadataBuilder.build(self, 0, common)

    def lengthen(self, made: Any, starts: Tensor, longest: int) -> None:
        """Bring the metadata of the step before up to date: each request has one token more, and all else is as it was.

        Args:
            made: vLLM's metadata, whose tables, lengths and slots are views of tensors with this step's numbers.
            starts: the first token of each request, and the end, ``[requests + 1]``.
            longest: what the longest request has.
        """
        made.query_start_loc, made.max_seq_len = starts, longest
        made.scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(made.seq_lens),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=made.seq_lens,
            dtype=self.dtype,
            query_start_loc=starts,
            causal=made.causal,
            sliding_window_size=self.window_size,
            isa=self.isa,
            enable_kv_split=self._split_kv,
            dynamic_causal=made.dynamic_causal,
            kv_cache_dtype=self.kv_cache_dtype,
        )


class EvolKVCPUImpl(CompressingAttention, CPUAttentionBackendImpl):
    """One layer's attention, which compresses prompts after it has attended to them."""

    def storage(self, layer: Any) -> Storage:
        """Return the layout of the kernels that the layer uses."""
        return CPUStorage(layer)


class EvolKVCPUBackend(CPUAttentionBackend):
    """vLLM's backend with the builder and the attention above."""

    @classmethod
    def supports_rswa(cls) -> bool:
        """Return True: prompts' lengths come with a setting of that name, and nothing else of it is used."""
        return True

    @staticmethod
    def get_impl_cls() -> type[EvolKVCPUImpl]:
        """Return the attention."""
        return EvolKVCPUImpl

    @staticmethod
    def get_builder_cls() -> type[EvolKVCPUBuilder]:
        """Return the builder."""
        return EvolKVCPUBuilder


class CPUStorage:
    """Keys and values as vLLM's CPU kernels lay them out: see `compaction.Storage`.

    Args:
        layer: vLLM's `Attention`, which says which kernels it uses.
    """

    def __init__(self, layer: Any):
        self._isa = str(layer.isa)
        self._scales = {"k_scale": layer._k_scale_float, "v_scale": layer._v_scale_float}

    def read(self, kv_cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of some blocks, ``[kv_heads, blocks * block_size, head_dim]`` each."""
        _, heads, block_size, width = kv_cache.shape
        held = kv_cache[blocks].view(len(blocks), heads, -1)
        return tuple(  # type: ignore[return-value]
            held[:, :, places.flatten()].view(len(blocks), heads, block_size, width // 2).transpose(0, 1).flatten(1, 2)
            for places in _places(self._isa, kv_cache.dtype, block_size, width // 2)
        )

    def write(self, kv_cache: Tensor, blocks: Tensor, key: Tensor, value: Tensor) -> None:
        """Fill some blocks from the first slot on with ``[kv_heads, entries, head_dim]``."""
        block_size = kv_cache.shape[2]
        at = torch.arange(key.shape[1])
        slots = blocks[at // block_size] * block_size + at % block_size
        entries = key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous()
        ops.cpu_attn_reshape_and_cache(
            *entries, *_halves(kv_cache), slots, self._isa, **self._scales, kv_cache_dtype="auto"
        )


def _halves(kv_cache: Tensor) -> tuple[Tensor, ...]:
    """Return the views for keys and for values that vLLM's kernels take."""
    blocks, heads, block_size, width = kv_cache.shape
    return kv_cache.view(blocks, heads, 2 * block_size, width // 2).chunk(2, dim=2)


@functools.cache
def _places(isa: str, dtype: torch.dtype, block_size: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return where each channel of each key, and of each value, of a block lies, ``[block_size, head_dim]``.

    Instruction sets differ in it: keys may be transposed, or dealt out to tiles. So numbered entries are written by
    vLLM's own kernel, and looked for.

    Raises:
        RunError: the kernel keeps something else than the entries in another order.
    """
    count = block_size * head_dim
    numbers = torch.arange(count).view(block_size, 1, head_dim)
    found = torch.zeros(2, 2 * count, dtype=torch.long)
    # bfloat16 tells 256 whole numbers apart: three digits to the base of 128, each moved up so that 0 is empty.
    for digit in range(3):
        cache = torch.zeros(1, 1, block_size, 2 * head_dim, dtype=dtype)
        entry = (numbers // 128**digit % 128 + 1).to(dtype)
        for part in range(2):
            both = [torch.zeros_like(entry), torch.zeros_like(entry)]
            both[part] = entry
            ops.cpu_attn_reshape_and_cache(
                *both, *_halves(cache), torch.arange(block_size), isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
            )
            seen = cache.flatten().long() - 1
            found[part] += torch.where(seen >= 0, seen * 128**digit, -(1 << 40))
    places = []
    for part in range(2):
        filled = (found[part] >= 0).nonzero()[:, 0]
        order = found[part][filled]
        if len(filled) != count or not torch.equal(order.sort().values, torch.arange(count)):
            raise RunError(f"EvolKV: vLLM's CPU kernels ({isa}) keep keys in a form that EvolKV does not know")
        places.append(filled[order.argsort()].view(block_size, head_dim))
    return places[0], places[1]
