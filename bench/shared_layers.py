"""What computing the layers below the lowest changed one once, for all candidates of a generation, saves.

    python bench/shared_layers.py --json FILE [--context 1600] [--group-size 8] [--seeds 5]

The generations are those of strategy `evolkv`: each group of layers in turn, all other layers alike. For every group
the same candidates are scored with and without sharing, in pairs; a search spends as many generations on each group.
"""

from __future__ import annotations

import statistics

import numpy as np

import evolkv
from common import count, finish, machine, parser, run, seconds, spread
from evolkv.evaluation import ReplayEngine, replay
from evolkv.evolution import GroupedCMA
from evolkv.selectors import get_selector
from evolkv.tasks import get_task


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--context", type=count, default=1600)
    options.add_argument("--examples", type=count, default=2)
    options.add_argument("--group-size", type=count, default=8)
    options.add_argument("--seeds", type=count, default=5)
    arguments = options.parse_args()
    model, tokenizer = evolkv.load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    config = model.config.get_text_config(decoder=True)
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    examples = get_task(f"niah:context={arguments.context}").examples(
        "train", arguments.examples, tokenizer, arguments.seed
    )
    engine = ReplayEngine(model, tokenizer, examples, get_selector("snapkv"))
    least = replay._LEAST_SHARED
    starts = list(range(0, layers, arguments.group_size))
    times: dict[int, dict[str, list[float]]] = {start: {"with": [], "without": []} for start in starts}
    difference = 0.0
    for seed in range(arguments.seeds):
        for start in starts:
            # The first group's population, moved to the group in question.
            population = GroupedCMA(layers, group_size=min(arguments.group_size, layers - start), seed=seed).ask()
            moved = np.full((len(population), layers), 128)
            for row, candidate in enumerate(population):
                size = min(arguments.group_size, layers - start)
                moved[row, start : start + size] = candidate[:size]
            budgets = np.repeat(moved[:, :, None], heads, axis=2)
            scores = {}
            for name, threshold in (("with", least), ("without", layers + 1)):
                replay._LEAST_SHARED = threshold
                scores[name] = engine.score(budgets)
                times[start][name].append(seconds(lambda b=budgets: engine.score(b), model.device))
            difference = max(difference, float(np.abs(scores["with"] - scores["without"]).max()))
    replay._LEAST_SHARED = least
    total = {
        name: [sum(times[s][name][i] for s in starts) for i in range(arguments.seeds)] for name in ("with", "without")
    }
    finish(
        {
            "benchmark": "shared_layers",
            "machine": machine(model.device),
            "model": arguments.model,
            "context": arguments.context,
            "seeds": arguments.seeds,
            "seconds_per_generation": {
                f"layers from {start}": {name: spread(values) for name, values in times[start].items()}
                for start in starts
            },
            "share_of_time_saved": spread([1 - a / b for a, b in zip(total["with"], total["without"], strict=True)]),
            "median_share_saved": 1 - statistics.median(total["with"]) / statistics.median(total["without"]),
            "largest_score_difference": difference,
        },
        arguments.json,
    )


if __name__ == "__main__":
    run(main)
