"""What one layer's part of a decode step costs, in the ways in which it could be done.

    python bench/layer_step.py [--dtype float32] [--pairs 200] [--json FILE]

For a layer of SmolLM2's shape (3 KV heads of 64, 3 query heads to each): appending a token to what is held, in place
and by copying; attention with query heads folded into the query axis, by `enable_gqa`, and by two matrix products; and
attention to rows of many lengths, group by group, in one grouped call, masked and padded. All ways to do one thing are
checked against each other, then take turns; reported is the CPU time of the thread, median, least and most.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import count, finish, machine, run, spread
from evolkv.cache.math import attention
from evolkv.errors import UsageError

KV_HEADS, FOLD, HEAD_DIM = 3, 3, 64
SCALE = HEAD_DIM**-0.5
#: Rows of the ragged case and the entries of the shortest and the longest.
ROWS, SHORTEST, LONGEST = 24, 33, 235
#: What the ragged case is compared with; its result is another.
DENSE = "dense rows of the same total"

Ways = dict[str, Callable[[], Tensor]]


def appending(dtype: torch.dtype, sequences: int, entries: int) -> Ways:
    """A token for each row, behind so many entries."""
    rows = sequences * KV_HEADS
    held, room, new = (torch.randn(rows, count, HEAD_DIM, dtype=dtype) for count in (entries, entries + 1, 1))
    room[:, :entries] = held

    def in_place() -> Tensor:
        room.narrow(1, entries, 1).copy_(new)
        return room

    return {"in place": in_place, "torch.cat": lambda: torch.cat([held, new], dim=1)}


def folding(dtype: torch.dtype, sequences: int, entries: int) -> Ways:
    """Attention to as many entries in every row."""
    query = torch.randn(sequences, KV_HEADS * FOLD, 1, HEAD_DIM, dtype=dtype)
    key, value = torch.randn(2, sequences, KV_HEADS, entries, HEAD_DIM, dtype=dtype)
    folded = query.view(sequences, KV_HEADS, FOLD, HEAD_DIM)

    def products() -> Tensor:
        weights = ((folded @ key.transpose(2, 3)).float() * SCALE).softmax(-1)
        return (weights.to(dtype) @ value).view_as(query)

    return {
        "folded": lambda: F.scaled_dot_product_attention(folded, key, value, scale=SCALE).view_as(query),
        "enable_gqa": lambda: F.scaled_dot_product_attention(query, key, value, scale=SCALE, enable_gqa=True),
        "two products": products,
    }


def ragged(dtype: torch.dtype) -> Ways:
    """Attention to rows of many lengths; the dense rows of the same total are there to compare with."""
    lengths = torch.linspace(SHORTEST, LONGEST, ROWS).long()
    # grouped_mm wants rows of logits that begin at multiples of 16 bytes.
    lengths[-1] += -lengths.sum() % 8
    total = int(lengths.sum())
    ends = lengths.cumsum(0)
    query = torch.randn(ROWS, FOLD, HEAD_DIM, dtype=dtype)
    keys, values = torch.randn(2, total, HEAD_DIM, dtype=dtype)
    # Each in memory of its own, as the groups of a layer are.
    groups = [
        (k[None].clone(), v[None].clone())
        for k, v in zip(*(x.split(lengths.tolist()) for x in (keys, values)), strict=True)
    ]
    owner = torch.repeat_interleave(torch.arange(ROWS), lengths)
    columns = torch.arange(int(lengths.max()))
    within = columns < lengths[:, None]
    padded_keys, padded_values = (torch.zeros(ROWS, len(columns), HEAD_DIM, dtype=dtype) for _ in range(2))
    padded_keys[within], padded_values[within] = keys, values
    hidden = torch.zeros(ROWS, 1, len(columns), dtype=dtype).masked_fill(~within[:, None], float("-inf"))
    own_only = owner == torch.arange(ROWS).repeat_interleave(FOLD)[:, None]
    even = total // ROWS
    even_keys, even_values = torch.randn(2, ROWS, even, HEAD_DIM, dtype=dtype)
    offsets, places = ends.int(), owner.expand(FOLD, -1)

    def by_group() -> Tensor:
        return torch.cat(
            [attention(query[row : row + 1], key, value, None, SCALE, None) for row, (key, value) in enumerate(groups)]
        )

    def in_one_call() -> Tensor:
        logits = F.grouped_mm(query, keys.T, offs=offsets).float() * SCALE
        most = torch.full((FOLD, ROWS), float("-inf")).scatter_reduce(1, places, logits, "amax")
        weights = (logits - most.gather(1, places)).exp()
        weights = weights / torch.zeros(FOLD, ROWS).scatter_add(1, places, weights).gather(1, places)
        return F.grouped_mm(weights.to(dtype), values, offs=offsets)

    def all_masked() -> Tensor:
        output = F.scaled_dot_product_attention(
            query.view(1, 1, -1, HEAD_DIM), keys[None, None], values[None, None], own_only, scale=SCALE
        )
        return output.view_as(query)

    def padded() -> Tensor:
        return F.scaled_dot_product_attention(
            query[:, None], padded_keys[:, None], padded_values[:, None], hidden[:, None], scale=SCALE
        )[:, 0]

    return {
        "group by group": by_group,
        "grouped_mm": in_one_call,
        "all against all, masked": all_masked,
        "padded to the longest, masked": padded,
        DENSE: lambda: attention(query, even_keys, even_values, None, SCALE, None),
    }


def measured(ways: Ways, turns: int) -> dict[str, Any]:
    """Microseconds of each way, in turns; those whose results must be equal are held against the first."""
    expected, *others = (way() for name, way in ways.items() if name != DENSE)
    for other in others:
        torch.testing.assert_close(other, expected, atol=2e-2, rtol=2e-2)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + turns // 10):
        for name, way in ways.items():
            started = time.thread_time_ns()
            way()
            if turn >= turns // 10:
                times[name].append((time.thread_time_ns() - started) / 1000)
    return {name: {key: round(value, 1) for key, value in spread(found).items()} for name, found in times.items()}


def main() -> None:
    """Runs the benchmark."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--pairs", type=count, default=200, help="turns that are timed")
    arguments = options.parse_args()
    dtype = getattr(torch, arguments.dtype, None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"--dtype {arguments.dtype} is none of float32, float16, bfloat16")
    if arguments.pairs < 1:
        raise UsageError(f"--pairs is {arguments.pairs}; expected at least 1")
    # Thread time counts the work of this thread alone.
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    shapes = [(1, 33), (1, 128), (1, 512), (8, 128)]
    result = {
        "appending": {f"{s} x {n}": measured(appending(dtype, s, n), arguments.pairs) for s, n in shapes},
        "folding": {f"{s} x {n}": measured(folding(dtype, s, n), arguments.pairs) for s, n in shapes[1:]},
        "ragged": measured(ragged(dtype), arguments.pairs),
    }
    about = {"benchmark": "layer_step", "unit": "microseconds of thread time", "dtype": arguments.dtype}
    finish({**about, "machine": machine(torch.device("cpu")), **result}, arguments.json)


if __name__ == "__main__":
    run(main)
