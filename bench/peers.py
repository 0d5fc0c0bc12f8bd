"""kvpress and EvolKV side by side: the same prompts at the same budget.

    python bench/peers.py --json FILE [--task niah:context=1600] [--budget 128] [--samples 32] [--profile FILE ...]

Both are given the same weights, token ids and budget, prefill each prompt under each method, and decode greedily.
kvpress needs an older transformers, so it runs in an environment of its own (made on first use), and plain transformers
runs in both environments: seconds over those of plain transformers compare within one. Bytes are those of all tensors
that the cache keeps alive after the prompt. The two processes take turns; neither computes while the other does.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import evolkv
from common import count, finish, machine, parser, run
from evolkv.evaluation.intervals import ci95
from evolkv.tasks import encode_prompt, get_task
from evolkv.tasks.metrics import get_metric
from kept_tokens import KVPRESS, kvpress_python

#: What both have; the presses' arguments, and ours.
PRESSES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "plain transformers": ("", {}, ""),
    "SnapKV": ("SnapKVPress", {"window_size": 32, "kernel_size": 5}, "snapkv:kernel=5,pooling=mean"),
    "PyramidKV": ("PyramidKVPress", {"window_size": 32, "kernel_size": 5}, "pyramid+snapkv:kernel=5,pooling=mean"),
    "TOVA": ("TOVAPress", {}, "tova"),
    "StreamingLLM": ("StreamingLLMPress", {"n_sink": 4}, "streaming_llm"),
    "key norm": ("KnormPress", {}, "knorm"),
    "KeyDiff": ("KeyDiffPress", {}, "keydiff"),
    "ExpectedAttention": ("ExpectedAttentionPress", {}, "expected_attention"),
    "ChunkKV": ("ChunkKVPress", {"chunk_length": 10, "press": ["SnapKVPress", {"window_size": 32}]}, "chunkkv"),
    "Ada-KV": ("AdaKVPress", {"press": ["SnapKVPress", {"window_size": 32}]}, "adakv+snapkv:kernel=5,pooling=mean"),
    "KVzip": ("KVzipPress", {}, None),
}

# One side: reads a line (a prompt and a method), prefills, decodes, writes a line. Runs under either environment.
SIDE = """
import contextlib, inspect, json, sys, time
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

torch.set_grad_enabled(False)
disable_progress_bar()

def held(cache):
    storages = {}
    for layer in cache.layers:
        for part in parts(layer):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(storages.values())

def measure(model, ids, open_cache, steps, end):
    keyword = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    with open_cache() as cache:
        start = time.perf_counter()
        with cache.during_prompt:
            logits = model(ids, **{keyword: cache.cache}, use_cache=True, logits_to_keep=1).logits[:, -1]
        prefill = time.perf_counter() - start
        size = held(cache.cache)
        answer, seconds, ended = [], [], False
        for step in range(steps):
            token = logits.argmax(-1)
            ended = ended or int(token) in end
            if not ended:
                answer.append(int(token))
            start = time.perf_counter()
            at = torch.tensor([[ids.shape[1] + step]])
            logits = model(token[None], **{keyword: cache.cache}, use_cache=True, position_ids=at).logits[:, -1]
            seconds.append(time.perf_counter() - start)
    return {"prefill": prefill, "decode": sorted(seconds)[len(seconds) // 2], "bytes": size, "answer": answer}

class Opened:
    def __init__(self, cache, during_prompt=None):
        self.cache = cache
        self.during_prompt = during_prompt or contextlib.nullcontext()
"""
THEIRS = """
import kvpress

job = json.load(open(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()

def parts(layer):
    return [layer.keys, layer.values]

def press_of(name, arguments, ratio):
    arguments = dict(arguments)
    if "press" in arguments:
        inner, settings = arguments.pop("press")
        return getattr(kvpress, name)(press=getattr(kvpress, inner)(compression_ratio=ratio, **settings), **arguments)
    return getattr(kvpress, name)(compression_ratio=ratio, **arguments)

print("ready", flush=True)
for line in sys.stdin:
    ids, (name, arguments) = json.loads(line)
    ids = torch.tensor([ids])
    # Half an entry more than the budget, so that rounding down meets it.
    press = press_of(name, arguments, 1 - (job["budget"] + 0.5) / ids.shape[1]) if name else None

    @contextlib.contextmanager
    def open_cache():
        yield Opened(DynamicCache(), press(model) if press else None)

    print(json.dumps(measure(model, ids, open_cache, job["steps"], job["end"])), flush=True)
"""
OURS = """
import evolkv

job = json.load(open(sys.argv[1]))
model, _ = evolkv.load_model(job["model"], dtype=job["dtype"], device="cpu")

def parts(layer):
    if hasattr(layer, "groups"):
        return [tensor for group in layer.groups for tensor in (group.keys, group.values)]
    return [layer.keys, layer.values]

print("ready", flush=True)
for line in sys.stdin:
    ids, name = json.loads(line)
    ids = torch.tensor([ids])

    @contextlib.contextmanager
    def open_cache():
        if not name:
            yield Opened(DynamicCache(config=model.config))
            return
        cache = evolkv.CompressedCache(model, name, job["budget"])
        yield Opened(cache)
        cache.release()

    print(json.dumps(measure(model, ids, open_cache, job["steps"], job["end"])), flush=True)
"""


class Side:
    """One of the two processes."""

    def __init__(self, python: Path, script: str, folder: Path, name: str, job: Path):
        path = folder / f"{name}.py"
        path.write_text(SIDE + script)
        self._process = subprocess.Popen(
            [python, path, job], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._expect("ready")

    def __call__(self, ids: list[int], method: Any) -> dict[str, Any]:
        """Measures one method on one prompt."""
        assert self._process.stdin is not None
        print(json.dumps([ids, method]), file=self._process.stdin, flush=True)
        return json.loads(self._line())

    def _expect(self, text: str) -> None:
        while self._line().strip() != text:
            pass

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended early, with exit code {self._process.wait()}; see its messages above")
        return line

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Runs the comparison."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--task", default="niah:context=1600")
    options.add_argument("--budget", type=count, default=128)
    options.add_argument("--samples", type=count, default=32)
    options.add_argument("--steps", type=count, default=12, help="tokens decoded for every prompt")
    options.add_argument("--profile", nargs="+", default=[], help="evolved budgets, as more methods of ours")
    options.add_argument("--kvpress-env", type=Path, default=Path.home() / ".cache" / "evolkv" / "kvpress-env")
    options.set_defaults(dtype="bfloat16")
    arguments = options.parse_args()
    model, tokenizer = evolkv.load_model(arguments.model, dtype=arguments.dtype, device="cpu")
    examples = get_task(arguments.task).examples("report", arguments.samples, tokenizer, arguments.seed)
    prompts = [encode_prompt(tokenizer, example)[0].tolist() for example in examples]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        job = folder / "job.json"
        end = model.generation_config.eos_token_id
        settings = {"model": str(folder / "model"), "dtype": arguments.dtype, "budget": arguments.budget}
        settings |= {"steps": arguments.steps, "end": end if isinstance(end, list) else [end]}
        job.write_text(json.dumps(settings))
        sides = {
            "kvpress": Side(kvpress_python(arguments.kvpress_env), THEIRS, folder, "theirs", job),
            "evolkv": Side(Path(sys.executable), OURS, folder, "ours", job),
        }
        methods: dict[str, dict[str, Any]] = {
            name: {"kvpress": (press, given), "evolkv": ours} for name, (press, given, ours) in PRESSES.items()
        }
        for path in arguments.profile:
            ranking = evolkv.BudgetProfile.load(path).selector["name"]
            methods[f"evolved under {ranking}"] = {"evolkv": str(Path(path).resolve())}
        for number, ids in enumerate([prompts[0], *prompts]):
            for method, given in methods.items():
                for side, asked in given.items():
                    if asked is None:
                        continue
                    measured = sides[side](ids, asked)
                    # The first round warms up.
                    if number:
                        found.setdefault((method, side), []).append(measured)
            print(f"{number} of {len(prompts)} prompts", file=sys.stderr, flush=True)
        for each in sides.values():
            each.close()
    rows = []
    for (method, side), measured in found.items():
        scores = [
            get_metric(example.metric)(
                tokenizer.decode(m["answer"], skip_special_tokens=True), list(example.references), **example.extra
            )
            for example, m in zip(examples, measured, strict=True)
        ]
        plain = found["plain transformers", side]
        rows.append(
            {
                "method": method,
                "library": side,
                "score": statistics.mean(scores),
                "ci95": list(ci95(scores)),
                "kv_bytes": statistics.mean(m["bytes"] for m in measured),
                **{f"{what}_seconds": statistics.median(m[what] for m in measured) for what in ("prefill", "decode")},
                **{
                    f"{what}_over_plain": statistics.median(
                        m[what] / p[what] for m, p in zip(measured, plain, strict=True)
                    )
                    for what in ("prefill", "decode")
                },
            }
        )
    finish(
        {
            "benchmark": "peers",
            "machine": machine(model.device),
            "peer": KVPRESS,
            "model": arguments.model,
            "dtype": arguments.dtype,
            "task": arguments.task,
            "tokens": statistics.mean(map(len, prompts)),
            "budget": arguments.budget,
            "n": len(prompts),
            "rows": rows,
        },
        arguments.json,
    )
    print(_table(rows))


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | library | score (95 % interval) | KV MiB | prefill s | over plain | decode ms | over plain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = row["ci95"]
        lines.append(
            f"| {row['method']} | {row['library']} | {row['score']:.2f} ({low:.2f}–{high:.2f}) "
            f"| {row['kv_bytes'] / 2**20:.2f} | {row['prefill_seconds']:.3f} | {row['prefill_over_plain']:.2f} "
            f"| {1000 * row['decode_seconds']:.1f} | {row['decode_over_plain']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
