"""kvpress, the peer: it needs an older transformers, so it runs in an environment and a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

KVPRESS = "kvpress==0.5.5"
KVPRESS_ENV = Path.home() / ".cache" / "evolkv" / "kvpress-env"

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
    "KVzip": ("KVzipPress", {}, "dynamickv+adakv:safeguard=0+kvzip:chunk=2048"),
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


def kvpress_python(folder: Path) -> Path:
    """Return the Python of an environment with kvpress in it, which is made on first use."""
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # torch first, at our own version: left to itself the installer would fetch the newest, CUDA and all.
        ours = version("torch").partition("+")[0]
        subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={ours}"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", KVPRESS, "transformers<5.3"], check=True)
        done.touch()
    return python
