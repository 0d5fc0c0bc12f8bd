"""Whether an answer occurs in the prediction."""

from __future__ import annotations

from collections.abc import Sequence


def contains(prediction: str, references: Sequence[str], **extra: object) -> float:
    """1.0 if any reference occurs in the prediction, whatever the case of letters, else 0.0.

    Whitespace around a reference is ignored; an empty reference never counts.
    """
    text = prediction.casefold()
    wanted = (reference.strip().casefold() for reference in references)
    return float(any(reference and reference in text for reference in wanted))
