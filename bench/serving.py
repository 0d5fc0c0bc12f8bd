"""The plugin for vLLM under load, beside plain vLLM.

    python bench/serving.py serve --profiles classes.json heads.json [--requests 12] [--record NAME]
    python bench/serving.py host [--requests 16] [--groups 1 5 30 90] [--record NAME]
    python bench/serving.py heads [--record NAME]

It runs in vLLM's environment (docs/serving.md, `make test-vllm` makes one), on vLLM's CPU backend.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from evolkv import BudgetProfile
from evolkv.errors import UsageError
from evolkv.models import ALIASES, gguf
from evolkv.selectors import get_selector
from evolkv.tasks import Example, encode_prompt, get_task
from evolkv.tasks.metrics import get_metric
from lib import server
from lib.command import Bench, run
from lib.common import ratios, seconds, spread, versions
from lib.host_time import Engine
from lib.serving_plot import draw

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
BLOCK = 32


def host(
    bench: Bench,
    requests: int = 16,
    rounds: int = 5,
    steps: int = 64,
    layers: int = 30,
    heads: int = 3,
    groups: list[int] | None = None,
) -> dict[str, Any]:
    """Time a step of decoding besides the model, with layers or heads in several groups, over plain vLLM.

    Each engine decodes the same requests. They take turns, with as many steps each. The model is a small random one,
    because this work does not depend on it.

    Args:
        requests: that run at once.
        rounds: turns of each engine.
        steps: of each turn; a multiple of the block size, so that every request gets new blocks as often.
        layers: of the model.
        heads: KV heads of a layer.
        groups: numbers of groups with equal budgets (default: 1, 5, one for each layer and one for each KV head); more
            than layers are groups of KV heads.
    """
    numbers = groups or [1, 5, layers, layers * heads]
    rng = np.random.default_rng(bench.seed)
    prompts = [rng.integers(0, 1000, size=length).tolist() for length in rng.integers(300, 400, size=requests)]
    spent: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        engines, model = {}, _random_model(layers, heads, folder)
        for name, number in {"plain": None, **{str(number): number for number in numbers}}.items():
            settings = None
            if number is not None:
                path = Path(folder, f"{number}.json")
                # Classes a few entries apart, so that no two are the same.
                parts = np.arange(layers if number <= layers else layers * heads)
                budgets = (64 + 4 * (parts * number // len(parts))).reshape(layers, -1).squeeze()
                BudgetProfile.from_budgets(model, budgets, "snapkv:window=16").save(path)
                settings = {"profile": str(path)}
            engines[name] = Engine(
                f"{folder}/model",
                settings,
                prompts,
                steps * (rounds + 2),
                block_size=BLOCK,
                dtype=bench.dtype,
                max_model_len=2048,
            )
            stack.callback(engines[name].close)
        for turn in range(rounds + 1):
            for name, engine in engines.items():
                taken = engine.steps(steps)
                # The first turn warms up.
                if turn:
                    spent.setdefault(name, []).append(taken)
    totals = {name: [sum(each.values()) for each in taken] for name, taken in spent.items()}
    rows = [
        {
            "groups": name,
            "milliseconds": spread([1000 * total for total in totals[name]]),
            "over_plain": ratios(totals[name], totals["plain"]),
            "parts": {part: spread([1000 * each[part] for each in taken])["median"] for part in taken[0]},
        }
        for name, taken in spent.items()
    ]
    about = {"model": f"a random one of {layers} layers", "n": rounds, "requests": requests, "steps": steps}
    return {**about, "layers": layers, "kv_heads": heads, "rows": rows, "versions": _versions()}


def serve(
    bench: Bench,
    profiles: list[Path],
    requests: int = 12,
    rounds: int = 3,
    context: int = 1600,
    answers: list[int] | None = None,
    pool: int = 220,
    contenders: list[str] | None = None,
    plot_file: Path | None = None,
) -> dict[str, Any]:
    """Requests per second, and what a client waits for, at a fixed pool of keys and values.

    Servers of all contenders run at the same time and take turns: the same needles to all, all requests at once, by
    the streaming API. Their scores say what the budgets cost.

    Args:
        profiles: evolved for prompts of that length, each a contender by the name of its file. The equal budgets have
            the first one's selector and mean.
        requests: that come at once.
        rounds: turns of each server.
        context: tokens of a prompt.
        answers: lengths of answers (default: 32 256).
        pool: mebibytes for keys and values.
        contenders: some of plain, covering (a budget that covers every prompt), uniform and the profiles (default:
            all).
        plot_file: draw the result there (png or svg); plain must be among the contenders.
    """
    if plot_file is not None and (plot_file.suffix not in (".png", ".svg") or "plain" not in (contenders or ["plain"])):
        raise UsageError(f"--plot-file {plot_file}: expected .png or .svg, and plain among --contenders")
    evolved = {path.stem: BudgetProfile.load(path) for path in profiles}
    first = next(iter(evolved.values()))
    settings: dict[str, dict[str, Any] | None] = {
        "plain": None,
        "covering": {"method": "snapkv", "budget": 2 * context},
        "uniform": {"method": get_selector(first.selector).spec, "budget": int(first.mean_budget)},
        **{path.stem: {"profile": str(path)} for path in profiles},
    }
    model = _folder(bench.model)
    lengths = answers or [32, 256]
    options = ["--dtype", bench.dtype, "--block-size", str(BLOCK), "--max-num-seqs", str(2 * requests)]
    options += ["--kv-cache-memory-bytes", str(pool << 20), "--max-model-len", str(context + max(lengths) + BLOCK)]
    options += ["--no-enable-prefix-caching"]
    examples, prompts = _needles(model, context, requests * rounds)
    rows: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        servers = {}
        for name in contenders or settings:
            own = None if settings[name] is None else json.dumps({"evolkv": settings[name]})
            servers[name] = stack.enter_context(server.serve(model, Path(folder), name, own, options))
            # The first prompt warms up.
            servers[name].load(prompts[:1], 4)
        for turn in range(rounds):
            part = slice(turn * requests, (turn + 1) * requests)
            for tokens in lengths:
                for name, each in servers.items():
                    load = each.load(prompts[part], tokens)
                    found = [
                        get_metric("contains")(answer.text, example.references)
                        for answer, example in zip(load.answers, examples[part], strict=True)
                    ]
                    rows.setdefault((name, tokens), []).append({**load.facts(), "score": sum(found) / requests})
                    print(name, tokens, rows[name, tokens][-1], file=sys.stderr, flush=True)
        said = {name: each.line("EvolKV: ") for name, each in servers.items()}
    result = {
        "n": rounds,
        "requests": requests,
        "context": context,
        "pool_mebibytes": pool,
        "budgets": {name: profile.budgets.tolist() for name, profile in evolved.items() if name in servers},
        "settings": {name: settings[name] for name in servers if name not in evolved},
        "at_start": said,
        "rows": [
            {
                "contender": name,
                "answer": tokens,
                **{key: spread([each[key] for each in taken]) for key in taken[0]},
                **_over_plain(taken, rows.get(("plain", tokens))),
            }
            for (name, tokens), taken in rows.items()
        ],
        "versions": _versions(),
    }
    if plot_file is not None:
        draw(result, plot_file)
    return result


def heads(
    bench: Bench, requests: int = 16, tokens: int = 300, query_heads: int = 9, kv_heads: int = 3, rounds: int = 50
) -> dict[str, Any]:
    """Time a layer's attention in a step of decoding: one call for all KV heads, or one for each.

    Budgets by head would need pages of one KV head, and so a call for each.

    Args:
        requests: that run at once.
        tokens: that each has.
        query_heads: of the layer.
        kv_heads: of the layer.
        rounds: in which both ways take turns.
    """
    together = _attention(requests, tokens, query_heads, kv_heads)
    apart = _attention(requests, tokens, query_heads // kv_heads, 1)
    times: dict[str, list[float]] = {"one call": [], "a call for each head": []}
    for turn in range(rounds + 5):
        taken = (
            seconds(lambda: [together() for _ in range(20)], torch.device("cpu")) / 20,
            seconds(lambda: [apart() for _ in range(20 * kv_heads)], torch.device("cpu")) / 20,
        )
        if turn >= 5:
            for name, each in zip(times, taken, strict=True):
                times[name].append(1e6 * each)
    return {
        "n": rounds,
        "requests": requests,
        "tokens": tokens,
        "heads": [query_heads, kv_heads],
        "microseconds": {name: spread(each) for name, each in times.items()},
        "ratio_of_pairs": ratios(times["a call for each head"], times["one call"]),
        "versions": _versions(),
    }


def _attention(requests: int, tokens: int, query_heads: int, kv_heads: int, head_dim: int = 64) -> Callable[[], None]:
    """Return a call of vLLM's CPU kernel for one token of each request."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa, dtype, each = _get_attn_isa(torch.float32, BLOCK, head_dim), torch.float32, -(-tokens // BLOCK)
    cache = torch.randn(requests * each, kv_heads, 2 * BLOCK, head_dim)
    lengths = torch.full((requests,), tokens, dtype=torch.int32)
    starts = torch.arange(requests + 1, dtype=torch.int32)
    query = torch.randn(requests, query_heads, head_dim)
    plan = ops.cpu_attn_get_scheduler_metadata(
        requests, query_heads, kv_heads, head_dim, lengths, dtype, starts, True, -1, isa, True
    )
    settings = {
        "query": query,
        "output": torch.empty_like(query),
        "query_start_loc": starts,
        "seq_lens": lengths,
        "scale": head_dim**-0.5,
        "causal": True,
        "alibi_slopes": None,
        "sliding_window": -1,
        "block_table": torch.arange(requests * each, dtype=torch.int32).view(requests, each),
        "softcap": 0,
        "scheduler_metadata": plan,
        "s_aux": None,
    }
    key, value = cache.chunk(2, dim=2)
    return lambda: ops.cpu_attention_with_kv_cache(key_cache=key, value_cache=value, **settings)


def _over_plain(taken: list[dict[str, float]], plain: list[dict[str, float]] | None) -> dict[str, Any]:
    if plain is None:
        return {}
    return {
        f"{key}_over_plain": ratios([each[key] for each in taken], [each[key] for each in plain])
        for key in ("requests_per_second", "most_running")
    }


def _needles(model: str, context: int, number: int) -> tuple[list[Example], list[list[int]]]:
    """Return examples that no search has seen, and the token ids of their prompts."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = get_task(f"niah:context={context}").examples("report", number, tokenizer)
    return examples, [encode_prompt(tokenizer, example)[0].tolist() for example in examples]


def _random_model(layers: int, heads: int, folder: str) -> PreTrainedModel:
    """Write a small random model as FOLDER/model, and return it."""
    shape = {"hidden_size": 32 * heads, "intermediate_size": 64}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    config = LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=1000, max_position_embeddings=2048)
    model = LlamaForCausalLM(config)
    model.save_pretrained(f"{folder}/model")
    return model


def _folder(name: str) -> str:
    """Return the folder that vLLM loads a model from."""
    entry = ALIASES.get(name)
    return name if entry is None else str(gguf.converted(entry.paths(name), name, entry.sha256))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {**versions(), "vllm": version("vllm-cpu")}


if __name__ == "__main__":
    run(__doc__, serve, host, heads)
