"""Score a prediction by the share of its numbers that are the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence


def count(prediction: str, references: Sequence[str], **extra: object) -> float:
    """Share of the whole numbers in the prediction that equal a reference, best over the references.

    Numbers are compared digit by digit ("07" is not "7"); a prediction without any scores 0.

    Source: `count_score` of LongBench (arXiv 2308.14508, table 1).
    """
    return max((share(prediction, reference) for reference in references), default=0.0)


def share(prediction: str, number: str) -> float:
    """Share of the runs of digits in `prediction` that equal `number`; 0.0 if there are none."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0
