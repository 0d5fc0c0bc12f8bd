"""The work that two revisions are compared by. `against.py` runs it in fresh processes, with either on PYTHONPATH.

It uses only what every revision has: `evolkv.search`, `evolkv.evaluate`, `CompressedCache`, `BudgetProfile` and
`load_model`. Every setting is given, so that a default that has changed does not count as a difference.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import evolkv

SELECTORS: dict[str, dict[str, Any]] = {
    "snapkv": {"name": "snapkv", "window": 8, "kernel": 7, "pooling": "max"},
    "keydiff": {"name": "keydiff"},
}
SEARCHES = (("joint", "layer"), ("joint", "head"), ("evolkv", "layer"), ("random", "layer"), ("random", "head"))
#: What an entry of a search's history has in every revision, except seconds.
ENTRY = ("budgets", "fitness", "score", "cache_score", "generation")
FIXED: dict[str, Any] = {
    "metric": "logprob",
    "protocol": "aware",
    "group_size": 8,
    "lam": 0.3,
    "gamma": 0.2,
    "start": "uniform",
    "seed": 0,
    "engine": "replay",
    "backend": "local",
    "workers": 2,
}


def tiny(tokenizer: Any) -> PreTrainedModel:
    """Return a random model with a real tokenizer's vocabulary; its logits are spread, so that scores differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=64,
        initializer_range=0.3,
        max_position_embeddings=4096,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def search(model: Any, tokenizer: Any, context: int, budget: int, evaluations: int, **more: Any) -> Any:
    """Run a search whose settings are all given; whole generations, so that how a limit is met does not matter."""
    task = f"niah:context={context}"
    settings = {**FIXED, "train": 4, "val": 4, "population": 10, "selector": SELECTORS["snapkv"], **more}
    return evolkv.search(model, tokenizer, task=task, budget=budget, max_evals=evaluations, **settings)


def outcomes(name: str) -> Iterator[tuple[str, Any]]:
    """Yield what must not differ: histories, profiles and evaluated rows, by name."""
    smollm2, tokenizer = evolkv.load_model("smollm2-135m", dtype="float32", device="cpu")
    model, context, evaluations = (tiny(tokenizer), 200, 60) if name == "tiny" else (smollm2, 240, 40)
    for strategy, granularity in SEARCHES if name == "tiny" else SEARCHES[:3]:
        for selector, spec in SELECTORS.items():
            result = search(
                model, tokenizer, context, 48, evaluations, strategy=strategy, granularity=granularity, selector=spec
            )
            what = f"{name}, {strategy} over {granularity}s, {selector}"
            yield f"{what}: history", [{key: entry[key] for key in ENTRY} for entry in result.history]
            # LU-KV has stood for choice for some revisions only.
            stood = [row for row in result.validation if row["name"] != "lukv"]
            yield f"{what}: validation", [{key: row[key] for key in ("name", "score")} for row in stood]
            yield f"{what}: budgets", result.profile.budgets.tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "profile.json")
        result.profile.save(path)
        for protocol in ("aware", "agnostic"):
            for metric in ("contains", "logprob"):
                rows = evolkv.evaluate(
                    model,
                    tokenizer,
                    task=f"niah:context={context}",
                    methods=["full", "snapkv", "pyramidkv", "adakv+snapkv", "cake+snapkv", "chunkkv", "tova", path],
                    budgets=[48],
                    samples=6,
                    seed=0,
                    metric=metric,
                    protocol=protocol,
                )
                yield (
                    f"{name}, evaluate, {metric}, {protocol}",
                    [[row[key] for key in ("budget", "n", "score", "ci95", "kv_bytes", "mean_budget")] for row in rows],
                )


def seconds(work: Any) -> float:
    """Return the CPU seconds of one call, over all threads: those of a machine that does other work too compare."""
    started = time.process_time()
    work()
    return time.process_time() - started


def timings() -> dict[str, float]:
    """Return the CPU seconds of a search, an evaluation, a decode step and a prompt, each after warming up."""
    model, tokenizer = evolkv.load_model("smollm2-135m", dtype="float32", device="cpu")
    ids = torch.randint(100, 40_000, (1, 1000), generator=torch.Generator().manual_seed(0))
    profile = evolkv.BudgetProfile.uniform(model, 64, selector="snapkv")

    def prefill() -> Any:
        cache = evolkv.CompressedCache(model, profile)
        model(ids, cache=cache, use_cache=True, logits_to_keep=1)
        return cache

    def evaluate() -> None:
        evolkv.evaluate(
            model,
            tokenizer,
            task="niah:context=400",
            methods=["full", "snapkv", "pyramidkv", "adakv+snapkv"],
            budgets=[32, 64],
            samples=8,
            seed=0,
            metric="contains",
            protocol="aware",
        )

    cache = prefill()
    prompts = [seconds(lambda: prefill().release()) for _ in range(3)]
    steps = [seconds(lambda: model(ids[:, :1], cache=cache, use_cache=True)) for _ in range(52)][2:]
    cache.release()
    return {
        "prefill of 1,000 tokens": sorted(prompts)[1],
        "decode step": sorted(steps)[25],
        "evaluation": seconds(evaluate),
        "search": seconds(
            lambda: search(model, tokenizer, 400, 64, 240, strategy="joint", granularity="head", minibatch=2)
        ),
    }


def main() -> None:
    """Do the work that the command line names, and print it as JSON."""
    work, tree = sys.argv[1:]
    if not Path(evolkv.__file__).is_relative_to(tree):
        raise SystemExit(f"evolkv comes from {evolkv.__file__}, not from {tree}")
    with torch.no_grad():
        print(json.dumps(timings() if work == "timings" else dict(outcomes(work))))


if __name__ == "__main__":
    main()
