"""Score a prediction that has to name the right class, and no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evolkv.errors import TaskError


def classification(prediction: str, references: Sequence[str], *, all_classes: Any = None, **extra: object) -> float:
    """1 / n where the prediction names n classes and a reference is among them, else 0.0; best over the references.

    A class is named if it occurs in the prediction, in the same case. One that is merely part of the reference
    ("soccer" in "soccer player") is not counted, unless it follows right after another such class: LongBench's
    loop drops entries of the list that it walks through, and scores are to be comparable.

    Source: `classification_score` of LongBench (arXiv 2308.14508, table 1).

    Args:
        prediction: the model's text.
        references: right classes, at least one.
        all_classes: names of all classes, a sequence of texts. Required.
        extra: ignored.

    Raises:
        TaskError: `all_classes` is missing or a single text.
    """
    if all_classes is None or isinstance(all_classes, str):
        raise TaskError(
            "metric 'classification' needs the names of all classes; "
            "give the example a list of texts as 'all_classes', or take another metric"
        )
    named = [name for name in all_classes if name in prediction]
    return max((_score(named, reference) for reference in references), default=0.0)


def _score(named: list[str], reference: str) -> float:
    counted = list(named)
    index = 0
    while index < len(counted):
        name = counted[index]
        if name != reference and name in reference:
            counted.remove(name)
        index += 1
    return 1 / len(counted) if reference in counted else 0.0
