"""Score a prediction that has to name the right paragraph."""

from __future__ import annotations

import re
from collections.abc import Sequence

from evolkv.errors import TaskError
from evolkv.tasks.metrics.count import share


def retrieval(prediction: str, references: Sequence[str], **extra: object) -> float:
    """Share of the numbers in the prediction that are the paragraph's, best over references like "Paragraph 7".

    Source: `retrieval_score` of LongBench (arXiv 2308.14508, table 1).

    Raises:
        TaskError: a reference names no paragraph.
    """
    return _best(prediction, references, "retrieval", "Paragraph ")


def retrieval_zh(prediction: str, references: Sequence[str], **extra: object) -> float:
    """Share of the numbers in the prediction that are the paragraph's, best over references like "段落7".

    Source: `retrieval_zh_score` of LongBench (arXiv 2308.14508, table 1).

    Raises:
        TaskError: a reference names no paragraph.
    """
    return _best(prediction, references, "retrieval_zh", "段落")


def _best(prediction: str, references: Sequence[str], metric: str, label: str) -> float:
    numbers = []
    for reference in references:
        match = re.search(label + r"(\d+)", reference)
        if match is None:
            raise TaskError(
                f"metric {metric!r}: reference {reference[:60]!r} names no paragraph; "
                f"expected a text with '{label}7', or take another metric"
            )
        numbers.append(match[1])
    return max((share(prediction, number) for number in numbers), default=0.0)
