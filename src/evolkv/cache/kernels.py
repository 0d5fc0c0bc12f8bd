"""Triton kernels of a decode step: every row of a layer at once, each at its own length, where its entries lie.

`decode` appends one token to every row and attends to all that the row holds. Tests compare it with `cache/math.py`,
row by row. Several programs share the longest row (flash decoding: Dao et al. 2023, "Flash-Decoding for long-context
inference"), so that one head with a long budget does not keep the others waiting.

With `EVOLKV_TRITON=1`, ragged layers on a GPU use these kernels. On a CPU they run in Triton's interpreter only
(`TRITON_INTERPRET=1`), which is for tests.
"""

# Triton's language has types of its own.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from evolkv.cache.rows import RowGroup

# Entries that one program attends to, and the most that it loads at a time.
_SPLIT, _MOST_TILE = 256, 64
# Tiles of keys and values that are loaded ahead, and the bytes of a GPU's shared memory for them.
_STAGES, _SHARED = 2, 2**16
# Matrix units multiply no smaller blocks; places beyond the data are masked.
_LEAST_BLOCK = 16
# A GPU loads this many bytes at once, if every address is a multiple of them.
_ALIGNED = 16


class RowTable:
    """The addresses of each row's entries in a layer; sent to the device only when an address has changed."""

    def __init__(self) -> None:
        self._order: list[Tensor] = []
        self._places: list[np.ndarray] = []
        self._seen: list[tuple[int, ...]] = []
        self._entries: list[int] = []
        self._table = torch.empty(0)
        self._aligned = False

    def of(self, groups: Sequence[RowGroup]) -> tuple[Tensor, int, bool]:
        """Return the present addresses of the rows of a layer's groups.

        Returns:
            The table, ``[4, rows]`` int64: the addresses of each row's keys, values and positions, and how many entries
            it had when the table was made; how many tokens every row has gained since; whether all keys and values
            begin at multiples of 16 bytes.
        """
        entries = [group.keys.shape[1] for group in groups]
        seen = [
            (*(part.data_ptr() for part in parts), *(part.stride(0) for part in parts))
            for parts in ((group.keys, group.values, group.positions) for group in groups)
        ]
        since = entries[0] - self._entries[0] if self._entries else 0
        grown = [before + since for before in self._entries]
        if seen != self._seen or entries != grown or not self._same_rows(groups):
            self._seen, self._entries, since = seen, entries, 0
            self._table = self._made(groups)
        return self._table, since, self._aligned

    def _same_rows(self, groups: Sequence[RowGroup]) -> bool:
        return all(group.rows is known for group, known in zip(groups, self._order, strict=True))

    def _made(self, groups: Sequence[RowGroup]) -> Tensor:
        if len(groups) != len(self._order) or not self._same_rows(groups):
            self._order = [group.rows for group in groups]
            self._places = [rows.cpu().numpy() for rows in self._order]
        table = np.empty((4, sum(len(places) for places in self._places)), dtype=np.int64)
        for group, places in zip(groups, self._places, strict=True):
            for line, part in enumerate((group.keys, group.values, group.positions)):
                table[line, places] = part.data_ptr() + part.stride(0) * part.element_size() * np.arange(len(places))
            table[3, places] = group.keys.shape[1]
        entry_bytes = [part.shape[-1] * part.element_size() for part in (groups[0].keys, groups[0].values)]
        self._aligned = not (table[:2] % _ALIGNED).any() and all(size % _ALIGNED == 0 for size in entry_bytes)
        made, device = torch.from_numpy(table), groups[0].keys.device
        return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


# These numbers change from step to step, so they are not compiled in.
@triton.jit(do_not_specialize=["rows", "since"])
def _append_kernel(
    new_keys,
    new_values,
    table,
    rows,
    since,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """Write the new key and value of a row behind those that the row holds."""
    row = tl.program_id(0)
    last = tl.load(table + 3 * rows + row) + since - 1
    keys = tl.load(table + row).to(tl.pointer_type(new_keys.dtype.element_ty))
    values = tl.load(table + rows + row).to(tl.pointer_type(new_values.dtype.element_ty))
    d = tl.arange(0, KEY_BLOCK)
    tl.store(keys + last * KEY_DIM + d, tl.load(new_keys + row * KEY_DIM + d, mask=d < KEY_DIM), mask=d < KEY_DIM)
    e = tl.arange(0, VALUE_BLOCK)
    new_value = tl.load(new_values + row * VALUE_DIM + e, mask=e < VALUE_DIM)
    tl.store(values + last * VALUE_DIM + e, new_value, mask=e < VALUE_DIM)


@triton.jit(do_not_specialize=["rows", "since", "splits", "window"])
def _split_kernel(
    query,
    table,
    outputs,
    maxima,
    sums,
    rows,
    since,
    splits,
    window,
    scaling,
    softcap,
    FOLD: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Attend with a row's queries to one stretch of its entries, without dividing by the sum of the weights."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    entries = tl.load(table + 3 * rows + row) + since
    if split * SPLIT >= entries:
        return
    keys = tl.load(table + row).to(tl.pointer_type(query.dtype.element_ty))
    values = tl.load(table + rows + row).to(tl.pointer_type(query.dtype.element_ty))
    if ALIGNED:
        keys = tl.multiple_of(keys, 16)
        values = tl.multiple_of(values, 16)

    # Indices: m of queries, d of key channels, e of value channels, n of entries.
    m = tl.arange(0, QUERY_BLOCK)
    d = tl.arange(0, KEY_BLOCK)
    e = tl.arange(0, VALUE_BLOCK)
    queries = tl.load(
        query + (row * FOLD + m)[:, None] * KEY_DIM + d[None, :],
        mask=(m < FOLD)[:, None] & (d < KEY_DIM)[None, :],
        other=0.0,
    )
    if HAS_WINDOW:
        positions = tl.load(table + 2 * rows + row).to(tl.pointer_type(tl.int32))
        oldest = tl.load(positions + entries - 1).to(tl.int64) - window + 1

    highest = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([QUERY_BLOCK], tl.float32)
    output = tl.zeros([QUERY_BLOCK, VALUE_BLOCK], tl.float32)
    end = tl.minimum(entries, (split + 1) * SPLIT)
    for first in range(split * SPLIT, end, TILE):
        n = first + tl.arange(0, TILE)
        seen = n < entries
        key = tl.load(keys + n[None, :] * KEY_DIM + d[:, None], mask=seen[None, :] & (d < KEY_DIM)[:, None], other=0.0)
        # Without TF32, because float32 must be as exact as in the reference.
        logits = tl.dot(queries, key, input_precision="ieee") * scaling
        if HAS_SOFTCAP:
            logits = (2 * tl.sigmoid(2 * logits / softcap) - 1) * softcap
        if HAS_WINDOW:
            seen = seen & (tl.load(positions + n, mask=seen, other=-1) >= oldest)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        # If the window hides a whole tile, there is no largest logit to subtract.
        offset = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(logits - offset[:, None])
        rescale = tl.exp(highest - offset)
        value = tl.load(
            values + n[:, None] * VALUE_DIM + e[None, :], mask=seen[:, None] & (e < VALUE_DIM)[None, :], other=0.0
        )
        total = total * rescale + tl.sum(weights, 1)
        output = output * rescale[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        highest = higher

    part = (row * splits + split) * FOLD + m
    tl.store(maxima + part, highest, mask=m < FOLD)
    tl.store(sums + part, total, mask=m < FOLD)
    tl.store(
        outputs + part[:, None] * VALUE_DIM + e[None, :], output, mask=(m < FOLD)[:, None] & (e < VALUE_DIM)[None, :]
    )


@triton.jit(do_not_specialize=["rows", "since", "splits"])
def _merge_kernel(
    table,
    outputs,
    maxima,
    sums,
    sinks,
    merged,
    rows,
    since,
    splits,
    kv_heads,
    FOLD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Combine the stretches of one row; a sink counts as one more entry, without a value."""
    row = tl.program_id(0).to(tl.int64)
    entries = tl.load(table + 3 * rows + row) + since
    m = tl.arange(0, QUERY_BLOCK)
    e = tl.arange(0, VALUE_BLOCK)
    highest = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([QUERY_BLOCK], tl.float32)
    output = tl.zeros([QUERY_BLOCK, VALUE_BLOCK], tl.float32)
    if HAS_SINKS:
        highest = tl.load(sinks + (row % kv_heads) * FOLD + m, mask=m < FOLD, other=0.0).to(tl.float32)
        total += 1.0
    for split in range(tl.cdiv(entries, SPLIT)):
        part = (row * splits + split) * FOLD + m
        split_highest = tl.load(maxima + part, mask=m < FOLD, other=float("-inf"))
        split_total = tl.load(sums + part, mask=m < FOLD, other=0.0)
        split_output = tl.load(
            outputs + part[:, None] * VALUE_DIM + e[None, :],
            mask=(m < FOLD)[:, None] & (e < VALUE_DIM)[None, :],
            other=0.0,
        )
        higher = tl.maximum(highest, split_highest)
        offset = tl.where(higher == float("-inf"), 0.0, higher)
        scale, split_scale = tl.exp(highest - offset), tl.exp(split_highest - offset)
        total = total * scale + split_total * split_scale
        output = output * scale[:, None] + split_output * split_scale[:, None]
        highest = higher
    output = output / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        merged + (row * FOLD + m)[:, None] * VALUE_DIM + e[None, :],
        output.to(merged.dtype.element_ty),
        mask=(m < FOLD)[:, None] & (e < VALUE_DIM)[None, :],
    )


def decode(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    table: Tensor,
    since: int,
    longest: int,
    *,
    aligned: bool,
    kv_heads: int,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Append one token to every row, in memory that is reserved already, and attend to all that the row then holds.

    Args:
        query: ``[rows, fold, head_dim]``, `fold` query heads for each KV head; in the number format of all else.
        new_keys: ``[rows, head_dim]``.
        new_values: ``[rows, value_dim]``.
        table: where the entries of each row lie, contiguous for each row (see `RowTable.of`).
        since: tokens since `table` was made, this one included; 0 if `table` counts it already.
        longest: entries of the longest row, this token included.
        aligned: whether all keys and values, and each entry, begin at multiples of 16 bytes.
        kv_heads: KV heads of the layer; row ``i`` belongs to head ``i % kv_heads``.
        scaling: factor on the logits.
        softcap: Gemma 2's cap on the logits, or None.
        window: tokens that a query sees by position, or None for all that are held.
        sinks: a logit for each query head that only enters the softmax's denominator, ``[heads]``, or None.

    Returns:
        ``[rows, fold, value_dim]``.
    """
    rows, fold, key_dim = query.shape
    value_dim = new_values.shape[-1]
    splits = triton.cdiv(longest, _SPLIT)
    keys: dict[str, Any] = {"KEY_DIM": key_dim, "KEY_BLOCK": _block(key_dim)}
    values: dict[str, Any] = {"VALUE_DIM": value_dim, "VALUE_BLOCK": _block(value_dim)}
    queries: dict[str, Any] = {"FOLD": fold, "QUERY_BLOCK": _block(fold)}
    outputs = query.new_empty((rows, splits, fold, value_dim), dtype=torch.float32)
    maxima = query.new_empty((rows, splits, fold), dtype=torch.float32)
    sums = torch.empty_like(maxima)
    merged = query.new_empty((rows, fold, value_dim))
    # Triton launches on the current device, which need not be the layer's.
    with torch.cuda.device_of(query):
        _append_kernel[(rows,)](new_keys, new_values, table, rows, since, **keys, **values)
        _split_kernel[(rows, splits)](
            query,
            table,
            outputs,
            maxima,
            sums,
            rows,
            since,
            splits,
            window or 0,
            scaling,
            softcap or 1.0,
            **queries,
            **keys,
            **values,
            SPLIT=_SPLIT,
            TILE=tile_of(key_dim, value_dim, query.element_size()),
            ALIGNED=aligned,
            HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None,
            num_stages=_STAGES,
        )
        _merge_kernel[(rows,)](
            table,
            outputs,
            maxima,
            sums,
            maxima if sinks is None else sinks,
            merged,
            rows,
            since,
            splits,
            kv_heads,
            **queries,
            **values,
            SPLIT=_SPLIT,
            HAS_SINKS=sinks is not None,
        )
    return merged


def _block(size: int) -> int:
    return max(_LEAST_BLOCK, triton.next_power_of_2(size))


def tile_of(key_dim: int, value_dim: int, element_size: int) -> int:
    """Return the entries that a program loads at a time, such that tiles fit into the shared memory of any GPU."""
    fitting = _SHARED // (_STAGES * element_size * (_block(key_dim) + _block(value_dim)))
    return max(_LEAST_BLOCK, min(_MOST_TILE, 2 ** (fitting.bit_length() - 1)))
