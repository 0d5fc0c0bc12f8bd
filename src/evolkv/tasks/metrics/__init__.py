"""Metrics: prediction × references → score in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from evolkv.errors import UsageError
from evolkv.registry import Registry, unknown_name
from evolkv.tasks.metrics.classification import classification
from evolkv.tasks.metrics.code_sim import code_sim
from evolkv.tasks.metrics.contains import contains
from evolkv.tasks.metrics.count import count
from evolkv.tasks.metrics.exact_match import exact_match
from evolkv.tasks.metrics.gsm8k import gsm8k
from evolkv.tasks.metrics.qa_f1 import qa_f1, qa_f1_zh
from evolkv.tasks.metrics.retrieval import retrieval, retrieval_zh
from evolkv.tasks.metrics.rouge_l import rouge_l, rouge_l_zh
from evolkv.tasks.metrics.ruler import ruler_all, ruler_part

__all__ = ["LABEL_FREE", "METRICS", "MODEL_METRICS", "Metric", "get_metric"]

#: Metrics that need no reference answer: they compare with the model's own under the full cache.
LABEL_FREE = ("fidelity", "agreement")
#: Metrics of what the model predicts, and what each is; engines compute them, with `evolkv.evaluation.scoring.SCORERS`.
MODEL_METRICS = {
    "logprob": "The geometric mean of the reference tokens' probabilities (1 / perplexity), in [0, 1].",
    "fidelity": "Share of the full cache's behaviour that is kept: exp(-KL), the mean over its own answer, in [0, 1].",
    "agreement": "Share of its own answer's tokens whose most probable token stays that of the full cache, in [0, 1].",
}


class Metric(Protocol):
    """A text metric: `metric(prediction, references, **extra)` is the best score over the references."""

    def __call__(self, prediction: str, references: Sequence[str], **extra: object) -> float:
        """Score in [0, 1].

        Args:
            prediction: the text to judge.
            references: the acceptable answers.
            extra: what this metric alone needs, such as `all_classes`.
        """


#: Text metrics by name.
METRICS: Registry[Metric] = Registry(
    "metric",
    {
        "classification": classification,
        "code_sim": code_sim,
        "contains": contains,
        "count": count,
        "exact_match": exact_match,
        "gsm8k": gsm8k,
        "qa_f1": qa_f1,
        "qa_f1_zh": qa_f1_zh,
        "retrieval": retrieval,
        "retrieval_zh": retrieval_zh,
        "rouge_l": rouge_l,
        "rouge_l_zh": rouge_l_zh,
        "ruler_all": ruler_all,
        "ruler_part": ruler_part,
    },
    "evolkv.metrics",
)


def check_metric(name: object) -> None:
    """Raise UsageError, with the nearest name, unless `name` is a text metric or one of `MODEL_METRICS`."""
    if not (isinstance(name, str) and (name in MODEL_METRICS or name in METRICS)):
        raise unknown_name("metric", name, [*METRICS, *MODEL_METRICS])


def judged_part(prediction: str, stop: Sequence[str], first_line: bool) -> str:
    """Return the part of a prediction that a text metric judges; see `Example.stop` and `Example.first_line`."""
    for text in stop:
        prediction = prediction.partition(text)[0]
    return prediction.lstrip("\n").partition("\n")[0] if first_line else prediction


def get_metric(name: str) -> Metric:
    """Return the text metric of that name.

    Args:
        name: as `METRICS` has it.

    Raises:
        UsageError: an unknown name, or one of `MODEL_METRICS`, which judge probabilities and have no text to look at.
    """
    check_metric(name)
    if name in MODEL_METRICS:
        raise UsageError(
            f"metric {name!r} scores probabilities, not text; leave it to the engine or take a text metric"
        )
    return METRICS[name]
