"""The choice among evolved allocations and those that need no search, on examples that it did not train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evolkv.errors import UsageError
from evolkv.evaluation.balance import BalancedEngine
from evolkv.evaluation.engine import Engine
from evolkv.evolution.result import Validated, as_lists
from evolkv.evolution.space import NOT_EVOLVED
from evolkv.intervals import ci95
from evolkv.tasks import Example

# Two allocations whose scores differ by no more than rounding are equal.
_DIGITS = 4


def choose(engine: Engine, choices: dict[str, dict[str, np.ndarray]]) -> dict[str, list[Validated]]:
    """Score the allocations of several choices at once, and put the one to choose first.

    On a tie the one that needed no search comes first.

    Args:
        engine: over the validation examples.
        choices: by name of the choice, allocations ``[layers, kv_heads]`` by name.

    Returns:
        By name of the choice, the allocations with their scores, best first.
    """
    # Each allocation once, whatever its names: scored twice, it would differ from itself by rounding.
    once = {_key(budgets): budgets for part in choices.values() for budgets in part.values()}
    scores = engine.score(np.stack([*once.values()]))
    retained = engine.retained.tolist() if isinstance(engine, BalancedEngine) else [None] * len(scores)
    scored = dict(zip(once, zip(scores, retained, strict=True), strict=True))
    validated = {}
    for choice, part in choices.items():
        rows = []
        for name, budgets in part.items():
            own, kept = scored[_key(budgets)]
            score = round(float(own.mean()), _DIGITS)
            evolved = name not in NOT_EVOLVED
            rows.append(Validated(name, evolved, as_lists(budgets), score, ci95(own), len(own), own.tolist(), kept))
        validated[choice] = sorted(rows, key=lambda row: (-row.score, row.evolved))
    return validated


def _key(budgets: np.ndarray) -> tuple[int, ...]:
    return tuple(budgets.ravel().tolist())


def rows_from(data: list[dict[str, Any]]) -> list[Validated]:
    """Return allocations from the rows that `as_rows` made of them."""
    return [Validated(**{**row, "ci95": tuple(row["ci95"])}) for row in data]


def check_unseen(train: Sequence[Example], held_out: Sequence[Example]) -> None:
    """Raise `UsageError` if an example to choose on is a training example, too."""
    trained = {(example.prompt, example.later) for example in train}
    twice = [example.id for example in held_out if (example.prompt, example.later) in trained]
    if twice:
        raise UsageError(
            f"{len(twice)} of {len(held_out)} validation examples are training examples too, such as {twice[0]}, so "
            "that nothing would be chosen on unseen ones; give the task more rows, or use a smaller --train or --val"
        )
