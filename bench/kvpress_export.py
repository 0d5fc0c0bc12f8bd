"""Whether an exported profile keeps under kvpress what it keeps under EvolKV: tokens per head, and which.

    python bench/kvpress_export.py --json FILE [--context 800] [--budget 64] [--kvpress-env DIR]

For each selector that can be exported, with budgets that differ by layer and by head. Both sides see the same weights
and token ids; the answers are greedy, twelve tokens, after the same prompt.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import evolkv
from common import count, finish, machine, parser, run
from evolkv.allocators import complete
from evolkv.integrations.kvpress import press_source
from evolkv.tasks import encode_prompt, get_task
from kept_tokens import KVPRESS, kvpress_python, overlaps

SELECTORS = ("snapkv", "tova", "streaming_llm", "knorm", "keydiff", "expected_attention")

# Runs under the other environment's Python, beside the exported files: what each press keeps, and how the text goes on.
WORKER = """
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


def profiles(model: Any, budget: int, seed: int) -> dict[str, evolkv.BudgetProfile]:
    """Profiles to export: each selector with uneven budgets by layer, and by head."""
    info = evolkv.models.describe_model(model)
    random = np.random.default_rng(seed)
    made = {}
    for selector in SELECTORS:
        for granularity, shape in (("layer", (info.num_layers,)), ("head", (info.num_layers, info.num_kv_heads))):
            budgets = complete(random.lognormal(0, 0.4, shape) * budget, budget * int(np.prod(shape)), 33, 4 * budget)
            made[f"{selector}_{granularity}"] = evolkv.BudgetProfile.from_budgets(model, budgets, selector)
    return made


def main() -> None:
    """Runs the comparison."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--context", type=count, default=800)
    options.add_argument("--budget", type=count, default=64)
    options.add_argument("--kvpress-env", type=Path, default=Path.home() / ".cache" / "evolkv" / "kvpress-env")
    arguments = options.parse_args()
    model, tokenizer = evolkv.load_model(arguments.model, dtype="float32", device="cpu")
    example = get_task(f"niah:context={arguments.context}").examples("train", 1, tokenizer, arguments.seed)[0]
    ids = encode_prompt(tokenizer, example)
    exported = profiles(model, arguments.budget, arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "model")
        for each, profile in exported.items():
            (folder / f"{each}.py").write_text(press_source(profile, each))
        job, out, worker = folder / "job.json", folder / "found.json", folder / "worker.py"
        told = {"model": str(folder / "model"), "folder": name, "ids": ids[0].tolist(), "names": list(exported)}
        job.write_text(json.dumps(told))
        worker.write_text(WORKER)
        subprocess.run([kvpress_python(arguments.kvpress_env), worker, job, out], check=True)
        theirs = json.loads(out.read_text())
    rows, every = {}, torch.ones_like(ids)
    for each, profile in exported.items():
        cache = evolkv.CompressedCache(model, profile)
        # Without a mask, and without an end token, generate() would take the template's <|im_end|> for padding.
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": every}
        answer = model.generate(ids, **cache.as_argument, **settings)[0, ids.shape[1] :].tolist()
        kept = theirs[each]["kept"]
        indices = overlaps(cache, kept)
        rows[each] = {
            "same_counts": [list(map(len, layer)) for layer in cache.positions] == [list(map(len, x)) for x in kept],
            "jaccard_mean": sum(indices) / len(indices),
            "jaccard_min": min(indices),
            "same_answer": answer == theirs[each]["answer"],
            "entries": profile.total,
            "entries_held_by_kvpress": theirs[each]["held"],
        }
        cache.release()
    finish(
        {
            "benchmark": "kvpress_export",
            "machine": machine(model.device),
            "peer": KVPRESS,
            "model": arguments.model,
            "tokens": ids.shape[1],
            "budget": arguments.budget,
            "profiles": rows,
        },
        arguments.json,
    )


if __name__ == "__main__":
    run(main)
