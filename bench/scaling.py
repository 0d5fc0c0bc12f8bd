"""The demo's search on one and on two Ray workers of one thread each, and what recording it costs.

    python bench/scaling.py --json FILE [--context 1600] [--max-evals 340] [--pairs 3]

Candidates per second are counted over the generations of a search (prefill apart), in runs that alternate between one
worker and two. The histories of all runs, and of a run on the local backend, are compared. Recording is the share of
the local run's generations that goes into the study, in an SQLite file.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import evolkv
from common import count, finish, machine, parser, run, spread
from evolkv.evaluation.on_ray import RayBackend
from evolkv.evolution import SearchProgress
from evolkv.evolution.study import Study


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--context", type=count, default=1600)
    options.add_argument("--budget", type=count, default=128)
    options.add_argument("--train", type=count, default=6)
    options.add_argument("--max-evals", type=count, default=340)
    options.add_argument("--pairs", type=count, default=3)
    arguments = options.parse_args()
    model, tokenizer = evolkv.load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    settings: dict[str, Any] = {
        "task": f"niah:context={arguments.context}",
        "budget": arguments.budget,
        "granularity": "head",
        "train": arguments.train,
        "val": 1,
        "max_evals": arguments.max_evals,
        "seed": arguments.seed,
    }

    def search(**where: Any) -> tuple[float, list[dict[str, Any]]]:
        times = []

        def watch(step: SearchProgress) -> None:
            if step.stage == "search":
                times.append((time.perf_counter(), step.done))

        found = evolkv.search(model, tokenizer, on_progress=watch, **settings, **where)
        (first, before), (last, after) = times[0], times[-1]
        return (after - before) / (last - first), found.history

    recorded = []
    record = Study.record

    def timed(self: Study, *given: Any) -> None:
        started = time.perf_counter()
        record(self, *given)
        recorded.append(time.perf_counter() - started)

    Study.record = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        rate, local = search(storage=str(Path(folder) / "study.db"))
    share = sum(recorded) / (len(local) / rate)
    rates: dict[int, list[float]] = {1: [], 2: []}
    same = 0
    for _ in range(arguments.pairs):
        for workers in rates:
            found, history = search(backend=lambda n=workers: RayBackend(model, tokenizer, workers=n, cpus=1))
            rates[workers].append(found)
            same += history == local
    finish(
        {
            "benchmark": "scaling",
            "machine": machine(model.device),
            "model": arguments.model,
            "settings": settings,
            "candidates_per_second": {f"{n} workers": spread(values) for n, values in rates.items()} | {"local": rate},
            "ratio_of_pairs": spread([b / a for a, b in zip(rates[1], rates[2], strict=True)]),
            "same_history_as_local": f"{same} of {2 * arguments.pairs}",
            "recording": {"share_of_time": share, "seconds_per_generation": spread(recorded)},
        },
        arguments.json,
    )


if __name__ == "__main__":
    run(main)
