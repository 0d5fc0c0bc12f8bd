"""Whether the prediction is an answer."""

from __future__ import annotations

from collections.abc import Sequence


def normalise(text: str) -> str:
    """`text` without case differences and surrounding whitespace, inner whitespace collapsed to one space.

    Punctuation and articles stay: "the answer" and "answer." both differ from "answer".
    """
    return " ".join(text.casefold().split())


def exact_match(prediction: str, references: Sequence[str], **extra: object) -> float:
    """1.0 if the prediction equals any reference after `normalise`, else 0.0."""
    text = normalise(prediction)
    return float(any(normalise(reference) == text for reference in references))
