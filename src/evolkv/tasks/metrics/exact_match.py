"""Score a prediction that has to be an answer."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def exact_match(prediction: str, references: Sequence[str], **extra: object) -> float:
    """1.0 if the prediction equals any reference, else 0.0.

    Case, whitespace around the text, the length of whitespace within it and the Unicode form of its letters do not
    count. Punctuation and articles do: "the answer" and "answer." both differ from "answer".
    """
    text = _normalised(prediction)
    return float(any(_normalised(reference) == text for reference in references))


def folded(text: str) -> str:
    """Return `text` without differences of case and of Unicode form: "É" is one letter or "E" and an accent."""
    return unicodedata.normalize("NFC", text.casefold())


def _normalised(text: str) -> str:
    return " ".join(folded(text).split())
