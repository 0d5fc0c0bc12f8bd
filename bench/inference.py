"""The cost of inference on a compressed cache. `python bench/inference.py COMMAND --help` explains each command.

Contenders take turns call by call, on the same token ids; medians, least and most. docs/performance.md explains the
method.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

import evolkv
from evolkv.budgets import read_budget
from evolkv.cache.math import LogitTerms, attention
from evolkv.errors import UsageError
from evolkv.evaluation.decode import end_tokens, greedy
from evolkv.evaluation.scoring import text_score
from evolkv.methods import get_method
from evolkv.models import describe_model
from evolkv.models.forward import given_cache
from evolkv.tasks import encode_prompt, get_task
from lib import contenders as lib_contenders
from lib.command import Bench, run
from lib.common import ratios, seconds, spread
from lib.contenders import PLAIN, Contender, PeakMemory, PeakTensors, held
from lib.peer import KVPRESS, KVPRESS_ENV, PRESSES, THEIRS, Side, kvpress_python
from lib.roofline import Floor
from lib.shapes import load

CONTEXTS = {"cpu": [512, 1024, 2048, 4096, 7900], "cuda": [512, 2048, 8192, 32768, 131072]}
BATCHES = {"cpu": [1, 2, 4, 8], "cuda": [1, 2, 4, 8, 16, 32, 64]}
#: The prompt after which plain transformers' step is what a compressed cache is held against.
SHORT = 128
Section = Literal["prefill", "decode", "batch", "memory", "throughput", "kvpress"]


class Paired:
    """The contenders on one model, and the sections that they take turns in."""

    def __init__(self, bench: Bench, arguments: SimpleNamespace):
        self.bench, self.arguments = bench, arguments
        torch.manual_seed(bench.seed)
        self.model = load(bench.model, bench.dtype, bench.device)
        self.device = self.model.device
        config = self.model.config.get_text_config(decoder=True)
        self.kv_rows = config.num_hidden_layers * config.num_key_value_heads
        self.vocabulary = config.vocab_size
        every = lib_contenders.contenders(self.model, arguments.budget, arguments.profile, bench.seed)
        made = dict(zip(("plain", "layer", "head"), every, strict=True))
        self.contenders = [
            made.get(name) or lib_contenders.under_method(self.model, name, arguments.budget)
            for name in arguments.contenders
        ]
        self.floor = Floor.of(self.model)
        self.contexts = arguments.contexts or CONTEXTS[self.device.type]

    def prompt(self, tokens: int) -> Tensor:
        """Random token ids ``[1, tokens]``: the same for the same length."""
        generator = torch.Generator().manual_seed(self.bench.seed)
        return torch.randint(min(100, self.vocabulary // 2), self.vocabulary, (1, tokens), generator=generator).to(
            self.device
        )

    def filled(self, contender: Contender, tokens: int, batch: int = 1) -> Cache:
        """A cache that has seen a prompt, once for each sequence of a batch."""
        cache = contender.new_cache()
        with contender.running():
            contender.call(self.prompt(tokens), cache)
        if batch > 1:
            cache.batch_repeat_interleave(batch)
        return cache

    def steps(self, running: list[tuple[Contender, Cache]], batch: int) -> list[list[float]]:
        """Seconds of each decode step, by contender: they take turns step by step, after two steps of warming up."""
        token = self.prompt(1).expand(batch, -1)
        found: list[list[float]] = [[] for _ in running]
        for number in range(self.arguments.steps + 2):
            for (contender, cache), times in zip(running, found, strict=True):
                with contender.running():
                    taken = seconds(partial(contender.call, token, cache), self.device)
                if number >= 2:
                    times.append(taken)
        return found

    def prefill(self) -> list[dict[str, Any]]:
        """Seconds of a prompt."""
        rows = []
        for tokens in self.contexts:
            ids = self.prompt(tokens)
            found: list[list[float]] = [[] for _ in self.contenders]
            # The first round warms up.
            for number in range(self.arguments.pairs + 1):
                for contender, times in zip(self.contenders, found, strict=True):
                    cache = contender.new_cache()
                    with contender.running():
                        taken = seconds(partial(contender.call, ids, cache), self.device)
                    if number:
                        times.append(taken)
            floor = self.floor.prefill(tokens, self.kv_rows)
            for contender, times in zip(self.contenders, found, strict=True):
                rows.append({"context": tokens, **_row(contender.name, times, found[0], floor, "seconds", 1)})
            _say(f"prefill of {tokens} tokens")
        return rows

    def decode(self) -> list[dict[str, Any]]:
        """Milliseconds of a step after prompts of several lengths, beside plain transformers after a short one."""
        rows = []
        short = Contender(f"{PLAIN}, {SHORT} tokens", self.model)
        for tokens in self.contexts:
            running = [(contender, self.filled(contender, tokens)) for contender in self.contenders]
            running.append((short, self.filled(short, SHORT)))
            sizes = [held(cache) for _, cache in running]
            _say(f"read prompts of {tokens} tokens")
            found = self.steps(running, 1)
            for (contender, cache), times, (size, entries) in zip(running, found, sizes, strict=True):
                floor = self.floor.decode(1, size, entries)
                row = _row(contender.name, times, found[0], floor, "milliseconds", 1000)
                if self.contenders[0].profile is not None:
                    del row["over_plain"]
                row["over_plain_after_short_prompt"] = ratios(times, found[-1])
                row["kv_bytes"] = size
                if isinstance(cache, evolkv.CompressedCache) and cache.read_bytes < sum(cache.kv_bytes_by_sequence):
                    row["read_bytes"] = cache.read_bytes
                rows.append({"context": tokens, **row})
            _say(f"decoding after {tokens} tokens")
        return rows

    def batch(self) -> list[dict[str, Any]]:
        """Tokens per second by batch size, all sequences with the same prompt."""
        rows = []
        tokens = self.arguments.prompt_tokens
        for batch in self.arguments.batches or BATCHES[self.device.type]:
            running = [(contender, self.filled(contender, tokens, batch)) for contender in self.contenders]
            sizes = [held(cache) for _, cache in running]
            found = self.steps(running, batch)
            for (contender, _), times, (size, entries) in zip(running, found, sizes, strict=True):
                floor = self.floor.decode(batch, size, entries)
                row = _row(contender.name, times, found[0], floor, "milliseconds", 1000)
                row |= {"tokens_per_second": batch / statistics.median(times), "kv_bytes": size}
                rows.append({"batch": batch, **row})
            _say(f"batch of {batch}")
        return rows

    def memory(self) -> list[dict[str, Any]]:
        """Bytes of the cache after the prompt and after some steps, and the peak while they run."""
        rows = []
        # What the first call of all makes and keeps is nobody's.
        self.filled(self.contenders[0], min(self.contexts))
        for tokens in self.contexts:
            ids = self.prompt(tokens)
            for contender in self.contenders:
                cache = contender.new_cache()
                with contender.running():
                    with PeakMemory(self.device) as prefill:
                        contender.call(ids, cache)
                    after_prompt = held(cache)[0]
                    with PeakMemory(self.device) as decode:
                        for _ in range(self.arguments.steps):
                            contender.call(ids[:, :1], cache)
                rows.append(
                    {
                        "context": tokens,
                        "contender": contender.name,
                        "kv_bytes": after_prompt,
                        "kv_bytes_after_steps": held(cache)[0],
                        "prefill_peak_bytes": prefill.bytes,
                        "decode_peak_bytes": decode.bytes,
                    }
                )
            _say(f"memory of {tokens} tokens")
        return rows

    def throughput(self) -> list[dict[str, Any]]:
        """Return the sequences that fit a fixed cache memory to the end of their answers, and their yield."""
        rows = []
        tokens, answer = self.arguments.prompt_tokens, self.arguments.answer
        for contender in self.contenders:
            size, entries = held(self.filled(contender, tokens))
            at_end = size + answer * self.kv_rows * (size // entries)
            fitting = int(self.arguments.memory_mib * 2**20 // at_end)
            batch = min(fitting, self.arguments.most_sequences)
            row: dict[str, Any] = {"contender": contender.name, "bytes_at_end": at_end, "sequences_that_fit": fitting}
            if batch:
                cache = self.filled(contender, tokens, batch)
                floor = self.floor.decode(batch, *held(cache))
                (times,) = self.steps([(contender, cache)], batch)
                row |= {"sequences_run": batch, "step_milliseconds": spread([1000 * t for t in times])}
                row |= {"floor_milliseconds": 1000 * floor, "over_floor": statistics.median(times) / floor}
                row["tokens_per_second"] = batch / statistics.median(times)
            rows.append(row)
            _say(f"throughput of {contender.name}")
        return rows

    def kvpress(self) -> list[dict[str, Any]]:
        """kvpress's prefill and steps; it and plain transformers in its environment take turns prompt by prompt."""
        if self.device.type != "cpu":
            raise SystemExit("the section kvpress runs on a CPU only; leave it out of --sections")
        asked = {name: PRESSES[name][:2] for name in (PLAIN, "SnapKV")}
        rows = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.model.save_pretrained(folder / "model")
            settings = {"model": str(folder / "model"), "dtype": self.bench.dtype, "end": []}
            settings |= {"budget": self.arguments.budget, "steps": self.arguments.steps + 2}
            job = folder / "job.json"
            job.write_text(json.dumps(settings))
            side = Side(kvpress_python(self.arguments.kvpress_env), THEIRS, folder, "theirs", job)
            for tokens in self.contexts:
                ids = self.prompt(tokens)[0].tolist()
                found: dict[str, list[dict[str, Any]]] = {name: [] for name in asked}
                for number in range(self.arguments.pairs + 1):
                    for name, press in asked.items():
                        measured = side(ids, press)
                        if number:
                            found[name].append(measured)
                for name, runs in found.items():
                    row: dict[str, Any] = {"context": tokens, "contender": name, "kv_bytes": runs[0]["bytes"]}
                    for what, unit, factor in (("prefill", "seconds", 1), ("decode", "milliseconds", 1000)):
                        times = [run[what] for run in runs]
                        row[f"{what}_{unit}"] = spread([factor * t for t in times])
                        row[f"{what}_over_plain"] = ratios(times, [run[what] for run in found[PLAIN]])
                    rows.append(row)
                _say(f"kvpress with {tokens} tokens")
            side.close()
        return rows


def _row(name: str, times: list[float], plain: list[float], floor: float, unit: str, factor: float) -> dict[str, Any]:
    return {
        "contender": name,
        unit: spread([factor * t for t in times]),
        "over_plain": ratios(times, plain),
        f"floor_{unit}": factor * floor,
        "over_floor": statistics.median(times) / floor,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds of a decode step against the length of the prompt, with the floor of each as a dotted line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name in dict.fromkeys(row["contender"] for row in rows):
        mine = [row for row in rows if row["contender"] == name]
        contexts = [row["context"] for row in mine]
        (line,) = axes.plot(contexts, [row["milliseconds"]["median"] for row in mine], marker="o", label=name)
        least, most = ([row["milliseconds"][end] for row in mine] for end in ("min", "max"))
        axes.fill_between(contexts, least, most, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.plot(contexts, [row["floor_milliseconds"] for row in mine], color=line.get_color(), linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["context"] for row in rows], [f"{row['context']:,}" for row in rows])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="prompt tokens", ylabel="milliseconds per token (dotted: floor)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def paired(
    bench: Bench,
    sections: list[Section] = ["prefill", "decode", "batch", "memory", "throughput"],  # noqa: B006
    contexts: list[int] | None = None,
    batches: list[int] | None = None,
    budget: int = 128,
    profile: str | None = None,
    contenders: list[str] = ["plain", "layer", "head"],  # noqa: B006
    pairs: int = 5,
    steps: int = 24,
    prompt_tokens: int = 2000,
    answer: int = 64,
    memory_mib: float = 64,
    most_sequences: int = 256,
    kvpress_env: Path = KVPRESS_ENV,
    plot_file: Path | None = None,
) -> dict[str, Any]:
    """Measure plain transformers against compressed caches in paired runs, and against the machine's floor.

    Sections: `prefill` (seconds of a prompt), `decode` (milliseconds of a step after prompts of several lengths),
    `batch` (tokens per second by batch size), `memory` (bytes of the cache, and the peak), `throughput` (how many
    sequences a fixed cache memory holds, and their tokens per second), `kvpress` (its prefill and decode steps, in an
    environment of its own, made on first use; on a CPU). Models may have random weights: --model random:llama-8b.

    Args:
        sections: what to measure.
        contexts: prompt lengths; default: by device.
        batches: batch sizes; default: by device.
        budget: mean cache entries per KV head.
        profile: evolved budgets for "per head" instead of random ones.
        contenders: who takes part: plain, layer, head, or a selector with equal budgets, such as rocketkv; without
            "plain" only in the section decode.
        pairs: repetitions of each prompt.
        steps: decode steps of each contender.
        prompt_tokens: prompt of the sections batch and throughput.
        answer: tokens that a sequence must have room for.
        memory_mib: cache memory of the section throughput.
        most_sequences: sequences of the section throughput at most.
        kvpress_env: folder of kvpress's environment.
        plot_file: draw the section decode there (png or svg).
    """
    if plot_file is not None and ("decode" not in sections or plot_file.suffix not in (".png", ".svg")):
        raise UsageError(f"--plot-file {plot_file}: expected .png or .svg, and decode among --sections")
    if "plain" not in contenders and sections != ["decode"]:
        raise UsageError("--contenders without plain: expected --sections decode; the others compare with plain")
    settings = {name: value for name, value in locals().items() if name != "bench"}
    work = Paired(bench, SimpleNamespace(**settings))
    result: dict[str, Any] = {name: getattr(work, name)() for name in sections}
    if plot_file is not None:
        plot(result["decode"], plot_file)
    used = {name: settings[name] for name in ("budget", "steps", "prompt_tokens", "memory_mib", "answer")}
    counts = {f"{pairs} prompts": {"prefill", "kvpress"}, f"{steps} steps": {"decode", "batch", "throughput"}}
    n = ", ".join(count for count, those in (counts | {"1 run": {"memory"}}).items() if those & {*sections})
    return {"n": n, "peer": KVPRESS, **used, "floor": work.floor.as_json(), **result}


def selectors(
    bench: Bench,
    context: int = 4096,
    budget: str = "128",
    pairs: int = 7,
    names: list[str] = ["snapkv"],  # noqa: B006
) -> dict[str, Any]:
    """Time a prompt under compression against a plain one, in pairs, and weigh what scoring it holds.

    Scoring memory is the most that the tensors made while one layer is scored take, over the layer's keys and values.

    Args:
        context: tokens of the prompt.
        budget: cache entries per KV head, or a share of the prompt, such as 50%.
        pairs: paired runs of each selector; the prompt's memory is weighed in the first.
        names: selectors, with an allocator of layers or without: cosine+pyramidinfer.
    """
    model = load(bench.model, bench.dtype, bench.device)
    torch.manual_seed(bench.seed)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(min(100, vocabulary // 2), vocabulary, (1, context), device=model.device)
    result = {}
    for name in names:
        kind: Any = type(get_method(name).selector)
        score = kind.score
        memory: list[float] = []

        def weighed(self: Any, prompt: Any, score: Any = score, memory: list[float] = memory) -> Tensor:
            with PeakTensors() as peak:
                scores = score(self, prompt)
            memory.append(peak.bytes / (prompt.key.nbytes + prompt.value.nbytes))
            return scores

        def prefill() -> None:
            model(prompt, use_cache=True, logits_to_keep=1)

        kind.score = weighed
        with evolkv.compress(model, name, budget):
            prefill()
        kind.score = score
        plain, compressed = [], []
        for _ in range(pairs):
            plain.append(seconds(prefill, model.device))
            with evolkv.compress(model, name, budget):
                compressed.append(seconds(prefill, model.device))
        result[name] = {
            "scoring_memory_over_kv": max(memory),
            "plain_seconds": spread(plain),
            "compressed_seconds": spread(compressed),
            "ratio_of_pairs": ratios(compressed, plain),
        }
    return {"n": pairs, "context": context, "budget": read_budget(budget), "selectors": result}


def construction(bench: Bench, budget: int = 128, runs: int = 50) -> dict[str, Any]:
    """Time the making of a compressed cache on a model that is in use.

    Args:
        budget: cache entries per KV head.
        runs: caches made, after three to warm up.
    """
    model = load(bench.model, bench.dtype, bench.device)
    profile = evolkv.BudgetProfile.uniform(model, budget, selector="snapkv")
    made = [seconds(lambda: evolkv.CompressedCache(model, profile), model.device) for _ in range(runs + 3)]
    return {"n": runs, "budget": budget, "milliseconds": spread([1000 * taken for taken in made[3:]])}


KV_HEADS, FOLD, HEAD_DIM = 3, 3, 64
SCALE = HEAD_DIM**-0.5
TERMS = LogitTerms(SCALE)
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
            [attention(query[row : row + 1], key, value, None, TERMS) for row, (key, value) in enumerate(groups)]
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
        DENSE: lambda: attention(query, even_keys, even_values, None, TERMS),
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


def layer_step(bench: Bench, pairs: int = 200) -> dict[str, Any]:
    """Time one layer's part of a decode step, in the ways in which it could be done.

    For a layer of SmolLM2's shape (3 KV heads of 64, 3 query heads to each): appending a token to what is held, in
    place and by copying; attention with query heads folded into the query axis, by `enable_gqa`, and by two matrix
    products; and attention to rows of many lengths, group by group, in one grouped call, masked and padded. All ways to
    do one thing are checked against each other, then take turns; the figure is the CPU time of the thread.

    Args:
        pairs: turns that are timed.
    """
    dtype = getattr(torch, bench.dtype, None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"--dtype {bench.dtype} is none of float32, float16, bfloat16")
    # Thread time counts the work of this thread alone.
    torch.set_num_threads(1)
    torch.manual_seed(bench.seed)
    shapes = [(1, 33), (1, 128), (1, 512), (8, 128)]
    return {
        "n": pairs,
        "unit": "microseconds of thread time",
        "appending": {f"{s} x {n}": measured(appending(dtype, s, n), pairs) for s, n in shapes},
        "folding": {f"{s} x {n}": measured(folding(dtype, s, n), pairs) for s, n in shapes[1:]},
        "ragged": measured(ragged(dtype), pairs),
    }


#: Steps before any is timed: what compiles does so at the first, and again where a shape has changed.
WARM_UP = 6


def compiled_step(bench: Bench, prompt_tokens: int = 128, budget: int = 128, pairs: int = 60) -> dict[str, Any]:
    """Time decode steps of plain transformers and of a compressed cache, each as it is and under torch.compile.

    Plain transformers compiles as one graph, on a `StaticCache` (fixed shapes); beside it are its steps on that cache
    and on a `DynamicCache`, as they are. A compiled model leaves a `CompressedCache` to Python, so that the graph
    breaks in every layer. All take turns, step by step, after what compiles has compiled; the figure is the CPU time of
    the thread, beside the wall-clock seconds of the steps before.

    Args:
        prompt_tokens: tokens of the prompt.
        budget: mean cache entries per KV head.
        pairs: steps of each, in turn.
    """
    torch.manual_seed(bench.seed)
    # A model each: a compressed cache has its model's attention answer to it.
    model, other = (load(bench.model, bench.dtype, bench.device or "cpu") for _ in range(2))
    ids = torch.randint(3, model.config.get_text_config(decoder=True).vocab_size, (1, prompt_tokens))
    profile = evolkv.BudgetProfile.uniform(other, budget, selector="snapkv")
    room = prompt_tokens + pairs + WARM_UP
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

    def step(call: Callable[..., Any], cache: Cache, at: int) -> None:
        call(torch.full((1, 1), 7), position_ids=torch.full((1, 1), at), cache=cache)

    warm_up: dict[str, float] = {}
    for name, (call, cache) in ways.items():
        own = other if isinstance(cache, evolkv.CompressedCache) else model
        own(ids, cache=cache)
        started = time.perf_counter()
        for at in range(WARM_UP):
            step(call, cache, prompt_tokens + at)
        warm_up[name] = time.perf_counter() - started
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for pair in range(pairs):
        for name, (call, cache) in ways.items():
            thread = time.thread_time()
            step(call, cache, prompt_tokens + WARM_UP + pair)
            taken[name].append(1000 * (time.thread_time() - thread))
    plain = taken["plain, DynamicCache"]
    return {
        "n": pairs,
        "prompt_tokens": prompt_tokens,
        "budget": budget,
        "steps": {
            name: {"warm_up_seconds": warm_up[name], "milliseconds": spread(times), "over_plain": ratios(times, plain)}
            for name, times in taken.items()
        },
    }


class Peak:
    """The most entries that a head held, and the most bytes that all held."""

    def __init__(self, bytes_per_token: int):
        self.bytes_per_token = bytes_per_token
        self.entries = self.kv_bytes = 0

    def see(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each attention: what is held, and the tokens that come."""
        layers = given_cache(kwargs).layers
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        new = hidden.shape[1]
        held = max((group.keys.shape[1] for group in layers[module.layer_idx].groups), default=0)
        self.entries = max(self.entries, held + new)
        self.kv_bytes = max(self.kv_bytes, sum(layer.kv_bytes for layer in layers) + new * self.bytes_per_token)


@contextmanager
def watched(model: PreTrainedModel, peak: Peak) -> Iterator[None]:
    """Has `peak` see every attention of the model."""
    layers = model.get_decoder().layers
    handles = [layer.self_attn.register_forward_pre_hook(peak.see, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def chunks(
    bench: Bench,
    context: int = 1600,
    budget: int = 128,
    sizes: list[int] = [128, 512],  # noqa: B006
    samples: int = 20,
    names: list[str] = ["snapkv", "keydiff"],  # noqa: B006
    profile: str | None = None,
) -> dict[str, Any]:
    """Measure score, peak memory and time of prompts read in chunks, against prompts read at once.

    The peak is over layers and forward calls: what the layers hold, with the new tokens of the one that is at work.

    Args:
        context: tokens of a prompt.
        budget: mean cache entries per KV head.
        sizes: tokens of a chunk.
        samples: prompts.
        names: selectors.
        profile: a profile, beside the selectors; --budget expands it.
    """
    model, tokenizer = bench.load()
    info = describe_model(model)
    per_token = info.num_kv_heads * 2 * info.head_dim * model.dtype.itemsize
    examples = get_task(f"niah:context={context}").examples("report", samples, tokenizer, bench.seed)
    end = end_tokens(model, tokenizer)
    profiles = {name: evolkv.BudgetProfile.uniform(model, budget, selector=name) for name in names}
    if profile is not None:
        profiles["profile"] = evolkv.BudgetProfile.load(profile).expand(budget)
    # Budgets that cover every prompt: nothing is evicted, nor ranked.
    full = evolkv.BudgetProfile.uniform(model, info.max_context, selector="streaming_llm")
    runs: dict[str, Any] = {"full": (full, None)}
    for name, each in profiles.items():
        runs[f"{name} at once"] = (each, None)
        runs |= {f"{name} in chunks of {n}": (each, n) for n in sizes}

    rows = {}
    for name, (each, chunk) in runs.items():
        scores, times, peak = [], [], Peak(per_token)
        for example in examples:
            ids = encode_prompt(tokenizer, example).to(model.device)

            def prefill(cache: Any, ids: Tensor = ids) -> Any:
                return model(ids, cache=cache, use_cache=True, logits_to_keep=1)

            # Timed without anybody watching.
            timed = evolkv.CompressedCache(model, each, prefill_chunk=chunk)
            times.append(seconds(partial(prefill, timed), model.device))
            cache = evolkv.CompressedCache(model, each, prefill_chunk=chunk)
            with watched(model, peak):
                output = prefill(cache)
            answer = greedy(model, cache, output.logits[:, -1], [ids.shape[1]], [example.max_new_tokens], end)[0]
            scores.append(text_score(example.metric, tokenizer.decode(answer, skip_special_tokens=True), example))
        rows[name] = {
            "score": statistics.mean(scores),
            "peak_entries_per_head": peak.entries,
            "peak_kv_bytes": peak.kv_bytes,
            "prefill_seconds": spread(times),
        }
    return {"n": samples, "context": context, "budget": budget, "rows": rows}


if __name__ == "__main__":
    run(__doc__, paired, selectors, construction, layer_step, compiled_step, chunks)
