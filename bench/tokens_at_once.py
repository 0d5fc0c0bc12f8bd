"""Seconds to score a generation of candidates, by how many of the answers' tokens are computed together.

    python bench/tokens_at_once.py --json FILE [--task niah:context=1600] [--tokens 256,1024,4096,16384]

More tokens fill the matrix products; but candidates on one prompt share a mask, so that attention grows with the square
of the tokens computed together. Scores are the same up to rounding, and their largest difference is given.
"""

from __future__ import annotations

import numpy as np

import evolkv
from common import count, counts, finish, machine, parser, run, seconds, spread
from evolkv.evaluation import ReplayEngine, replay
from evolkv.models import describe_model
from evolkv.selectors import get_selector
from evolkv.tasks import get_task

POPULATION = 17


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--task", default="niah:context=1600")
    options.add_argument(
        "--tokens",
        type=counts,
        default=[256, 512, 1024, 2048, 4096, 100_000],
        metavar="N,N",
        help="at once at most, comma-separated",
    )
    options.add_argument("--examples", type=count, default=2)
    options.add_argument("--pairs", type=count, default=2, help="times that each is run, in turn")
    arguments = options.parse_args()

    model, tokenizer = evolkv.load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    info = describe_model(model)
    examples = get_task(arguments.task).examples("train", arguments.examples, tokenizer, arguments.seed)
    engine = ReplayEngine(model, tokenizer, examples, get_selector("snapkv"), "logprob", ceiling=1000)
    shape = (POPULATION, info.num_layers, info.num_kv_heads)
    population = np.random.default_rng(arguments.seed).integers(33, 256, size=shape)

    limits = arguments.tokens
    times: dict[int, list[float]] = {limit: [] for limit in limits}
    scores: list[np.ndarray] = []
    for _ in range(arguments.pairs):
        for limit in limits:
            replay._MAX_TOKENS = limit
            times[limit].append(seconds(lambda: scores.append(engine.score(population)), model.device))
    finish(
        {
            "benchmark": "tokens_at_once",
            "machine": machine(model.device),
            "model": arguments.model,
            "dtype": str(model.dtype),
            "task": arguments.task,
            "answer_tokens": [0 if target is None else len(target) for target in engine.targets],
            "candidates": POPULATION,
            "seconds": {str(limit): spread(found) for limit, found in times.items()},
            "largest_difference": max(float(np.abs(each - scores[0]).max()) for each in scores),
        },
        arguments.json,
    )


if __name__ == "__main__":
    run(main)
