"""Does torch.compile pay for a decode step? Plain transformers and a compressed cache, each as it is and compiled.

    python bench/compiled_step.py [--dtype bfloat16] [--pairs 60] [--json FILE]

Plain transformers compiles as one graph, on a `StaticCache` (fixed shapes); beside it are its steps on that cache and
on a `DynamicCache`, as they are. A compiled model leaves a `CompressedCache` to Python, so that the graph breaks in
every layer. All take turns, step by step, after what compiles has compiled; reported is the CPU time of the thread,
median, least and most, and the wall-clock seconds of the steps before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache

import evolkv
from common import count, finish, machine, parser, ratios, run, spread
from evolkv.models.forward import cache_keyword
from shapes import load

#: Steps before any is timed: what compiles does so at the first, and again where a shape has changed.
WARM_UP = 6


def main() -> None:
    """Times the steps."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--prompt-tokens", type=count, default=128)
    options.add_argument("--budget", type=count, default=128, help="mean cache entries per KV head")
    options.add_argument("--pairs", type=count, default=60, help="steps of each, in turn")
    options.set_defaults(device="cpu")
    arguments = options.parse_args()
    torch.manual_seed(arguments.seed)
    # A model each: a compressed cache has its model's attention answer to it.
    model, other = (load(arguments.model, arguments.dtype, arguments.device) for _ in range(2))
    keyword = cache_keyword(model)
    ids = torch.randint(3, model.config.get_text_config(decoder=True).vocab_size, (1, arguments.prompt_tokens))
    profile = evolkv.BudgetProfile.uniform(other, arguments.budget, selector="snapkv")
    room = arguments.prompt_tokens + arguments.pairs + WARM_UP
    ways: dict[str, tuple[Callable[..., Any], Cache]] = {
        "plain, DynamicCache": (model, DynamicCache(config=model.config)),
        "plain, StaticCache": (model, StaticCache(config=model.config, max_cache_len=room)),
        "plain, StaticCache, compiled": (
            torch.compile(model, fullgraph=True, dynamic=False),
            StaticCache(config=model.config, max_cache_len=room),
        ),
        "compressed": (other, evolkv.CompressedCache(other, profile)),
        "compressed, compiled": (torch.compile(other), evolkv.CompressedCache(other, profile)),
    }
    warm_up: dict[str, list[float]] = {}
    for name, (call, cache) in ways.items():
        own = other if isinstance(cache, evolkv.CompressedCache) else model
        own(ids, **{keyword: cache})
        warm_up[name] = []
        for at in range(WARM_UP):
            started = time.perf_counter()
            step(call, cache, keyword, arguments.prompt_tokens + at)
            warm_up[name].append(time.perf_counter() - started)
        print(f"{name}: first step {warm_up[name][0]:.1f} s", file=sys.stderr, flush=True)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for pair in range(arguments.pairs):
        for name, (call, cache) in ways.items():
            started = time.thread_time()
            step(call, cache, keyword, arguments.prompt_tokens + WARM_UP + pair)
            taken[name].append(1000 * (time.thread_time() - started))
    plain = taken["plain, DynamicCache"]
    finish(
        {
            "benchmark": "compiled_step",
            "machine": machine(model.device),
            "model": arguments.model,
            "dtype": arguments.dtype,
            "prompt_tokens": arguments.prompt_tokens,
            "budget": arguments.budget,
            "pairs": arguments.pairs,
            "steps": {
                name: {
                    "warm_up_seconds": sum(warm_up[name]),
                    "milliseconds": spread(times),
                    "over_plain": ratios(times, plain),
                }
                for name, times in taken.items()
            },
        },
        arguments.json,
    )


def step(call: Callable[..., Any], cache: Cache, keyword: str, at: int) -> None:
    """One token, at a position that no text says."""
    call(torch.full((1, 1), 7), position_ids=torch.full((1, 1), at), **{keyword: cache})


if __name__ == "__main__":
    run(main)
