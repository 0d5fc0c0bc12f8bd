"""Score a short answer by the words that it shares with a reference: LongBench's F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from evolkv.tasks.metrics.chinese import words

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
#: LongBench's set, which is not all of Unicode's punctuation: "·" and "《" stay.
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "–—‘’‛“”„‟…‧﹏"
)
_NO_CHINESE_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation + _CHINESE_PUNCTUATION))


def qa_f1(prediction: str, references: Sequence[str], **extra: object) -> float:
    """Best F1 between the words of the prediction and those of a reference.

    Case, ASCII punctuation, the articles a, an and the, and the order of words do not count; repeated words do.
    Nothing in common gives 0, as do two empty texts.

    Source: `qa_f1_score` of LongBench (arXiv 2308.14508, table 1), after SQuAD (arXiv 1606.05250).
    """
    predicted = _english(prediction)
    return max((_f1(predicted, _english(reference)) for reference in references), default=0.0)


def qa_f1_zh(prediction: str, references: Sequence[str], **extra: object) -> float:
    """Best F1 between the Chinese words of the prediction and those of a reference.

    As `qa_f1`, with words found by jieba, Chinese punctuation ignored too, and articles counted.

    Source: `qa_f1_zh_score` of LongBench (arXiv 2308.14508, table 1).
    """
    predicted = _chinese(prediction)
    return max((_f1(predicted, _chinese(reference)) for reference in references), default=0.0)


def _english(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _chinese(text: str) -> list[str]:
    # Cut first: what jieba takes for a word depends on the punctuation around it.
    bare = ("".join(word.lower().translate(_NO_CHINESE_PUNCTUATION).split()) for word in words(text))
    return [word for word in bare if word]


def _f1(predicted: list[str], expected: list[str]) -> float:
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0
