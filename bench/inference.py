"""What inference costs: plain transformers against compressed caches, in paired runs, and against the machine's floor.

    python bench/inference.py --json FILE [--sections decode batch ...] [--model smollm2-135m] [--plot FILE.svg]
    python bench/inference.py --json FILE --device cuda --dtype bfloat16 --model random:llama-8b

Sections: `prefill` (seconds of a prompt), `decode` (milliseconds of a step after prompts of several lengths), `batch`
(tokens per second by batch size), `memory` (bytes of the cache, and the peak), `throughput` (how many sequences a fixed
cache memory holds, and their tokens per second), `kvpress` (its prefill and decode steps, in an environment of its own,
made on first use; on a CPU). Contenders take turns call by call, on the same token ids; medians, least and most.
docs/performance.md explains the method.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from common import count, counts, finish, machine, parser, ratios, run, seconds, spread
from contenders import PLAIN, Contender, PeakMemory, contenders, held
from kept_tokens import KVPRESS, kvpress_python
from peers import PRESSES, THEIRS, Side
from roofline import Floor
from shapes import load

SECTIONS = ("prefill", "decode", "batch", "memory", "throughput", "kvpress")
CONTEXTS = {"cpu": [512, 1024, 2048, 4096, 7900], "cuda": [512, 2048, 8192, 32768, 131072]}
BATCHES = {"cpu": [1, 2, 4, 8], "cuda": [1, 2, 4, 8, 16, 32, 64]}
#: The prompt after which plain transformers' step is what a compressed cache is held against.
SHORT = 128


class Bench:
    """The settings, and what the sections share."""

    def __init__(self, arguments: Any):
        self.arguments = arguments
        torch.manual_seed(arguments.seed)
        self.model = load(arguments.model, arguments.dtype, arguments.device)
        self.device = self.model.device
        config = self.model.config.get_text_config(decoder=True)
        self.kv_rows = config.num_hidden_layers * config.num_key_value_heads
        self.vocabulary = config.vocab_size
        self.contenders = contenders(self.model, arguments.budget, arguments.profile, arguments.seed)
        self.floor = Floor.of(self.model)
        self.contexts = arguments.contexts or CONTEXTS[self.device.type]

    def prompt(self, tokens: int) -> Tensor:
        """Random token ids ``[1, tokens]``: the same for the same length."""
        generator = torch.Generator().manual_seed(self.arguments.seed)
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
            found = self.steps(running, 1)
            for (contender, _), times, (size, entries) in zip(running, found, sizes, strict=True):
                floor = self.floor.decode(1, size, entries)
                row = _row(contender.name, times, found[0], floor, "milliseconds", 1000)
                row["over_plain_after_short_prompt"] = ratios(times, found[-1])
                rows.append({"context": tokens, **row, "kv_bytes": size})
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
        """How many sequences fit a fixed cache memory to the end of their answers, and what they yield together."""
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
            settings = {"model": str(folder / "model"), "dtype": self.arguments.dtype, "end": []}
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


def main() -> None:
    """Runs the sections asked for."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=SECTIONS[:-1], help="default: all but kvpress"
    )
    options.add_argument("--contexts", type=counts, help="prompt lengths, comma-separated; default: by device")
    options.add_argument("--batches", type=counts, help="batch sizes, comma-separated; default: by device")
    options.add_argument("--budget", type=count, default=128, help="mean cache entries per KV head")
    options.add_argument("--profile", help="evolved budgets for 'per head' instead of random ones")
    options.add_argument("--pairs", type=count, default=5, help="repetitions of each prompt")
    options.add_argument("--steps", type=count, default=24, help="decode steps of each contender")
    options.add_argument(
        "--prompt-tokens", type=count, default=2000, help="prompt of the sections batch and throughput"
    )
    options.add_argument("--answer", type=count, default=64, help="tokens that a sequence must have room for")
    options.add_argument("--memory-mib", type=float, default=64, help="cache memory of the section throughput")
    options.add_argument("--most-sequences", type=count, default=256)
    options.add_argument("--kvpress-env", type=Path, default=Path.home() / ".cache" / "evolkv" / "kvpress-env")
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw the section decode there (png or svg)")
    arguments = options.parse_args()
    if arguments.plot is not None and "decode" not in arguments.sections:
        options.error("--plot draws the section decode; add it to --sections")
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg"):
        options.error(f"--plot {arguments.plot}: expected a name that ends in .png or .svg")
    bench = Bench(arguments)
    result = {name: getattr(bench, name)() for name in arguments.sections}
    finish(
        {
            "benchmark": "inference",
            "machine": machine(bench.device),
            "peer": KVPRESS,
            "model": arguments.model,
            "dtype": arguments.dtype,
            "budget": arguments.budget,
            "pairs": arguments.pairs,
            "steps": arguments.steps,
            "prompt_tokens": arguments.prompt_tokens,
            "memory_mib": arguments.memory_mib,
            "floor": bench.floor.as_json(),
            **result,
        },
        arguments.json,
    )
    if arguments.plot is not None:
        plot(result["decode"], arguments.plot)


if __name__ == "__main__":
    run(main)
