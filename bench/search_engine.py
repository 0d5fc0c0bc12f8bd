"""Seconds per candidate and example: the replay engine against the naive one, and against the floor.

    python bench/search_engine.py --json FILE [--context 1600] [--dtype float32|bfloat16]

Both engines score the same candidates on the same examples. The naive engine prefills for each; replay has prefilled
once, and that cost is given apart, with the number of candidates from which it is paid back. The floor is the time
that the answer's tokens take through the model's matrices at the rate measured on these matrices.
"""

from __future__ import annotations

import statistics

import numpy as np

import evolkv
from common import count, finish, machine, matrix_rate, parser, run, seconds, spread
from evolkv.evaluation import NaiveEngine, ReplayEngine
from evolkv.selectors import get_selector
from evolkv.tasks import get_task

POPULATION = 14


def candidates(count: int, layers: int, heads: int, longest: int, seed: int) -> np.ndarray:
    """Budgets as a search at 8 % of the context meets them: most layers small, a few with nearly everything."""
    random = np.random.default_rng(seed)
    budgets = np.clip(random.lognormal(np.log(0.06 * longest), 0.9, size=(count, layers, 1)), 33, longest)
    return np.repeat(budgets.astype(np.int64), heads, axis=2)


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--context", type=count, default=1600)
    options.add_argument("--examples", type=count, default=2)
    options.add_argument("--pairs", type=count, default=3, help="paired runs of both engines")
    arguments = options.parse_args()

    model, tokenizer = evolkv.load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    device = model.device
    config = model.config.get_text_config(decoder=True)
    task = get_task(f"niah:context={arguments.context}")
    examples = task.examples("train", arguments.examples, tokenizer, arguments.seed)
    selector = get_selector("snapkv")
    replay, prefill = [None], 0.0

    def prepare() -> None:
        replay[0] = ReplayEngine(model, tokenizer, examples, selector)

    prefill = seconds(prepare, device)
    engine = replay[0]
    naive = NaiveEngine(model, tokenizer, examples, selector)
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    population = candidates(POPULATION, *shape, arguments.context, arguments.seed)
    engine.score(population)

    replay_seconds, naive_seconds, difference = [], [], 0.0
    for pair in range(arguments.pairs):
        scores = engine.score(population)
        replay_seconds.append(seconds(lambda: engine.score(population), device) / POPULATION / len(examples))
        one = population[pair : pair + 1]
        expected: list[np.ndarray] = []
        naive_seconds.append(seconds(lambda one=one, e=expected: e.append(naive.score(one)), device) / len(examples))
        difference = max(difference, float(np.abs(scores[pair] - expected[0][0]).max()))

    texts = [engine.generate(column, population) for column in range(len(examples))]
    same = sum(
        texts[column][row] == naive.generate(column, population[row])
        for column in range(len(examples))
        for row in range(arguments.pairs)
    )
    answer = statistics.mean(
        len(tokenizer(example.target, add_special_tokens=False).input_ids) - 1 for example in examples
    )
    matrices = sum(w.numel() for name, w in model.named_parameters() if w.ndim == 2 and "embed" not in name)
    if config.tie_word_embeddings:
        matrices += config.vocab_size * config.hidden_size
    rate = matrix_rate(model, round(POPULATION * answer))
    floor = 2 * matrices * answer / rate
    replay_median, naive_median = statistics.median(replay_seconds), statistics.median(naive_seconds)
    finish(
        {
            "benchmark": "search_engine",
            "machine": machine(device),
            "model": arguments.model,
            "dtype": arguments.dtype,
            "context": arguments.context,
            "examples": len(examples),
            "population": POPULATION,
            "seconds_per_candidate_and_example": {"naive": spread(naive_seconds), "replay": spread(replay_seconds)},
            "ratio": naive_median / replay_median,
            "ratio_of_pairs": spread([n / r for n, r in zip(naive_seconds, replay_seconds, strict=True)]),
            "replay_prefill_seconds_per_example": prefill / len(examples),
            "largest_score_difference": difference,
            "same_text": {"equal": same, "of": arguments.pairs * len(examples)},
            "floor": {
                "seconds_per_candidate_and_example": floor,
                "gigaflop": 2 * matrices * answer / 1e9,
                "matrix_gigaflop_per_second": rate / 1e9,
                "replay_over_floor": replay_median / floor,
            },
            "seed": arguments.seed,
        },
        arguments.json,
    )


if __name__ == "__main__":
    run(main)
