"""Whether our selectors keep the same tokens as kvpress: Jaccard index over layers and heads.

    python bench/kept_tokens.py --json FILE [--context 800] [--budget 128] [--kvpress-env DIR]

kvpress needs an older transformers, so it runs in an environment of its own, which is made in DIR (default: a folder in
the user's cache) on first use. Both see the same weights and the same token ids.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import evolkv
from common import count, finish, machine, parser, run
from evolkv.tasks import encode_prompt, get_task

KVPRESS = "kvpress==0.5.5"
#: Our selector, and the press that means the same. kvpress has mean pooling only.
PAIRS = {
    "snapkv": (
        {"name": "snapkv", "window": 32, "kernel": 5, "pooling": "mean"},
        "SnapKVPress",
        {"window_size": 32, "kernel_size": 5},
    ),
    "knorm": ({"name": "knorm"}, "KnormPress", {}),
    "tova": ({"name": "tova"}, "TOVAPress", {}),
    "streaming_llm": ({"name": "streaming_llm", "sinks": 4}, "StreamingLLMPress", {"n_sink": 4}),
    "keydiff": ({"name": "keydiff"}, "KeyDiffPress", {}),
    "expected_attention": ({"name": "expected_attention"}, "ExpectedAttentionPress", {}),
    # There without reuse of indices, and with another chunk size by default.
    "chunkkv": (
        {"name": "chunkkv", "chunk": 10, "window": 32, "kernel": 5, "reuse": 1},
        "ChunkKVPress",
        {"chunk_length": 10, "press": ["SnapKVPress", {"window_size": 32, "kernel_size": 5}]},
    ),
}

# Runs under the other environment's Python: records the indices that each press keeps.
WORKER = """
import json, sys
import torch, kvpress
from transformers import AutoModelForCausalLM
job = json.load(open(sys.argv[1]))
torch.set_grad_enabled(False)
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
ids = torch.tensor([job["ids"]])
kept = {}
def recording_scores(press, layers):
    score = press.score
    def record(module, *args, **kwargs):
        scores = score(module, *args, **kwargs)
        count = int(scores.shape[-1] * (1 - ratio))
        layers[module.layer_idx] = scores.topk(count, dim=-1).indices[0].sort(-1).values.tolist()
        return scores
    press.score = record
def recording_chunks(press, layers):
    compress = press.compress
    def record(module, hidden_states, keys, values, *rest):
        # What is kept of values that are their own positions.
        positions = torch.arange(keys.shape[2], dtype=values.dtype)[None, None, :, None].expand_as(values)
        kept = compress(module, hidden_states, keys, positions, *rest)[1]
        layers[module.layer_idx] = kept[0, ..., 0].long().tolist()
        return compress(module, hidden_states, keys, values, *rest)
    press.compress = record
for name, (press_name, arguments) in job["presses"].items():
    ratio = 1 - (job["budget"] + 0.5) / ids.shape[1]
    layers = {}
    if "press" in arguments:
        inner, settings = arguments.pop("press")
        scorer = getattr(kvpress, inner)(compression_ratio=ratio, **settings)
        press = getattr(kvpress, press_name)(press=scorer, **arguments)
        recording_chunks(press, layers)
    else:
        press = getattr(kvpress, press_name)(compression_ratio=ratio, **arguments)
        recording_scores(press, layers)
    with press(model):
        model(ids, use_cache=True)
    kept[name] = [layers[i] for i in range(len(layers))]
json.dump(kept, open(sys.argv[2], "w"))
"""


def kvpress_python(folder: Path) -> Path:
    """The Python of an environment with kvpress in it."""
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # torch first, at our own version: left to itself the installer would fetch the newest, CUDA and all.
        version = torch.__version__.partition("+")[0]
        subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={version}"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", KVPRESS, "transformers<5.3"], check=True)
        done.touch()
    return python


def kept_by_kvpress(python: Path, model: Any, ids: list[int], budget: int) -> dict[str, list[list[list[int]]]]:
    """Positions kept by each press, by layer and head."""
    with tempfile.TemporaryDirectory() as folder:
        weights, job, out = Path(folder, "model"), Path(folder, "job.json"), Path(folder, "kept.json")
        model.save_pretrained(weights)
        presses = {name: (press, arguments) for name, (_, press, arguments) in PAIRS.items()}
        job.write_text(json.dumps({"model": str(weights), "ids": ids, "budget": budget, "presses": presses}))
        Path(folder, "worker.py").write_text(WORKER)
        subprocess.run([python, Path(folder, "worker.py"), job, out], check=True)
        return json.loads(out.read_text())


def overlaps(cache: evolkv.CompressedCache, theirs: list[list[list[int]]]) -> list[float]:
    """Jaccard index of the positions that each head keeps here and there, over all layers and heads."""
    pairs = [pair for layer in zip(cache.positions, theirs, strict=True) for pair in zip(*layer, strict=True)]
    return [len({*ours.tolist()} & {*kept}) / len({*ours.tolist()} | {*kept}) for ours, kept in pairs]


def main() -> None:
    """Runs the comparison."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--context", type=count, default=800)
    options.add_argument("--budget", type=count, default=128)
    options.add_argument("--kvpress-env", type=Path, default=Path.home() / ".cache" / "evolkv" / "kvpress-env")
    arguments = options.parse_args()
    model, tokenizer = evolkv.load_model(arguments.model, dtype="float32", device="cpu")
    example = get_task(f"niah:context={arguments.context}").examples("train", 1, tokenizer, arguments.seed)[0]
    ids = encode_prompt(tokenizer, example)
    theirs = kept_by_kvpress(kvpress_python(arguments.kvpress_env), model, ids[0].tolist(), arguments.budget)
    rows = {}
    for name, (selector, press, _) in PAIRS.items():
        # Whole chunks need not come to the budget.
        budget = len(theirs[name][0][0])
        profile = evolkv.BudgetProfile.uniform(model, budget, selector=selector)
        cache = evolkv.CompressedCache(model, profile)
        with torch.inference_mode():
            model(ids, **cache.as_argument, logits_to_keep=1)
        indices = overlaps(cache, theirs[name])
        rows[name] = {
            "press": press,
            "budget": budget,
            "jaccard_mean": sum(indices) / len(indices),
            "jaccard_min": min(indices),
        }
        cache.release()
    finish(
        {
            "benchmark": "kept_tokens",
            "machine": machine(model.device),
            "peer": KVPRESS,
            "model": arguments.model,
            "tokens": ids.shape[1],
            "budget": arguments.budget,
            "selectors": rows,
        },
        arguments.json,
    )


if __name__ == "__main__":
    run(main)
