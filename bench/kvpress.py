"""kvpress and EvolKV side by side. `python bench/kvpress.py COMMAND --help` explains each command.

Both have the same weights and token ids; kvpress runs in an environment of its own, which is made on first use.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import evolkv
from evolkv.allocators import complete
from evolkv.integrations.kvpress import press_source
from evolkv.intervals import ci95
from evolkv.models import describe_model
from evolkv.tasks import encode_prompt, get_task
from evolkv.tasks.metrics import get_metric
from lib.command import Bench, run
from lib.peer import KVPRESS, KVPRESS_ENV, OURS, PRESSES, THEIRS, Side, kvpress_python

#: Our selector, and the press that means the same. kvpress has mean pooling only.
PAIRS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
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
    "kvzip": ({"name": "kvzip", "chunk": 2048}, "KVzipPress", {"n_sink": 4}),
}

# Runs under the other environment's Python: records the indices that each press keeps.
KEPT = """
import json, sys
import torch, kvpress
from transformers import AutoModelForCausalLM, DynamicCache
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
def recording_repetition(press, layers):
    prepare = press.prepare
    def whole(*args):
        # What the chat template puts before a message is repeated too; left to itself the press evicts it first.
        press.prefix_length = 0
        return prepare(*args)
    def record(model):
        # What the press means to keep; where a context begins at the first token its first chunk overwrites that.
        press.score_val[..., : press.n_sink] = 1
        for i, scores in enumerate(press.score_val):
            count = int(scores.shape[-1] * (1 - ratio))
            layers[i] = scores.topk(count, dim=-1).indices[0].sort(-1).values.tolist()
    press.prepare, press.compress_post = whole, record
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
        (recording_scores if hasattr(press, "score") else recording_repetition)(press, layers)
    with press(model):
        model(ids, past_key_values=DynamicCache(), use_cache=True)
    kept[name] = [layers[i] for i in range(len(layers))]
json.dump(kept, open(sys.argv[2], "w"))
"""

# Runs under the other environment's Python, beside the exported files: what each press keeps, and how the text goes on.
EXPORTED = """
import importlib, json, sys
import torch
from transformers import AutoModelForCausalLM, DynamicCache
job = json.load(open(sys.argv[1]))
sys.path.insert(0, job["folder"])
torch.set_grad_enabled(False)
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
ids = torch.tensor([job["ids"]])
found = {}
for name in job["names"]:
    press = importlib.import_module(name).press
    cache, kept = DynamicCache(), []
    compress = press.compress
    def record(module, hidden_states, keys, values, *rest):
        module.masked_key_indices = None
        result = compress(module, hidden_states, keys, values, *rest)
        # Which of the keys these were: they know their position, so no two are the same. What is masked is left out.
        held = (result[0][0, :, :, None] == keys[0, :, None]).all(-1).int().argmax(-1)
        hidden = torch.zeros_like(held, dtype=torch.bool)
        if module.masked_key_indices is not None:
            hidden[module.masked_key_indices[1:]] = True
        kept.append([row[~gone].tolist() for row, gone in zip(held, hidden)])
        return result
    press.compress = record
    with press(model):
        logits = model(ids, past_key_values=cache).logits[:, -1]
    held = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers)
    answer = []
    for step in range(12):
        token = logits.argmax(-1)
        answer.append(int(token))
        at = torch.tensor([[ids.shape[1] + step]])
        logits = model(token[None], past_key_values=cache, position_ids=at).logits[:, -1]
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    found[name] = {"kept": kept, "held": held, "answer": answer}
json.dump(found, open(sys.argv[2], "w"))
"""
#: Selectors that can be exported.
SELECTORS = ("snapkv", "tova", "streaming_llm", "knorm", "keydiff", "expected_attention")


def under_kvpress(
    python: Path, worker: str, model: Any, tokenizer: Any, job: dict[str, Any], files: dict[str, str]
) -> dict[str, Any]:
    """Run a worker under the other environment's Python, beside some files; return what it says."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        for file, text in {**files, "worker.py": worker}.items():
            (folder / file).write_text(text)
        (folder / "job.json").write_text(json.dumps({"model": str(folder / "model"), "folder": name, **job}))
        out = folder / "result.json"
        subprocess.run([kvpress_python(python), folder / "worker.py", folder / "job.json", out], check=True)
        return json.loads(out.read_text())


def needle(bench: Bench, context: int) -> tuple[Any, Any, torch.Tensor]:
    """Return the model, in float32, its tokenizer, and the token ids of one prompt."""
    model, tokenizer = evolkv.load_model(bench.model, dtype="float32", device="cpu")
    example = get_task(f"niah:context={context}").examples("train", 1, tokenizer, bench.seed)[0]
    return model, tokenizer, encode_prompt(tokenizer, example)


def overlaps(cache: evolkv.CompressedCache, theirs: list[list[list[int]]]) -> list[float]:
    """Jaccard index of the positions that each head keeps here and there, over all layers and heads."""
    pairs = [pair for layer in zip(cache.positions, theirs, strict=True) for pair in zip(*layer, strict=True)]
    return [len({*ours.tolist()} & {*kept}) / len({*ours.tolist()} | {*kept}) for ours, kept in pairs]


def kept_tokens(bench: Bench, context: int = 800, budget: int = 128, kvpress_env: Path = KVPRESS_ENV) -> dict[str, Any]:
    """Compare the tokens that our selectors and kvpress's presses keep: Jaccard index over layers and heads.

    Args:
        context: tokens of the prompt.
        budget: cache entries per KV head.
        kvpress_env: folder of kvpress's environment.
    """
    model, tokenizer, ids = needle(bench, context)
    presses = {name: (press, arguments) for name, (_, press, arguments) in PAIRS.items()}
    job = {"ids": ids[0].tolist(), "budget": budget, "presses": presses}
    theirs = under_kvpress(kvpress_env, KEPT, model, tokenizer, job, {})
    rows = {}
    for name, (selector, press, _) in PAIRS.items():
        # Whole chunks need not come to the budget.
        profile = evolkv.BudgetProfile.uniform(model, len(theirs[name][0][0]), selector=selector)
        cache = evolkv.CompressedCache(model, profile)
        model(ids, cache=cache, logits_to_keep=1)
        indices = overlaps(cache, theirs[name])
        mean = statistics.mean(indices)
        rows[name] = {"press": press, "budget": profile.budget, "jaccard_mean": mean, "jaccard_min": min(indices)}
        cache.release()
    return {"n": 1, "peer": KVPRESS, "tokens": ids.shape[1], "budget": budget, "selectors": rows}


def profiles(model: Any, budget: int, seed: int) -> dict[str, evolkv.BudgetProfile]:
    """Profiles to export: each selector with uneven budgets by layer, and by head."""
    info = describe_model(model)
    random = np.random.default_rng(seed)
    made = {}
    for selector in SELECTORS:
        for granularity, shape in (("layer", (info.num_layers,)), ("head", (info.num_layers, info.num_kv_heads))):
            budgets = complete(random.lognormal(0, 0.4, shape) * budget, budget * int(np.prod(shape)), 33, 4 * budget)
            made[f"{selector}_{granularity}"] = evolkv.BudgetProfile.from_budgets(model, budgets, selector)
    return made


def export(bench: Bench, context: int = 800, budget: int = 64, kvpress_env: Path = KVPRESS_ENV) -> dict[str, Any]:
    """Check that an exported profile keeps under kvpress what it keeps here: tokens per head, which, and the answer.

    For each selector that can be exported, with budgets that differ by layer and by head; answers are greedy, twelve
    tokens.

    Args:
        context: tokens of the prompt.
        budget: mean cache entries per KV head.
        kvpress_env: folder of kvpress's environment.
    """
    model, tokenizer, ids = needle(bench, context)
    exported = profiles(model, budget, bench.seed)
    files = {f"{name}.py": press_source(profile, name) for name, profile in exported.items()}
    job = {"ids": ids[0].tolist(), "names": list(exported)}
    theirs = under_kvpress(kvpress_env, EXPORTED, model, tokenizer, job, files)
    rows = {}
    for each, profile in exported.items():
        cache = evolkv.CompressedCache(model, profile)
        # Without a mask, and without an end token, generate() would take the template's <|im_end|> for padding.
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        every = torch.ones_like(ids)
        answer = model.generate(ids, cache=cache, **settings, attention_mask=every)[0, ids.shape[1] :].tolist()
        kept = theirs[each]["kept"]
        indices = overlaps(cache, kept)
        rows[each] = {
            "same_counts": [list(map(len, layer)) for layer in cache.positions] == [list(map(len, x)) for x in kept],
            "jaccard_mean": statistics.mean(indices),
            "jaccard_min": min(indices),
            "same_answer": answer == theirs[each]["answer"],
            "entries": profile.total,
            "entries_held_by_kvpress": theirs[each]["held"],
        }
        cache.release()
    return {"n": 1, "peer": KVPRESS, "tokens": ids.shape[1], "budget": budget, "profiles": rows}


def methods(
    bench: Bench,
    task: str = "niah:context=1600",
    budget: int = 128,
    samples: int = 32,
    steps: int = 12,
    profile: list[str] = [],  # noqa: B006
    kvpress_env: Path = KVPRESS_ENV,
) -> dict[str, Any]:
    """Score and time the methods that both have, on the same prompts at the same budget.

    Both prefill each prompt under each method and decode greedily. Plain transformers runs in both environments:
    seconds over those of plain transformers compare within one. Bytes are those of all tensors that the cache keeps
    alive after the prompt. The two processes take turns; neither computes while the other does.

    Args:
        task: spec of the task.
        budget: mean cache entries per KV head.
        samples: prompts.
        steps: tokens decoded for every prompt.
        profile: evolved budgets, as more methods of ours.
        kvpress_env: folder of kvpress's environment.
    """
    model, tokenizer = evolkv.load_model(bench.model, dtype=bench.dtype, device="cpu")
    examples = get_task(task).examples("report", samples, tokenizer, bench.seed)
    prompts = [encode_prompt(tokenizer, example)[0].tolist() for example in examples]
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    asked: dict[str, dict[str, Any]] = {
        name: {"kvpress": (press, settings), "evolkv": ours} for name, (press, settings, ours) in PRESSES.items()
    }
    for path in profile:
        selector = evolkv.BudgetProfile.load(path).selector["name"]
        asked[f"evolved under {selector}"] = {"evolkv": str(Path(path).resolve())}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        end = model.generation_config.eos_token_id
        job = folder / "job.json"
        settings = {"model": str(folder / "model"), "dtype": bench.dtype, "budget": budget, "steps": steps}
        job.write_text(json.dumps({**settings, "end": end if isinstance(end, list) else [end]}))
        sides = {
            "kvpress": Side(kvpress_python(kvpress_env), THEIRS, folder, "theirs", job),
            "evolkv": Side(Path(sys.executable), OURS, folder, "ours", job),
        }
        # The first round warms up.
        for number, ids in enumerate([prompts[0], *prompts]):
            for method, by_side in asked.items():
                for side, request in by_side.items():
                    if request is not None and (measured := sides[side](ids, request)) and number:
                        results.setdefault((method, side), []).append(measured)
            print(f"{number} of {len(prompts)} prompts", file=sys.stderr, flush=True)
        for each in sides.values():
            each.close()
    rows = []
    for (method, side), runs in results.items():
        scores = [
            get_metric(example.metric)(
                tokenizer.decode(each["answer"], skip_special_tokens=True), list(example.references), **example.extra
            )
            for example, each in zip(examples, runs, strict=True)
        ]
        plain = results["plain transformers", side]
        row = {
            "method": method,
            "library": side,
            "score": statistics.mean(scores),
            "ci95": list(ci95(np.array(scores))),
        }
        row["kv_bytes"] = statistics.mean(each["bytes"] for each in runs)
        for what in ("prefill", "decode"):
            row[f"{what}_seconds"] = statistics.median(each[what] for each in runs)
            over = [each[what] / base[what] for each, base in zip(runs, plain, strict=True)]
            row[f"{what}_over_plain"] = statistics.median(over)
        rows.append(row)
    tokens = statistics.mean(map(len, prompts))
    return {"n": len(prompts), "peer": KVPRESS, "task": task, "tokens": tokens, "budget": budget, "rows": rows}


if __name__ == "__main__":
    run(__doc__, kept_tokens, export, methods)
