"""The paper's findings about evolved budgets, looked at on a real model.

    python bench/findings.py --json FILE [--model smollm2-135m] [--seeds 5] [--transfer-to SPEC ...] [--plot-file FILE]

Every search costs the same: `--evaluations` candidate-example pairs. A seed draws its own training and held-out
examples; the allocations of one seed are all scored on the same held-out examples (metric logprob), so differences are
paired. The gradient start has steps instead of candidates; each counts as three passes of the examples it looks at.

    strategies  evolkv with groups of 2, 4, 8, 16 and all layers; joint over layers and, where there are several KV
                heads per layer, over heads; the gradient start alone; uniform and pyramid: all at `--budget`
    budgets     joint at each of `--budgets`: found there, expanded from the lowest, and uniform
    transfer    budgets evolved on needles, on other tasks: each `--transfer-to` is the spec of one; of each reference
                the first `--target-tokens` count

The JSON file is written after every seed; given the same command again, the benchmark goes on with the next one.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from evolkv.errors import UsageError
from evolkv.evaluation.local import LocalBackend
from evolkv.evaluation.shards import ShardedEngine
from evolkv.evolution.config import Granularity
from evolkv.evolution.gradient import SLOPE_EXAMPLES, descend
from evolkv.evolution.space import HEURISTICS
from evolkv.models import describe_model
from evolkv.selectors import get_selector
from evolkv.tasks import Example, encode_prompt, get_task
from lib.command import Bench, run, seeds_from
from lib.common import MOST_SEEDS, interval_over_seeds
from lib.trials import Trial, outcome

#: Evolved allocations that are scored on other tasks.
MOVED = ("evolkv, groups of 8", "joint, layers", "joint, heads")
#: The gradient start, over heads where a layer has several.
GRADIENT = "gradient start alone"


class Findings:
    """The searches of one seed, and what they are scored on."""

    def __init__(self, model: Any, tokenizer: Any, arguments: SimpleNamespace, seed: int):
        self.arguments, self.seed = arguments, seed
        self.info = describe_model(model)
        self.trial = Trial(
            model,
            tokenizer,
            task=arguments.task,
            train=arguments.train,
            held_out=arguments.held_out,
            seed=seed,
        )
        self.space = self.trial.space("layer")
        self.finest: Granularity = "head" if self.info.num_kv_heads > 1 else "layer"
        self.rows: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Runs every search, and scores what they came to."""
        arguments, layers = self.arguments, self.info.num_layers
        _ = self.trial.train
        for size in (2, 4, 8, 16, layers):
            if size <= layers:
                name = f"evolkv, {'all layers as one group' if size == layers else f'groups of {size}'}"
                self._search(name, "evolkv", arguments.budget, "layer", group_size=size)
        for granularity in dict.fromkeys(("layer", self.finest)):
            self._search(f"joint, {granularity}s", "joint", arguments.budget, granularity)
        self._descend(arguments.budget)
        for name, budgets in self.space.heuristics(arguments.budget).items():
            self._add(name, arguments.budget, budgets)
        lowest = None
        for budget in arguments.budgets:
            found = self._search("direct", "joint", budget, self.finest)
            self._add("uniform", budget, self.space.heuristics(budget)["uniform"])
            if lowest is None:
                lowest = found
            else:
                expanded = self.trial.space(self.finest).completed(lowest, budget)
                self._add(f"expanded from {arguments.budgets[0]}", budget, expanded)
        full = np.full((layers, self.info.num_kv_heads), self.space.ceiling)
        self._add("full cache", self.space.ceiling, full)
        scores = self.trial.held_out.score(np.stack([row["budgets"] for row in self.rows]))
        for row, values in zip(self.rows, scores, strict=True):
            row["score"], row["scores"] = float(values.mean()), [round(float(value), 5) for value in values]
            row["budgets"] = row["budgets"].tolist()
        self.trial.close()
        return {"seed": self.seed, "rows": self.rows}

    def _search(self, name: str, strategy: str, budget: int, granularity: Granularity, **more: Any) -> np.ndarray:
        examples = 2 if strategy == "joint" else self.arguments.train
        most = self.arguments.evaluations // examples
        if strategy == "joint":
            more["start"] = "uniform"
        config = replace(self.trial.config, strategy=strategy, granularity=granularity, max_evals=most, **more)
        started = time.perf_counter()
        evolved = self.trial.evolve(config, budget)
        spent = sum(score is not None for entry in evolved.history for score in entry.scores or [])
        budgets = outcome(self.trial.space(granularity), evolved, budget)
        self._add(name, budget, budgets, example_evaluations=spent, seconds=round(time.perf_counter() - started, 1))
        return budgets

    def _descend(self, budget: int) -> None:
        config = replace(self.trial.config, granularity=self.finest)
        examples = min(SLOPE_EXAMPLES, self.arguments.train)
        started = time.perf_counter()
        steps, *_ = descend(
            budget,
            config=config,
            space=self.trial.space(self.finest),
            rotation=self.trial.rotation(examples),
            scorer=lambda: self.trial.train,
        )
        seconds = round(time.perf_counter() - started, 1)
        found = np.array(steps[-1].budgets)
        self._add(GRADIENT, budget, found, example_evaluations=3 * examples * len(steps), seconds=seconds)

    def _add(self, name: str, budget: int, budgets: np.ndarray, **facts: Any) -> None:
        self.rows.append({"name": name, "budget": int(budget), "budgets": budgets, **facts})
        print(f"seed {self.seed}: {name} at {budget} {facts or ''}", file=sys.stderr, flush=True)


def other_tasks(tokenizer: Any, arguments: SimpleNamespace, seed: int) -> dict[str, list[Example]]:
    """The examples of each `--transfer-to` task whose prompts are neither too long nor covered by the budget."""
    found = {}
    for spec in arguments.transfer_to:
        examples = get_task(spec).examples("report", arguments.transfer_samples, tokenizer, seed)
        lengths = [encode_prompt(tokenizer, example).shape[1] for example in examples]
        found[spec] = [
            replace(example, target=_beginning(tokenizer, example.target, arguments.target_tokens))
            for example, length in zip(examples, lengths, strict=True)
            if arguments.budget < length <= arguments.longest
        ]
        if not found[spec]:
            raise UsageError(f"{spec}: no prompt has {arguments.budget} to {arguments.longest} tokens; use --longest")
        print(
            f"{spec}: {len(found[spec])} of {len(examples)} prompts have at most {arguments.longest} tokens",
            file=sys.stderr,
        )
    return found


def _beginning(tokenizer: Any, text: str, tokens: int) -> str:
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[:tokens]))


def transfer(
    model: Any, tokenizer: Any, arguments: SimpleNamespace, tasks: dict[str, list[Example]], seeds: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Scores the budgets of every seed on other tasks, by task, allocation and seed."""
    evolved = {
        (row["name"], each["seed"]): np.array(row["budgets"])
        for each in seeds
        for row in each["rows"]
        if row["budget"] == arguments.budget and row["name"] in MOVED
    }
    first = {row["name"]: np.array(row["budgets"]) for row in seeds[0]["rows"] if row["budget"] == arguments.budget}
    evolved |= {(name, None): first[name] for name in HEURISTICS}
    shape = next(iter(evolved.values())).shape
    candidates = np.stack([*evolved.values(), np.full(shape, arguments.longest)])
    rows = []
    for spec, examples in tasks.items():
        backend = LocalBackend(model, tokenizer)
        engine = ShardedEngine(backend, examples, get_selector("snapkv"), "logprob", arguments.longest, hold=False)
        scores = engine.score(candidates)
        backend.close()
        for (name, seed), values in zip([*evolved, ("full cache", None)], scores, strict=True):
            rows.append({"task": spec, "name": name, "seed": seed, "scores": values.round(5).tolist()})
        print(f"scored {spec}", file=sys.stderr, flush=True)
    return rows


def interval_over_examples(values: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Mean and 95 % bootstrap interval over examples."""
    picks = np.random.default_rng(seed).integers(len(values), size=(10_000, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return {
        "mean": round(float(values.mean()), 4),
        "ci95": [round(float(low), 4), round(float(high), 4)],
        "n": len(values),
    }


def summary(seeds: list[dict[str, Any]], transferred: list[dict[str, Any]], budget: int) -> dict[str, Any]:
    """Scores by allocation, and the paired differences that the findings are about."""
    table: dict[tuple[str, int], dict[int, float]] = {}
    for each in seeds:
        for row in each["rows"]:
            table.setdefault((row["name"], row["budget"]), {})[each["seed"]] = row["score"]

    def difference(first: tuple[str, int], second: tuple[str, int]) -> dict[str, Any]:
        pairs = [table[first][seed] - table[second][seed] for seed in table[first] if seed in table[second]]
        return {"what": f"{first[0]} − {second[0]}", "budget": first[1], **interval_over_seeds(pairs)}

    base = ("evolkv, groups of 8", budget)
    differences = [
        difference(key, base) for key in table if key[1] == budget and key[0].startswith("evolkv") and key != base
    ]
    differences += [difference((name, budget), base) for name in ("joint, layers", GRADIENT)]
    if ("joint, heads", budget) in table:
        differences.append(difference(("joint, heads", budget), ("joint, layers", budget)))
    for name, at in table:
        if name.startswith("expanded"):
            differences.append(difference(("direct", at), (name, at)))
        if name.startswith(("direct", "expanded")) and ("uniform", at) in table:
            differences.append(difference((name, at), ("uniform", at)))
    scores = [
        {"name": name, "budget": at, **interval_over_seeds(list(values.values()))}
        for (name, at), values in table.items()
        if name != "full cache"
    ]
    full = [value for (name, _), values in table.items() if name == "full cache" for value in values.values()]
    scores.append({"name": "full cache", "budget": None, **interval_over_seeds(full)})
    return {"scores": scores, "differences": differences, "transfer": _transferred(transferred)}


def _transferred(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        by_name: dict[str, list[list[float]]] = {}
        for row in rows:
            if row["task"] == task:
                by_name.setdefault(row["name"], []).append(row["scores"])
        means = {name: np.array(values).mean(axis=0) for name, values in by_name.items()}
        for name, values in means.items():
            entry = {"task": task, "name": name, "score": interval_over_examples(values)}
            if name != "uniform":
                entry["minus_uniform"] = interval_over_examples(values - means["uniform"])
            found.append(entry)
    return found


def plot(found: dict[str, Any], budget: int, path: Path) -> None:
    """Draws the strategies at one budget, and score against budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)

    def error(row: dict[str, Any]) -> list[list[float]]:
        low, high = row["ci95"] or (row["mean"], row["mean"])
        return [[row["mean"] - low], [high - row["mean"]]]

    curves = ("direct", "expanded", "full")
    strategies = [row for row in found["scores"] if row["budget"] == budget and not row["name"].startswith(curves)]
    for place, row in enumerate(reversed(strategies)):
        left.errorbar(row["mean"], place, xerr=error(row), fmt="o", color="#3b528b", capsize=3)
    left.set_yticks(range(len(strategies)), [row["name"] for row in reversed(strategies)])
    left.set_xlabel("held-out score (mean token probability)")
    left.set_title(f"budget {budget}", loc="left", fontsize=10)
    for (prefix, label), colour, mark in zip(
        {"direct": "searched there", "expanded": "expanded from the lowest", "uniform": "uniform"}.items(),
        ("#3b528b", "#21908d", "#b0632a"),
        "osx",
        strict=True,
    ):
        rows = sorted((row for row in found["scores"] if row["name"].startswith(prefix)), key=lambda row: row["budget"])
        errors = np.hstack([error(row) for row in rows])
        x, y = [row["budget"] for row in rows], [row["mean"] for row in rows]
        right.errorbar(x, y, yerr=errors, marker=mark, color=colour, capsize=3, label=label)
    full = next(row for row in found["scores"] if row["name"] == "full cache")
    right.axhline(full["mean"], color="grey", linestyle=":", label="full cache")
    right.set_xscale("log", base=2)
    ticks = sorted({row["budget"] for row in found["scores"] if row["name"] == "direct"})
    right.set_xticks(ticks, [str(tick) for tick in ticks])
    right.set_xlabel("budget (cache entries per KV head)")
    right.set_ylabel("held-out score")
    right.set_title("direct search, expansion, uniform", loc="left", fontsize=10)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path)


def main(
    bench: Bench,
    task: str = "niah:context=1600,passages=4",
    budget: int = 128,
    budgets: list[int] = [64, 128, 256, 512, 1024],  # noqa: B006
    train: int = 6,
    held_out: int = 16,
    seeds: int = 5,
    evaluations: int = 1800,
    transfer_to: list[str] = [],  # noqa: B006
    transfer_samples: int = 40,
    longest: int = 4600,
    target_tokens: int = 64,
    plot_file: Path | None = None,
) -> dict[str, Any]:
    """Run the searches of every seed, and compare what they found.

    Args:
        task: spec of the task that budgets are evolved on.
        budget: mean cache entries per KV head at which strategies are compared.
        budgets: those at which direct search and expansion are compared.
        train: training examples.
        held_out: examples that no search sees.
        seeds: seeds, 2 to 10.
        evaluations: candidate-example pairs per search.
        transfer_to: specs of other tasks to score on.
        transfer_samples: examples of each at most.
        longest: longest prompt of --transfer-to, in tokens.
        target_tokens: tokens of a reference of --transfer-to, at most.
        plot_file: draw the result there.
    """
    arguments = SimpleNamespace(**{name: value for name, value in locals().items() if name != "bench"})
    if not 2 <= seeds <= MOST_SEEDS:
        raise UsageError(f"--seeds is {seeds}; use 2 to {MOST_SEEDS}")
    model, tokenizer = bench.load()
    settings = {"model": bench.model, "dtype": bench.dtype}
    settings |= {name: getattr(arguments, name) for name in ("task", "budget", "budgets", "train", "held_out")}
    result: dict[str, Any] = {
        "n": f"{seeds} seeds of {held_out} prompts",
        "settings": {**settings, "evaluations": evaluations},
        "seeds": [],
    }
    if bench.json is not None and bench.json.exists():
        before = json.loads(bench.json.read_text())
        if before["settings"] != result["settings"]:
            raise UsageError(f"{bench.json} was made with other settings; give another --json")
        result["seeds"] = before["seeds"]
    tasks = other_tasks(tokenizer, arguments, bench.seed)
    for seed in seeds_from(bench, seeds):
        if seed not in [each["seed"] for each in result["seeds"]]:
            result["seeds"].append(Findings(model, tokenizer, arguments, seed).run())
            if bench.json is not None:
                bench.json.parent.mkdir(parents=True, exist_ok=True)
                bench.json.write_text(json.dumps(result) + "\n")
    moved = transfer(model, tokenizer, arguments, tasks, result["seeds"])
    result["summary"] = summary(result["seeds"], moved, budget)
    if plot_file is not None:
        plot(result["summary"], budget, plot_file)
    return result


if __name__ == "__main__":
    run(__doc__, main)
