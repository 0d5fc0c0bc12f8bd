"""Score a summary by the longest sequence of words that it shares with a reference: ROUGE-L."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from evolkv.tasks.metrics.chinese import words


def rouge_l(prediction: str, references: Sequence[str], **extra: object) -> float:
    """Best ROUGE-L F1 (of whole summaries, sentences ending at ".") between the prediction and a reference.

    A text without a sentence scores 0, and so does, as in LongBench, a pair that the `rouge` library gives up
    on: one with sentences so long (about 1,000 words together) that its recursion meets the interpreter's limit.
    Values are the library's, whose smoothing puts a perfect match 5e-9 below 1.

    Source: `rouge_score` of LongBench (arXiv 2308.14508, table 1); Lin, "ROUGE" (W04-1013, section 3.2).
    """
    return max((_score(prediction, reference) for reference in references), default=0.0)


def rouge_l_zh(prediction: str, references: Sequence[str], **extra: object) -> float:
    """Best ROUGE-L F1 between the Chinese words of the prediction and those of a reference.

    As `rouge_l`, with words found by jieba. "。" ends no sentence, so that most texts count as a single one.

    Source: `rouge_zh_score` of LongBench (arXiv 2308.14508, table 1).
    """
    return rouge_l(" ".join(words(prediction)), [" ".join(words(reference)) for reference in references])


def _score(prediction: str, reference: str) -> float:
    from rouge import Rouge

    rouge = Rouge(metrics=["rouge-l"], stats=["f"])
    # The library recurses once per word. In a thread of its own that starts from an empty stack, so what is too
    # long for it does not depend on who calls.
    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            scores = thread.submit(rouge.get_scores, [prediction], [reference], avg=True).result()
        except (ValueError, RecursionError):
            return 0.0
    return float(scores["rouge-l"]["f"])
