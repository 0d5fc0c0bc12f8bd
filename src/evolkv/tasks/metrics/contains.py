"""Score a prediction that has to contain an answer."""

from __future__ import annotations

from collections.abc import Sequence

from evolkv.tasks.metrics.exact_match import folded


def contains(prediction: str, references: Sequence[str], **extra: object) -> float:
    """1.0 if any reference occurs in the prediction, whatever the case and Unicode form of letters, else 0.0.

    Whitespace around a reference is ignored; an empty reference never counts.
    """
    text = folded(prediction)
    wanted = (folded(reference.strip()) for reference in references)
    return float(any(reference and reference in text for reference in wanted))
