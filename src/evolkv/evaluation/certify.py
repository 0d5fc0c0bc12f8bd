"""The smallest budget that is safe: its expected loss against the full cache is below a bound, with high confidence.

Angelopoulos, Bates, Candès, Jordan, Lei 2021, "Learn then test", arXiv 2110.01052: fixed-sequence testing (section 2.4)
from the largest budget down, with p-values that hold for any number of examples (section 2.2 and appendix B).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv.budgets import size_of
from evolkv.errors import UsageError
from evolkv.evaluation.records import Records, metrics_of, read_records

FORMAT = "evolkv.certificates/1"
FULL = "full"
#: More examples than anyone asks for.
_MOST_EXAMPLES = 10_000_000
#: A sum of scores that differs from a whole number by less is that number.
_ROUNDING = 1e-9

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tested:
    """The test of one budget.

    Args:
        budget: mean cache entries per KV head, or a share of each prompt, such as ``10%``.
        loss: mean of ``max(0, full − score)`` over the examples.
        difference: mean of ``full − score``; gains on some examples make up for losses on others here.
        p: chance of a loss so small, if the expected loss were above the bound.
        certified: whether this budget, and all larger ones, passed.
    """

    budget: int | str
    loss: float
    difference: float
    p: float
    certified: bool


@dataclass(frozen=True)
class Certificate:
    """The smallest safe budget of one method on one task.

    Args:
        n: examples.
        budget: the smallest budget certified, or None.
        tested: budgets, largest first, down to the first that failed. Smaller ones are not tested: that is what makes
            the confidence hold for the one returned.
        needed: examples after which the budget that failed would pass, if its mean loss stayed what it is; None if it
            is not below the bound, or none failed.
        exact: whether p is that of the binomial test, because all scores are 0 or 1; else it is Hoeffding-Bentkus.
    """

    n: int
    budget: int | str | None
    tested: list[Tested]
    needed: int | None
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class RecordsCertificate:
    """Certificates of all methods on record.

    Args:
        model: its name.
        loss: the bound.
        confidence: of each certificate by itself.
        rows: task, metric, method and certificate.
    """

    model: str
    loss: float
    confidence: float
    rows: list[tuple[str, str, str, Certificate]]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a ``--json`` file."""
        rows = [
            {"task": task, "metric": metric, "method": method, **found.to_dict()}
            for task, metric, method, found in self.rows
        ]
        return {
            "format": FORMAT,
            "model": self.model,
            "loss": self.loss,
            "confidence": self.confidence,
            "rows": rows,
        }


def certify(
    full: ArrayLike,
    scores: Mapping[int, ArrayLike] | Mapping[int | str, ArrayLike],
    loss: float = 0.05,
    confidence: float = 0.95,
) -> Certificate:
    """Find the smallest budget whose expected loss against the full cache is below a bound.

    The loss on an example is ``max(0, full − score)``, in [0, 1]: an example that a method answers better than the full
    cache does not make up for one that it answers worse. So the expected difference ``full − score`` is below the bound
    as well. Budgets are tested from the largest down, until one fails, each at the same level 1 − confidence; the
    chance that the budget returned is not safe is at most that.

    The examples must be independent of each other, and neither searched nor chosen on.

    Args:
        full: scores of the full cache, ``[examples]``, in [0, 1].
        scores: by budget, scores of the method on the same examples, ``[examples]``.
        loss: the bound, above 0 and below 1.
        confidence: above 0 and below 1.

    Raises:
        UsageError: a bound or a confidence out of range, no scores, or scores that are not of the same examples.
    """
    check_bounds(loss, confidence)
    whole = np.asarray(full, dtype=np.float64)
    by_budget: dict[int | str, NDArray[np.float64]] = {
        budget: np.asarray(each, dtype=np.float64) for budget, each in scores.items()
    }
    for each in (whole, *by_budget.values()):
        if each.ndim != 1 or each.shape != whole.shape or not len(each):
            raise UsageError(f"scores have the shapes {whole.shape} and {each.shape}; give one per example for each")
        if not ((each >= 0) & (each <= 1)).all():
            raise UsageError("scores must be in [0, 1]; leave out the examples that have none")
    n = len(whole)
    exact = all(np.isin(each, (0.0, 1.0)).all() for each in (whole, *by_budget.values()))
    tested: list[Tested] = []
    for budget in sorted(by_budget, key=size_of, reverse=True):
        difference = whole - by_budget[budget]
        mean = float(np.maximum(difference, 0.0).mean())
        p = float(p_value(mean, n, loss, exact))
        tested.append(Tested(budget, mean, float(difference.mean()), p, p <= 1 - confidence))
        if not tested[-1].certified:
            break
    passed = [each.budget for each in tested if each.certified]
    failed = [each for each in tested if not each.certified]
    needed = examples_needed(failed[0].loss, loss, confidence, exact) if failed else None
    return Certificate(n, passed[-1] if passed else None, tested, needed, exact)


def check_bounds(loss: float, confidence: float) -> None:
    """Raise `UsageError` for a bound or a confidence that nothing can be certified at."""
    for name, value in (("--loss", loss), ("--confidence", confidence)):
        if not 0 < value < 1:
            raise UsageError(f"{name} is {value}; expected a number above 0 and below 1, such as 0.05 or 0.95")


def p_value(mean: ArrayLike, n: int, bound: float, exact: bool) -> NDArray[np.float64]:
    """Return the chance of a mean loss so small over n examples, if the expected loss were above the bound.

    Args:
        mean: mean losses in [0, 1], of any shape.
        n: examples.
        bound: α.
        exact: whether each loss is 0 or 1. Then p is the binomial test's, else the smaller of Hoeffding's and Bentkus'
            bounds (Bates et al. 2021, arXiv 2101.02703, theorem 1 and section 3.1.2).

    Returns:
        Values of the shape of `mean`, in [0, 1].
    """
    mean = np.asarray(mean, dtype=np.float64)
    # The least whole number of losses that makes this mean.
    count = np.clip(np.ceil(n * mean - _ROUNDING), 0, n).astype(np.int64)
    tail = _binomial(int(count.max()), n, bound)[count]
    if exact:
        return tail
    below = np.minimum(mean, bound)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(below > 0, below * np.log(below / bound), 0.0)
        divergence += np.where(below < 1, (1 - below) * np.log((1 - below) / (1 - bound)), 0.0)
    return np.minimum(np.exp(-n * divergence), np.minimum(1.0, math.e * tail))


def _binomial(most: int, n: int, p: float) -> NDArray[np.float64]:
    """Return the chance of at most k successes in n trials, for k from 0 to `most`."""
    k = np.arange(1, most + 1)
    chosen = np.concatenate([[0.0], np.cumsum(np.log((n - k + 1) / k))])
    k = np.arange(most + 1)
    return np.minimum(1.0, np.cumsum(np.exp(chosen + k * math.log(p) + (n - k) * math.log1p(-p))))


def examples_needed(mean: float, bound: float, confidence: float, exact: bool) -> int | None:
    """Return about how many examples certify a mean loss; None if it is not below the bound, or beyond ten million."""
    if mean >= bound:
        return None
    few, many = 0, 16
    while p_value(mean, many, bound, exact) > 1 - confidence:
        few, many = many, 2 * many
        if many > _MOST_EXAMPLES:
            return None
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if p_value(mean, middle, bound, exact) <= 1 - confidence else (middle, many)
    return many


def certify_records(path: str | os.PathLike[str], loss: float = 0.05, confidence: float = 0.95) -> RecordsCertificate:
    """Certify every method that is on record beside the full cache; see `certify`.

    A profile's own examples, those it was evolved or chosen on, are left out with a warning.

    Args:
        path: a file of records (``evolkv eval --records``) with ``full`` among its methods.
        loss: the bound.
        confidence: of each certificate by itself.

    Raises:
        UsageError: as `certify`; a file that cannot be read, without ``full`` or another method, or without an example
            that all methods are done with.
    """
    check_bounds(loss, confidence)
    records = read_records(path)
    settings = records.settings
    if FULL not in settings.methods:
        raise UsageError(f"{path}: has no method full to measure the loss against; evaluate with --method full …")
    names = list(dict.fromkeys(each.method for each in settings.methods.values() if each.budget is not None))
    if not names:
        raise UsageError(f"{path}: has only the full cache; evaluate a method at several budgets with it")
    records.warn_unfinished(path, "the bound holds only if the scores did not decide when it stopped")
    rows = []
    for task in settings.tasks:
        finished = records.complete(task)
        if not finished:
            raise UsageError(f"{path}: no example of {task} is done under all methods; let the evaluation go on")
        for name in names:
            column = [by_method[FULL] for by_method in finished]
            rows.append((task, metrics_of(column), name, _certificate(path, records, task, name, loss, confidence)))
    return RecordsCertificate(settings.model.name, loss, confidence, rows)


def _certificate(
    path: str | os.PathLike[str], records: Records, task: str, name: str, loss: float, confidence: float
) -> Certificate:
    at = {each.budget: label for label, each in records.settings.methods.items() if each.method == name}
    if len({isinstance(budget, str) for budget in at}) > 1:
        raise UsageError(
            f"{path}: {name} has budgets in entries and in shares of each prompt, which have no order among them; "
            "evaluate it with one kind"
        )
    seen = {one for label in at.values() for one in records.settings.methods[label].seen.get(task, ())}
    finished = records.complete(task)
    fresh = [by_method for by_method in finished if by_method[FULL].example not in seen]
    if len(fresh) < len(finished):
        log.warning(
            "%s was evolved or chosen on %d of the %d examples of %s; these are left out, as a bound needs unseen ones",
            name,
            len(finished) - len(fresh),
            len(finished),
            task,
        )
    if not fresh:
        raise UsageError(f"{path}: {name} was evolved or chosen on every example of {task}; evaluate it on unseen ones")

    def column(label: str) -> list[float]:
        return [by_method[label].score for by_method in fresh]

    scores = {budget: column(label) for budget, label in at.items() if budget is not None}
    return certify(column(FULL), scores, loss, confidence)
