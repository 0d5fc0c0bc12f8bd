"""A curve of budgets searched as one, against a search of its own for each budget.

    python bench/curve.py --json FILE [--budgets 32 64 128 256] [--seeds 5] [--max-evals 600]

The curve evaluates `--max-evals` candidates at its first budget and as many again at all others together. The direct
searches share the same number of candidates in equal parts, so both cost the same; one of them with `--max-evals` gives
the seconds of one search. All profiles are scored on the same held-out examples (metric logprob).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

import evolkv
from common import count, finish, interval_over_seeds, machine, parser, run, spread
from evolkv.evolution import search_curve
from trials import Trial


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--task", default="niah:context=1600")
    options.add_argument("--granularity", choices=("layer", "head"), default="head")
    options.add_argument("--selector-window", type=count, default=16)
    options.add_argument("--budgets", type=count, nargs="+", default=[32, 64, 128, 256])
    options.add_argument("--first", choices=("smallest", "largest"), default="smallest")
    options.add_argument("--train", type=count, default=6)
    options.add_argument("--val", type=count, default=6)
    options.add_argument("--held-out", type=count, default=16)
    options.add_argument("--max-evals", type=count, default=600)
    options.add_argument("--seeds", type=count, default=5)
    arguments = options.parse_args()
    model, tokenizer = evolkv.load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    budgets, most = sorted(arguments.budgets), arguments.max_evals
    share = 2 * most // len(budgets)
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        settings: dict[str, Any] = {
            "task": arguments.task,
            "selector": {"name": "snapkv", "window": arguments.selector_window},
            "granularity": arguments.granularity,
            "train": arguments.train,
            "val": arguments.val,
            "seed": seed,
        }
        started = time.perf_counter()
        curve = search_curve(model, tokenizer, budgets=budgets, max_evals=most, first=arguments.first, **settings)
        took = time.perf_counter() - started
        started = time.perf_counter()
        evolkv.search(model, tokenizer, budget=budgets[len(budgets) // 2], max_evals=most, **settings)
        one = time.perf_counter() - started
        direct = [evolkv.search(model, tokenizer, budget=c, max_evals=share, **settings) for c in budgets]
        trial = Trial(
            model,
            tokenizer,
            task=arguments.task,
            train=arguments.train,
            held_out=arguments.held_out,
            seed=seed,
            selector=settings["selector"],
        )
        profiles = [result.profile for result in [*curve.results, *direct]]
        scores = trial.held_out.score(np.stack([profile.budgets for profile in profiles])).mean(axis=1)
        trial.close()
        evaluations = sum(result.settings["example_evaluations"] for result in curve.results)
        runs.append(
            {
                "seed": seed,
                "curve": dict(zip(budgets, scores[: len(budgets)].round(4).tolist(), strict=True)),
                "direct": dict(zip(budgets, scores[len(budgets) :].round(4).tolist(), strict=True)),
                "source": {point["budget"]: point["source"] for point in curve.points},
                "seconds": {"curve": round(took, 1), "one search": round(one, 1)},
                "example_evaluations": {
                    "curve": evaluations,
                    "direct": sum(result.settings["example_evaluations"] for result in direct),
                },
            }
        )
        print(runs[-1], flush=True)
    finish(
        {
            "benchmark": "curve",
            "machine": machine(model.device),
            "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
            "seconds_of_curve_over_one_search": spread(
                [run["seconds"]["curve"] / run["seconds"]["one search"] for run in runs]
            ),
            "by_budget": [
                {
                    "budget": budget,
                    "curve": round(statistics.mean(run["curve"][budget] for run in runs), 4),
                    "direct": round(statistics.mean(run["direct"][budget] for run in runs), 4),
                    "difference": interval_over_seeds([run["curve"][budget] - run["direct"][budget] for run in runs]),
                }
                for budget in budgets
            ],
            "runs": runs,
        },
        arguments.json,
    )


if __name__ == "__main__":
    run(main)
