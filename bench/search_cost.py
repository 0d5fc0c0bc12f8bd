"""What a search costs: example evaluations and seconds until the leader reaches a held-out score.

    python bench/search_cost.py --json FILE [--context 1600] [--budget 128] [--seeds 5] [--variants all,minibatch-2,...]

One variant is changed at a time, over the same examples and seeds:

    all           every generation on all training examples
    minibatch-N   every generation on N examples, all of them in turn (the default search, N = 2)
    racing        all candidates on a quarter of the examples, the better half on half of them, a quarter on all
    pyramid       as minibatch-2, started from PyramidKV's allocation
    neighbour     as minibatch-2, started from the same search at twice the budget (its cost is not counted)
    small-step    as neighbour, with 0.6 of the initial step

After every generation the better of the leader and the distribution's mean is scored on held-out examples. That costs
the search nothing here: neither its evaluations nor its seconds are counted.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import evolkv
from common import count, finish, machine, parser, run
from evolkv.evaluation.engine import Engine
from evolkv.evolution.evolve import Rotation, evolve
from evolkv.evolution.progress import SearchProgress
from evolkv.evolution.settings import StrategySettings
from trials import Trial

VARIANTS = ("all", "minibatch-1", "minibatch-2", "minibatch-3", "racing", "pyramid", "neighbour", "small-step")


class Reached(Exception):  # noqa: N818
    """The last threshold has been reached, or the evaluations are spent."""


class Counting:
    """An engine that counts what it scores; with `racing` it stops scoring candidates that fall behind."""

    def __init__(self, engine: Engine, examples: int, racing: bool):
        self.engine, self.examples, self.racing = engine, examples, racing
        self.evaluations, self.seconds = 0, 0.0

    def score(self, budgets: np.ndarray, columns: Sequence[int] | None = None) -> np.ndarray:
        started = time.perf_counter()
        wanted = list(range(self.examples) if columns is None else columns)
        if not self.racing:
            scores = self.engine.score(budgets, wanted)
            self.evaluations += scores.size
        else:
            scores = self._race(budgets, wanted)
        self.seconds += time.perf_counter() - started
        return scores

    def _race(self, budgets: np.ndarray, wanted: list[int]) -> np.ndarray:
        """Rows of the stopped rank below those of the others, and among themselves by what they had."""
        spread = wanted[::3] + wanted[1::3] + wanted[2::3]
        quarter = max(1, len(spread) // 4)
        heats = [spread[:quarter], spread[quarter : 2 * quarter], spread[2 * quarter :]]
        alive = np.arange(len(budgets))
        scores = np.full((len(budgets), len(wanted)), np.nan)
        final = np.empty_like(scores)
        for heat, columns in enumerate(heats):
            places = [wanted.index(c) for c in sorted(columns)]
            scores[np.ix_(alive, places)] = self.engine.score(budgets[alive], sorted(columns))
            self.evaluations += len(alive) * len(columns)
            means = np.nanmean(scores[alive], axis=1)
            order = alive[np.argsort(-means)]
            keep = len(order) if heat == len(heats) - 1 else max(2, len(budgets) >> (heat + 1))
            for row in order[keep:]:
                final[row] = np.nanmean(scores[row]) * 1e-3 * (heat + 1)
            alive = np.sort(order[:keep])
        final[alive] = scores[alive]
        return final

    def close(self) -> None:
        self.engine.close()


class Race:
    """One seed: the variants over the same examples."""

    def __init__(self, model: Any, tokenizer: Any, arguments: Any, seed: int):
        self.arguments, self.seed = arguments, seed
        self.thresholds = [float(value) for value in arguments.thresholds.split(",")]
        self.trial = Trial(
            model,
            tokenizer,
            task=f"niah:context={arguments.context}",
            train=arguments.train,
            held_out=arguments.val,
            seed=seed,
            split="validation",
        )
        self.plan = self.trial.plan(arguments.granularity)

    def run(self, variant: str, budget: int, start: Any = None, to_the_end: bool = False) -> tuple[dict[str, Any], Any]:
        """Searches until the highest threshold is reached; returns what it cost, and the mean it ended with."""
        size = int(variant.partition("-")[2]) if variant.startswith("minibatch") else 2
        everything = variant in ("all", "racing")
        rotation = Rotation(self.arguments.train, self.arguments.train if everything else size, self.seed)
        begun = "pyramid" if variant == "pyramid" else start
        step = 0.6 if variant == "small-step" else 1.0
        strategy = StrategySettings("joint", seed=self.seed).strategy(self.plan, budget, begun, step=step)
        counting = Counting(self.trial.train, self.arguments.train, variant == "racing")
        reached: dict[str, Any] = {}
        highest = 0.0

        def watch(progress: SearchProgress) -> None:
            nonlocal highest
            candidates = [np.array(progress.budgets), self.plan.matrix(strategy.mean)]
            score = float(self.trial.held_out.score(np.stack(candidates)).mean(axis=1).max())
            highest = max(highest, score)
            for threshold in self.thresholds:
                if score >= threshold and str(threshold) not in reached:
                    reached[str(threshold)] = {
                        "example_evaluations": counting.evaluations,
                        "seconds": round(counting.seconds, 2),
                        "candidates": progress.done,
                    }
            spent = counting.evaluations >= self.arguments.limit
            if spent or (not to_the_end and len(reached) == len(self.thresholds)):
                raise Reached

        with contextlib.suppress(Reached):
            evolve(self.plan, budget, strategy, 10**9, rotation, lambda: counting, watch)
        result = {
            "variant": variant,
            "seed": self.seed,
            "reached": reached,
            "highest": round(highest, 4),
            "example_evaluations": counting.evaluations,
            "seconds": round(counting.seconds, 2),
        }
        return result, self.plan.matrix(strategy.mean)


def summary(runs: list[dict[str, Any]], variants: list[str], thresholds: list[str]) -> dict[str, Any]:
    """By variant and threshold: medians, how many seeds got there, and the ratio to the same seed's `all`."""
    found: dict[str, Any] = {}
    for variant in variants:
        mine = {run["seed"]: run for run in runs if run["variant"] == variant}
        base = {run["seed"]: run for run in runs if run["variant"] == "all"}
        found[variant] = {"highest": statistics.median(run["highest"] for run in mine.values())}
        for threshold in thresholds:
            there = {seed: run["reached"][threshold] for seed, run in mine.items() if threshold in run["reached"]}
            entry: dict[str, Any] = {"seeds": f"{len(there)} of {len(mine)}"}
            for unit in ("example_evaluations", "seconds"):
                if there:
                    entry[unit] = statistics.median(at[unit] for at in there.values())
                pairs = [
                    base[seed]["reached"].get(threshold, base[seed])[unit] / at[unit]
                    for seed, at in there.items()
                    if seed in base
                ]
                if pairs:
                    # Where `all` never got there, what it had spent by then stands for it: the ratio is at least this.
                    entry[f"{unit}_saved"] = round(statistics.median(pairs), 2)
            found[variant][threshold] = entry
    return found


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--context", type=count, default=1600)
    options.add_argument("--budget", type=count, default=128)
    options.add_argument("--granularity", choices=("layer", "head"), default="head")
    options.add_argument("--train", type=count, default=12)
    options.add_argument("--val", type=count, default=16)
    options.add_argument("--seeds", type=count, default=5)
    options.add_argument("--limit", type=count, default=2400, help="example evaluations at most")
    options.add_argument("--thresholds", default="0.8,0.85", help="held-out scores")
    options.add_argument("--variants", default="all,minibatch-2,racing,pyramid,neighbour,small-step")
    arguments = options.parse_args()
    variants = arguments.variants.split(",")
    unknown = set(variants) - set(VARIANTS)
    if unknown:
        options.error(f"unknown variants {sorted(unknown)}; choose among {', '.join(VARIANTS)}")

    model, tokenizer = evolkv.load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    runs = []
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        race = Race(model, tokenizer, arguments, seed)
        neighbour = None
        for variant in variants:
            if variant in ("neighbour", "small-step") and neighbour is None:
                _, neighbour = race.run("minibatch-2", 2 * arguments.budget)
            start = neighbour if variant in ("neighbour", "small-step") else None
            result, _ = race.run(variant, arguments.budget, start)
            runs.append(result)
            print(result, flush=True)
        race.trial.close()
    finish(
        {
            "benchmark": "search_cost",
            "machine": machine(model.device),
            "model": arguments.model,
            "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
            "summary": summary(runs, variants, arguments.thresholds.split(",")),
            "runs": runs,
        },
        arguments.json,
    )


if __name__ == "__main__":
    run(main)
