"""What EvolKV's own cache keeps and answers, for the tests of the plugin to compare with.

It runs in EvolKV's own environment, because the cache needs a newer transformers than vLLM allows:

    python plugins/vllm/tests/reference.py FOLDER [GROUP...]

writes FOLDER/GROUP.json for each group of cases, FOLDER/GROUP-NAME.json for each profile, and the tiny models.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from evolkv import BudgetProfile, CompressedCache, load_model
from evolkv.models import ALIASES, gguf, model_facts
from evolkv.selectors import get_selector
from evolkv.tasks import encode_prompt, get_task
from evolkv_vllm.rule import BudgetRule
from tiny_model import KV_HEADS, LAYERS, write_tiny_model

BLOCK = 32
BYTES = 256
WINDOW = 64
ANSWER = 12
PROMPTS = 40
ADAPTED = ["q_proj", "k_proj", "v_proj"]


def main() -> None:
    # Tests read the models that it names, from another folder.
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    makers = {"tiny": of_tiny, "windows": of_windows, "lora": of_lora, "smollm": of_smollm}
    for name in sys.argv[2:] or makers:
        make = makers[name]
        (folder / f"{name}.json").write_text(json.dumps(make(folder)), "utf-8")


def of_smollm(folder: Path) -> dict[str, Any]:
    name = "smollm2-135m"
    entry = ALIASES[name]
    model, tokenizer = load_model(name, dtype="float32", device="cpu")
    rng = np.random.default_rng(0)
    layers = model.config.num_hidden_layers
    profiles = {
        "uniform": BudgetProfile.uniform(model, 64),
        "classes": BudgetProfile.from_budgets(model, rng.permutation(np.repeat([34, 40, 64, 90, 150], layers // 5))),
        "varied": BudgetProfile.from_budgets(model, rng.integers(32, 200, size=layers), "snapkv:window=16,gqa=max"),
        "heads": BudgetProfile.from_budgets(
            model, rng.integers(8, 150, size=(layers, model.config.num_key_value_heads)), "chunkkv:window=8"
        ),
    }
    prompts = []
    for context in (240, 320, 400):
        examples = get_task(f"niah:context={context}").examples("report", 15, tokenizer)
        prompts += [encode_prompt(tokenizer, example)[0].tolist() for example in examples]
    # Each of another length, by which the tests tell them apart.
    prompts = [prompt[-(150 + 5 * number) :] for number, prompt in enumerate(prompts[:PROMPTS])]
    cases = cases_of(model, profiles, prompts, "classes", folder / "smollm")
    cases += exact_cases(model, profiles, prompts)
    return {"model": str(gguf.converted(entry.paths(name), name, entry.sha256)), "prompts": prompts, "cases": cases}


def of_tiny(folder: Path) -> dict[str, Any]:
    path = write_tiny_model(folder / "tiny")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rng = np.random.default_rng(1)
    profiles = {
        "snapkv": BudgetProfile.from_budgets(model, rng.integers(8, 90, size=LAYERS), "snapkv:window=8"),
        "uniform": BudgetProfile.uniform(model, 40, "snapkv:window=4,pooling=mean"),
        "chunkkv": BudgetProfile.from_budgets(model, [50, 20, 400, 30, 64, 64], "chunkkv:window=8,chunk=5"),
        "tova": BudgetProfile.from_budgets(model, [30, 60, 10, 33, 64, 1], "tova"),
        "keydiff": BudgetProfile.from_budgets(model, rng.integers(1, 90, size=LAYERS), "keydiff"),
        "knorm": BudgetProfile.uniform(model, 30, "knorm"),
        "streaming": BudgetProfile.from_budgets(model, rng.integers(8, 90, size=LAYERS), "streaming_llm"),
    }
    by_head = (LAYERS, KV_HEADS)
    profiles |= {
        "heads": BudgetProfile.from_budgets(model, rng.integers(8, 90, size=by_head), "snapkv:window=8"),
        "heads-classes": BudgetProfile.from_budgets(
            model,
            rng.permutation(np.repeat([20, 40, 500], LAYERS * KV_HEADS // 3)).reshape(by_head),
            "chunkkv:window=8",
        ),
        "heads-keydiff": BudgetProfile.from_budgets(model, rng.integers(1, 90, size=by_head), "keydiff"),
    }
    prompts = [rng.integers(0, BYTES, size=30 + 7 * number).tolist() for number in range(40)]
    cases = cases_of(model, profiles, prompts, "snapkv", folder / "tiny")
    exact = ("snapkv", "chunkkv", "keydiff", "heads", "heads-classes")
    cases += exact_cases(model, {name: profiles[name] for name in exact}, prompts)
    return {"model": str(path), "prompts": prompts, "cases": cases}


def of_lora(folder: Path) -> dict[str, Any]:
    """The tiny model with and without an adapter, which changes what the same budgets keep."""
    path = write_tiny_model(folder / "tiny-lora")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    profile, prompts, cases = mixed_budgets(model, folder / "lora-mixed.json", 3, 60, 11)
    write_adapter(folder / "adapter", model)
    cases += [case(model, "adapter", profile, number, prompt) for number, prompt in enumerate(prompts)]
    return {"model": str(path), "adapter": str(folder / "adapter"), "prompts": prompts, "cases": cases}


def write_adapter(folder: Path, model: Any, rank: int = 8) -> None:
    """Write a random adapter of queries, keys and values, and add it to the model's weights."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in ADAPTED:
            down = torch.randn(rank, parameter.shape[1], generator=generator) * 0.1
            up = torch.randn(parameter.shape[0], rank, generator=generator) * 0.1
            parameter.data += up @ down
            weights |= {
                f"base_model.model.{module}.lora_A.weight": down,
                f"base_model.model.{module}.lora_B.weight": up,
            }
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": ADAPTED}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}), "utf-8")


def of_windows(folder: Path) -> dict[str, Any]:
    """A model with a sliding window in every other layer, which the server leaves as it is."""
    path = write_tiny_model(folder / "tiny-windows", window=WINDOW)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    _, prompts, cases = mixed_budgets(model, folder / "windows-mixed.json", 2, 40, 9)
    budgets = np.random.default_rng(4).integers(8, 90, size=(LAYERS, KV_HEADS))
    profile = BudgetProfile.from_budgets(model, budgets, "snapkv:window=8")
    profile.save(folder / "windows-heads.json")
    cases += [case(model, "heads", profile, number, prompt) for number, prompt in enumerate(prompts)]
    return {"model": str(path), "prompts": prompts, "cases": cases}


def mixed_budgets(
    model: Any, path: Path, seed: int, shortest: int, more: int
) -> tuple[BudgetProfile, list[list[int]], list[dict[str, Any]]]:
    """Save a profile of random budgets by layer; return it, prompts that grow by `more` tokens, and their cases."""
    rng = np.random.default_rng(seed)
    profile = BudgetProfile.from_budgets(model, rng.integers(8, 90, size=LAYERS), "snapkv:window=8")
    profile.save(path)
    prompts = [rng.integers(0, BYTES, size=shortest + more * number).tolist() for number in range(20)]
    return profile, prompts, [case(model, "mixed", profile, number, prompt) for number, prompt in enumerate(prompts)]


def cases_of(
    model: Any, profiles: dict[str, BudgetProfile], prompts: list[list[int]], whole: str, place: Path
) -> list[dict[str, Any]]:
    """Save profiles as PLACE-NAME.json, and answer every second prompt under each; under `whole` every one."""
    for name, profile in profiles.items():
        profile.save(f"{place}-{name}.json")
    return [
        case(model, name, profile, number, prompt)
        for name, profile in profiles.items()
        for number, prompt in enumerate(prompts)
        if name == whole or number % 2
    ]


def exact_cases(model: Any, profiles: dict[str, BudgetProfile], prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Answer every second prompt under each profile, with budgets kept to the entry."""
    numbered = list(enumerate(prompts))[1::2]
    return [
        case(model, name, profiles[name], number, prompt, exact=True)
        for name in profiles
        for number, prompt in numbered
    ]


@torch.no_grad()
def case(
    model: Any, name: str, profile: BudgetProfile, number: int, prompt: list[int], exact: bool = False
) -> dict[str, Any]:
    """Return the answer to one prompt under budgets as the server rounds them, or exact ones, and what was kept."""
    windows = model_facts(model).sliding_windows
    by_head = profile.granularity == "head"
    budgets = profile.budgets if by_head else profile.budgets[:, :1]
    rule = BudgetRule.fixed(budgets, get_selector(profile.selector), windows, exact)
    evicted = rule.evicts(len(prompt), BLOCK)[list(rule.classes)].reshape(budgets.shape)
    kept = np.broadcast_to(len(prompt) - evicted, profile.budgets.shape)
    held = BudgetProfile.from_budgets(model, kept, profile.selector)
    cache = CompressedCache(model, held)
    logits = model(torch.tensor([prompt]), cache=cache).logits[0, -1]
    tokens = []
    for _ in range(ANSWER):
        tokens.append(int(logits.argmax()))
        logits = model(torch.tensor([tokens[-1:]]), cache=cache).logits[0, -1]
    positions = [[head[head < len(prompt)].tolist() for head in layer] for layer in cache.positions]
    return {"profile": name, "exact": exact, "prompt": number, "tokens": tokens, "positions": positions}


if __name__ == "__main__":
    main()
