"""Score a worked solution by the number that it arrives at."""

from __future__ import annotations

import re
from collections.abc import Sequence

from evolkv.registry import unknown_name

_NUMBERS = {
    "flexible": re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+"),
    "strict": re.compile(r"(?<=#### )-?[0-9.,]+"),
}
_IGNORED = [re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$")]


def gsm8k(prediction: str, references: Sequence[str], *, mode: object = "flexible", **extra: object) -> float:
    """1.0 if the number in the prediction equals that of any reference, else 0.0; 0.0 too if there is no number.

    Numbers are compared as texts, without commas, dollar signs and a final full stop: "18.00" is not "18".
    A reference may be a whole solution that ends in "#### 18", or the number alone.

    Source: the filters and metric of lm-evaluation-harness's task `gsm8k`, version 3; data: arXiv 2110.14168.
    That task also ends a generation at "Question:", "</s>" and "<|im_end|>", which is not a metric's to do.

    Args:
        prediction: the model's text.
        references: right answers, at least one.
        mode: "flexible" (default) takes the last number, the harness's `flexible-extract`; "strict" the first
            that follows "#### ", its `strict-match`.
        extra: ignored.

    Raises:
        UsageError: an unknown mode.
    """
    if not isinstance(mode, str) or mode not in _NUMBERS:
        raise unknown_name("gsm8k mode", mode, _NUMBERS)
    numbers = _NUMBERS[mode].findall(prediction)
    if not numbers:
        return 0.0
    answer = _bare(numbers[-1] if mode == "flexible" else numbers[0])
    return float(any(_bare(reference) == answer for reference in references))


def _bare(text: str) -> str:
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()
