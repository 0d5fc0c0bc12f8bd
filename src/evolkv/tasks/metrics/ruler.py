"""Score a prediction by which of the answers occur in the prediction: the two metrics of RULER."""

from __future__ import annotations

from collections.abc import Sequence


def ruler_all(prediction: str, references: Sequence[str], **extra: object) -> float:
    """Share of the references that occur in the prediction, whatever the case of letters.

    Source: `string_match_all` of RULER (arXiv 2404.06654), for one prediction and not in percent.
    """
    hits = _hits(prediction, references)
    return sum(hits) / len(hits) if hits else 0.0


def ruler_part(prediction: str, references: Sequence[str], **extra: object) -> float:
    """1.0 if any reference occurs in the prediction, whatever the case of letters, else 0.0.

    Unlike `contains`, whitespace around a reference counts, and an empty reference is found in every text.

    Source: `string_match_part` of RULER (arXiv 2404.06654), for one prediction and not in percent.
    """
    return float(any(_hits(prediction, references)))


def _hits(prediction: str, references: Sequence[str]) -> list[bool]:
    text = prediction.lower()
    return [reference.lower() in text for reference in references]
