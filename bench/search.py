"""The cost of a search. `python bench/search.py COMMAND --help` explains each command."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import evolkv
from evolkv.cache.replay import RankedPrompt
from evolkv.errors import UsageError
from evolkv.evaluation import NaiveEngine, ReplayEngine, replay_engine
from evolkv.evaluation.compare import MethodComparison, compare_records
from evolkv.evaluation.on_ray import RayBackend
from evolkv.evaluation.records import label
from evolkv.evaluation.scoring import encode_examples
from evolkv.evaluation.slope import slope
from evolkv.evolution import SearchProgress, search_curve
from evolkv.evolution.gradient import SLOPE_EXAMPLES, descend
from evolkv.evolution.study import Study
from evolkv.methods import Method
from evolkv.models import describe_model
from evolkv.selectors import get_selector
from evolkv.tasks import get_task
from lib.command import Bench, run, seeds_from
from lib.common import matrix_rate, ratios, seconds, spread
from lib.contenders import PeakMemory
from lib.trials import Trial

#: Candidates of a generation that is timed.
POPULATION = 14
Granularity = Literal["layer", "head"]


def engine(bench: Bench, context: int = 1600, examples: int = 2, pairs: int = 3, naive: int = 1) -> dict[str, Any]:
    """Time one candidate on one example: replay against the naive engine, and against the floor.

    Both engines score the same candidates on the same examples. The naive engine prefills for each; replay has
    prefilled once, and that cost is given apart. The floor is the time that the answer's tokens take through the
    model's matrices, at the rate measured on these matrices.

    Args:
        context: tokens of a prompt.
        examples: prompts.
        pairs: paired runs of both engines.
        naive: naive runs in a pair, of one candidate each.
    """
    model, tokenizer = bench.load()
    device, config = model.device, model.config.get_text_config(decoder=True)
    drawn = get_task(f"niah:context={context}").examples("train", examples, tokenizer, bench.seed)
    selector = get_selector("snapkv")
    prepared: list[ReplayEngine] = []
    prefill = seconds(lambda: prepared.append(ReplayEngine(model, tokenizer, drawn, selector)), device)
    ours, reference = prepared[0], NaiveEngine(model, tokenizer, drawn, selector)
    # Budgets as a search at 8 % of the context meets them: most layers small, a few with nearly everything.
    random = np.random.default_rng(bench.seed)
    layers = random.lognormal(np.log(0.06 * context), 0.9, size=(POPULATION, config.num_hidden_layers, 1))
    budgets = np.clip(layers, 33, context).astype(np.int64)
    population = np.repeat(budgets, config.num_key_value_heads, axis=2)
    ours.score(population)

    times: dict[str, list[float]] = {"replay": [], "naive": []}
    difference = 0.0
    for pair in range(pairs):
        scores = ours.score(population)
        times["replay"].append(seconds(lambda: ours.score(population), device) / POPULATION / examples)
        for at in range(pair * naive, (pair + 1) * naive):
            row = at % POPULATION
            times["naive"].append(seconds(partial(reference.score, population[row : row + 1]), device) / examples)
        difference = max(difference, float(np.abs(scores[row] - reference.score(population[row : row + 1])[0]).max()))
    answer = statistics.mean(len(tokenizer(each.target, add_special_tokens=False).input_ids) - 1 for each in drawn)
    matrices = sum(w.numel() for name, w in model.named_parameters() if w.ndim == 2 and "embed" not in name)
    if config.tie_word_embeddings:
        matrices += config.vocab_size * config.hidden_size
    rate = matrix_rate(model, round(POPULATION * answer))
    floor = 2 * matrices * answer / rate
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "context": context,
        "n": pairs,
        "examples": examples,
        "population": POPULATION,
        "milliseconds_per_candidate_and_example": {
            name: spread([1000 * t for t in taken]) for name, taken in times.items()
        },
        "naive_over_replay": medians["naive"] / medians["replay"],
        "prefill_seconds_per_example": prefill / examples,
        "largest_score_difference": difference,
        "floor_milliseconds": 1000 * floor,
        "replay_over_floor": medians["replay"] / floor,
        "matrix_gigaflop_per_second": rate / 1e9,
    }


def tokens_at_once(
    bench: Bench,
    task: str = "niah:context=1600",
    tokens: list[int] = [256, 512, 1024, 2048, 4096, 100_000],  # noqa: B006
    examples: int = 2,
    pairs: int = 2,
) -> dict[str, Any]:
    """Time the scoring of a generation, by how many of the answers' tokens are computed together.

    More tokens fill the matrix products; but candidates on one prompt share a mask, so that attention grows with the
    square of the tokens computed together. Scores are the same up to rounding.

    Args:
        task: spec of the task.
        tokens: the most tokens computed at once.
        examples: prompts.
        pairs: times that each limit is run, in turn.
    """
    model, tokenizer = bench.load()
    info = describe_model(model)
    drawn = get_task(task).examples("train", examples, tokenizer, bench.seed)
    ours = ReplayEngine(model, tokenizer, drawn, get_selector("snapkv"), "logprob", ceiling=1000)
    shape = (POPULATION, info.num_layers, info.num_kv_heads)
    population = np.random.default_rng(bench.seed).integers(33, 256, size=shape)
    times: dict[int, list[float]] = {limit: [] for limit in tokens}
    scores: list[np.ndarray] = []
    for _ in range(pairs):
        for limit in tokens:
            replay_engine._MAX_TOKENS = limit
            times[limit].append(seconds(lambda: scores.append(ours.score(population)), model.device))
    return {
        "n": pairs,
        "task": task,
        "answer_tokens": [question.answer_tokens for question in ours.questions],
        "candidates": POPULATION,
        "seconds": {str(limit): spread(taken) for limit, taken in times.items()},
        "largest_difference": max(float(np.abs(each - scores[0]).max()) for each in scores),
    }


def gradient(
    bench: Bench,
    task: str = "niah:context=1600",
    held_out: str = "niah:context=1600,passages=2",
    selector: str = "chunkkv:window=2",
    budgets: list[int] = [16, 24, 40],  # noqa: B006
    train: int = 24,
    val: int = 12,
    samples: int = 24,
    max_evals: int = 153,
    seeds: int = 5,
) -> dict[str, Any]:
    """Find needles under budgets per head that start from the gradient, at several seeds.

    Each seed has examples of its own for training, choice and comparison. The comparison has the full cache, the same
    ranking with equal budgets, and SnapKV with its window cut to fit, all judged by the text that they generate.

    Args:
        task: spec of the task that is searched on.
        held_out: spec of the task of the comparison, whose examples no search sees.
        selector: whose ranking is cut.
        budgets: mean cache entries per KV head.
        train: training examples.
        val: examples to choose on.
        samples: examples of the comparison.
        max_evals: candidates of evolution at the first budget, and at the others together.
        seeds: searches.
    """
    model, tokenizer = bench.load()
    rows: list[dict[str, Any]] = []
    spent: list[dict[str, Any]] = []
    for seed in seeds_from(bench, seeds):
        found = search_curve(
            model,
            tokenizer,
            task=task,
            budgets=budgets,
            selector=selector,
            granularity="head",
            train=train,
            val=val,
            max_evals=max_evals,
            seed=seed,
        )
        for result in found.results:
            budget = result.profile.budget
            snapkv = f"snapkv:window={min(32, budget // 2)}"
            methods: list[Any] = ["full", snapkv, selector, Method.of_profile(result.profile, "evolkv")]
            compared = evolkv.evaluate(
                model,
                tokenizer,
                task=held_out,
                methods=methods,
                budgets=[budget],
                samples=samples,
                seed=seed,
                metric="contains",
            )
            rows += [{**row, "at": budget} for row in compared]
            spent.append(
                {
                    "seed": seed,
                    "budget": budget,
                    "seconds": result.seconds,
                    "chosen": result.chosen,
                    "validation": {row["name"]: row["score"] for row in result.validation},
                }
            )
            print(spent[-1], [(row["method"], row["score"]) for row in rows[-4:]], file=sys.stderr, flush=True)
    table = []
    for budget in budgets:
        for method in dict.fromkeys(row["method"].partition(":window")[0] for row in rows):
            scores = [r["score"] for r in rows if r["at"] == budget and r["method"].partition(":window")[0] == method]
            table.append({"budget": budget, "method": method, **spread(scores), "mean": statistics.mean(scores)})
    return {"n": samples, "seeds": seeds, "task": task, "table": table, "searches": spent, "rows": rows}


def descent(
    bench: Bench,
    task: list[str],
    budget: int,
    selector: str,
    train: int = 24,
    val: int = 24,
    seeds: int = 3,
) -> dict[str, Any]:
    """Hold a descent against evolution from uniform budgets with its default candidates: held-out score and cost.

    Both have the same training examples, prefilled once, which is not counted. Cost is counted in forward passes of one
    example under one allocation, a pass there and back as three, and in seconds on one thread per core. Evolution's
    score is that of the better of what it puts forward and its mean. The descent is also judged after each step, at no
    cost to it: `reached` is the first one that is as good as evolution's end.

    Args:
        task: specs of the tasks.
        budget: mean cache entries per KV head.
        selector: whose ranking is cut.
        train: training examples.
        val: held-out examples.
        seeds: pairs, each with examples of its own.
    """
    model, tokenizer = bench.load()
    rows: list[dict[str, Any]] = []
    for seed in seeds_from(bench, seeds):
        trial = Trial(
            model, tokenizer, task=task, selector=selector, train=train, held_out=val, seed=seed, split="validation"
        )
        config = replace(trial.config, granularity="head")
        space = trial.space("head")

        def judged(allocations: Sequence[Any], trial: Any = trial) -> float:
            return float(trial.held_out.score(np.stack([np.array(each) for each in allocations])).mean(axis=1).max())

        _ = trial.train
        started = time.perf_counter()
        steps, *_ = descend(
            budget,
            config=config,
            space=space,
            rotation=trial.rotation(SLOPE_EXAMPLES),
            scorer=lambda trial=trial: trial.train,  # type: ignore[misc]
        )
        of_descent = time.perf_counter() - started
        started = time.perf_counter()
        evolved = trial.evolve(replace(config, start="uniform"), budget)
        of_evolution = time.perf_counter() - started
        ends = [evolved.best.budgets] if evolved.mean is None else [evolved.best.budgets, evolved.mean]
        scores = {"evolution": judged(ends), "uniform": judged([space.heuristics(budget)["uniform"]])}
        by_step = [judged([step.budgets]) for step in steps]
        reached = next((i for i, score in enumerate(by_step, 1) if score >= scores["evolution"]), None)
        passes = config.examples_per_generation * len(evolved.history)
        row = {
            "seed": seed,
            **scores,
            "descent": by_step[-1],
            "steps": len(steps),
            "reached": reached,
            "passes": {"descent": 3 * SLOPE_EXAMPLES * len(steps), "evolution": passes},
            "seconds": {"descent": of_descent, "evolution": of_evolution},
            "by_step": by_step,
        }
        rows.append(row)
        print({key: value for key, value in row.items() if key != "by_step"}, file=sys.stderr, flush=True)
        trial.close()
    return {"n": val, "seeds": seeds, "task": task, "budget": budget, "selector": selector, "rows": rows}


def _paired(
    loaded: tuple[Any, Any], methods: Sequence[Any], pair: tuple[str, str], budget: Any, **settings: Any
) -> tuple[list[dict[str, Any]], MethodComparison]:
    """Return the rows of an evaluation at one budget, and the paired comparison of two of its methods."""
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        rows = evolkv.evaluate(*loaded, methods=list(methods), budgets=[budget], records=records, **settings)
        first, second = (label(name, budget) for name in pair)
        return rows, compare_records([records], first, second)


def label_free(
    bench: Bench,
    task: list[str] = ["niah:context=1600,passages=2", "code:context=1600"],  # noqa: B006
    budgets: list[int] = [40, 128],  # noqa: B006
    selector: list[str] = ["chunkkv:window=2", "snapkv:window=32"],  # noqa: B006
    train: int = 24,
    val: int = 24,
    samples: int = 32,
    max_evals: int = 340,
) -> dict[str, Any]:
    """Hold budgets that were evolved without answers against those evolved with them, on the same prompts.

    One search has the metric `logprob`, the other `fidelity`, which compares with what the full cache itself would say.
    Both profiles are then scored on held-out examples: by the answers' probability, by fidelity, and by the task's own
    metric.

    Args:
        task: specs of the tasks, each with searches of its own.
        budgets: mean cache entries per KV head, of each task.
        selector: whose ranking is cut, of each task.
        train: training examples.
        val: examples to choose on.
        samples: held-out examples.
        max_evals: candidates of each search.
    """
    model, tokenizer = bench.load()
    rows: list[dict[str, Any]] = []
    for spec, budget, ranking in zip(task, budgets, selector, strict=True):
        methods: list[Any] = ["full", ranking]
        seconds = {}
        for followed in ("logprob", "fidelity"):
            found = evolkv.search(
                model,
                tokenizer,
                task=spec,
                budget=budget,
                selector=ranking,
                metric=followed,
                train=train,
                val=val,
                max_evals=max_evals,
                seed=bench.seed,
            )
            seconds[followed] = found.seconds
            methods.append(Method.of_profile(found.profile, followed))
        for metric in ("logprob", "fidelity", None):
            settings = {"task": spec, "samples": samples, "seed": bench.seed, "metric": metric}
            compared, pairs = _paired((model, tokenizer), methods, ("fidelity", "logprob"), budget, **settings)
            scores = {row["method"]: row["score"] for row in compared}
            rows.append(
                {
                    "task": spec,
                    "budget": budget,
                    "selector": ranking,
                    "metric": compared[0]["metric"],
                    "scores": scores,
                    "difference": pairs.overall.difference,
                    "ci95": list(pairs.overall.ci95),
                    "seconds": seconds,
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return {"n": samples, "rows": rows}


def under(
    bench: Bench,
    task: list[str] = ["niah:context=800", "ruler:niah_multikey_1,context=1024"],  # noqa: B006
    selector: list[str] = ["rocketkv", "rocketkv:held=200", "kvzip"],  # noqa: B006
    budgets: list[str] = ["10%", "24", "10%"],  # noqa: B006
    train: int = 16,
    val: int = 16,
    samples: int = 24,
    max_evals: int = 250,
) -> dict[str, Any]:
    """Say what evolved budgets are worth under each selector: beside equal budgets under the same one.

    One profile serves all tasks. Both are scored on held-out examples, by the answers' probability. Budgets are by head
    where prompts can be prefilled once for all candidates; else, where each candidate costs more, by layer.

    Args:
        task: specs of the tasks.
        selector: whose ranking is cut, each with a search of its own.
        budgets: mean cache entries per KV head or shares of each prompt, of each selector.
        train: training examples of all tasks together.
        val: examples to choose on, likewise.
        samples: held-out examples of each task.
        max_evals: candidates of each search.
    """
    model, tokenizer = bench.load()
    rows: list[dict[str, Any]] = []
    for ranking, budget in zip(selector, budgets, strict=True):
        replayed = _replays(ranking)
        found = evolkv.search(
            model,
            tokenizer,
            task=task,
            budget=budget,
            selector=ranking,
            granularity="head" if replayed else "layer",
            engine="replay" if replayed else "naive",
            train=train,
            val=val,
            max_evals=max_evals,
            seed=bench.seed,
        )
        methods = ["full", ranking, Method.of_profile(found.profile, "evolved")]
        settings = {"task": task, "samples": samples, "seed": bench.seed, "metric": "logprob"}
        compared, pairs = _paired((model, tokenizer), methods, ("evolved", ranking), budget, **settings)
        for pair in pairs.tasks:
            scores = {row["method"]: row["score"] for row in compared if row["task"] == pair.task}
            rows.append(
                {
                    "selector": ranking,
                    "budget": budget,
                    "task": pair.task,
                    "scores": scores,
                    "difference": {"mean": pair.result.difference, "ci95": list(pair.result.ci95)},
                    "granularity": found.profile.granularity,
                    "chosen": found.chosen,
                    "evaluations": found.evaluations,
                    "seconds": found.seconds,
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return {"n": samples, "rows": rows}


def _replays(selector: str) -> bool:
    """Return whether prompts that are read once serve all candidates under a selector."""
    try:
        get_selector(selector).check_replay()
    except UsageError:
        return False
    return True


def way_back(bench: Bench, context: int = 8000, answer: int = 64, runs: int = 3) -> dict[str, Any]:
    """Measure the memory and the seconds of one slope beyond the recording that it is taken on.

    The prompt's entries are random: what they are changes neither. The estimate is what a search reckons with.

    Args:
        context: tokens of the prompt.
        answer: tokens of the answer.
        runs: slopes.
    """
    model, tokenizer = bench.load()
    config = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(bench.seed)
    shape = config.num_key_value_heads, context, describe_model(model).head_dim

    def entries() -> list[torch.Tensor]:
        each = [torch.randn(shape, generator=generator).to(model.dtype) for _ in range(config.num_hidden_layers)]
        return [part.to(model.device) for part in each]

    positions = torch.arange(context, device=model.device).expand(shape[:2])
    logits = torch.zeros(config.vocab_size, device=model.device)
    prompt = RankedPrompt(context, logits, entries(), entries(), [positions] * config.num_hidden_layers)
    (example,) = get_task("niah:context=200").examples("train", 1, tokenizer, bench.seed)
    (encoded,) = encode_examples(tokenizer, model, [example], "logprob")
    question = replace(encoded, target=torch.randint(100, config.vocab_size, (answer,), generator=generator))
    budgets = np.full((1, config.num_hidden_layers, shape[0]), 100.0)
    taken, peaks = [], []
    for _ in range(runs):
        with PeakMemory(model.device) as peak:
            taken.append(seconds(partial(slope, model, [prompt], [question], budgets, 4.0), model.device))
        peaks.append(peak.bytes / 2**20)
    each, together = replay_engine.slope_bytes(model, prompt, answer)
    return {
        "n": runs,
        "context": context,
        "answer": answer,
        "recording_mebibytes": prompt.nbytes / 2**20,
        "peak_mebibytes": spread(peaks),
        "estimate_mebibytes": (each + together) / 2**20,
        "seconds": spread(taken),
    }


def scaling(
    bench: Bench, context: int = 1600, budget: int = 128, train: int = 6, max_evals: int = 340, pairs: int = 3
) -> dict[str, Any]:
    """Run the demo's search on one and on two Ray workers of one thread each, and time its recording.

    Candidates per second are counted over the generations of a search (prefill apart), in runs that alternate between
    one worker and two. All histories are compared with that of a run on the local backend. Recording is the share of
    the local run's generations that goes into the study, in an SQLite file.

    Args:
        context: tokens of a prompt.
        budget: mean cache entries per KV head.
        train: training examples.
        max_evals: candidates.
        pairs: runs with each number of workers.
    """
    model, tokenizer = bench.load()
    settings: dict[str, Any] = {"task": f"niah:context={context}", "budget": budget, "granularity": "head"}
    settings |= {"train": train, "val": 1, "max_evals": max_evals, "seed": bench.seed}

    def search(**where: Any) -> tuple[float, list[dict[str, Any]]]:
        times = []

        def watch(step: SearchProgress) -> None:
            if step.stage == "search":
                times.append((time.perf_counter(), step.done))

        result = evolkv.search(model, tokenizer, on_progress=watch, **settings, **where)
        (first, before), (last, after) = times[0], times[-1]
        history = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result.history]
        return (after - before) / (last - first), history

    recorded = []
    record = Study.record

    def timed(self: Study, *values: Any) -> None:
        started = time.perf_counter()
        record(self, *values)
        recorded.append(time.perf_counter() - started)

    Study.record = timed  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as folder:
        rate, local = search(storage=str(Path(folder) / "study.db"))
    share = sum(recorded) / (len(local) / rate)
    rates: dict[int, list[float]] = {1: [], 2: []}
    same = 0
    for _ in range(pairs):
        for workers in rates:
            speed, history = search(backend=lambda n=workers: RayBackend(model, tokenizer, workers=n, cpus=1))
            rates[workers].append(speed)
            same += history == local
    return {
        "n": pairs,
        "settings": settings,
        "candidates_per_second": {f"{n} workers": spread(speeds) for n, speeds in rates.items()} | {"local": rate},
        "ratio_of_pairs": ratios(rates[2], rates[1]),
        "same_history_as_local": f"{same} of {2 * pairs}",
        "recording": {"share_of_time": share, "seconds_per_generation": spread(recorded)},
    }


if __name__ == "__main__":
    run(__doc__, engine, gradient, descent, label_free, under, way_back, tokens_at_once, scaling)
