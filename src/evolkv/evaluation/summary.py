"""Records summed up: a row for each task, method and budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from evolkv.evaluation.records import Record, Records, metrics_of
from evolkv.intervals import ci95


def summarise(records: Records) -> list[dict[str, Any]]:
    """Return the rows that follow from records, over the examples that all methods are done with; see `evaluate`."""
    settings = records.settings
    results = []
    for task in settings.tasks:
        finished = records.complete(task)
        for name, method in settings.methods.items() if finished else ():
            column = [example[name] for example in finished]
            scores = np.array([record.score for record in column])
            known = set(method.seen.get(task, ()))
            result: dict[str, Any] = {
                "model": settings.model.name,
                "task": task,
                "method": method.method,
                "budget": method.budget,
                "n": len(column),
                "metric": metrics_of(column),
                "score": float(scores.mean()),
                "ci95": list(ci95(scores)),
                "kv_bytes": float(np.mean([record.kv_bytes for record in column])),
                "read_bytes": float(np.mean([record.read_bytes or record.kv_bytes for record in column])),
                "mean_budget": float(np.mean([record.mean_budget for record in column])),
                "prefill_factor": float(np.mean([record.prefill_factor for record in column])),
                **_prefill_share(column),
                **_beside_companion(column),
                "seed": settings.seed,
                "protocol": settings.protocol,
                "dtype": settings.model.dtype,
            }
            where_known: dict[str, Any] = {
                "haystack": settings.tasks[task].haystack,
                "prefill_chunk": settings.prefill_chunk,
                "block_size": settings.block_size,
                "expanded_from": method.expanded_from,
                "seen": sum(record.example in known for record in column) or None,
                "bins": _by_bin(column) or None,
            }
            results.append(result | {key: value for key, value in where_known.items() if value is not None})
    return results


def _prefill_share(column: Sequence[Record]) -> dict[str, float]:
    """Return the mean share of a plain prefill, where a method computes less."""
    shares = [record.prefill_share for record in column]
    return {"prefill_share": float(np.mean(shares))} if min(shares) < 1 else {}


def _beside_companion(column: Sequence[Record]) -> dict[str, float]:
    """Return what a step needs of the model's own cache, and the companion's cache, where there is one."""
    if not any(record.companion_bytes for record in column):
        return {}
    companion = float(np.mean([record.companion_bytes for record in column]))
    read = float(np.mean([record.read_bytes or record.kv_bytes for record in column]))
    return {"resident_bytes": read - companion, "companion_bytes": companion}


def _by_bin(column: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Return the mean score and number of examples of each bin of length, where a task has bins."""
    scores = defaultdict(list)
    for record in column:
        if "bin" in record.extra:
            scores[str(record.extra["bin"])].append(record.score)
    return {name: {"n": len(each), "score": float(np.mean(each))} for name, each in sorted(scores.items())}
