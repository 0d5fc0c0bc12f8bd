"""SmallKV as its paper says it, token by token: slow, and without any of EvolKV."""

from __future__ import annotations

from fractions import Fraction

import torch


class UndecidedError(Exception):
    """A choice hangs on rounding."""


def best(values, number, margin=0.0):
    """The places of the highest values, of equal ones the first."""
    values = values.tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    if 0 < number < len(values) and values[order[number - 1]] - values[order[number]] < margin * max(values):
        raise UndecidedError
    return order[:number]


def partner(own, theirs, margin=0.0):
    """The companion's head with the greatest Jaccard index of most attended tokens; of equal ones the nearest.

    Args:
        own: attention that each of the first tokens of a prompt receives in a head, ``[tokens]``.
        theirs: the same in each head of the companion, ``[heads, tokens]``.
        margin: relative distance below which a choice is `UndecidedError`.
    """
    count = max(1, len(own) // 10)
    mine, fits = set(best(own, count, margin)), []
    for j, other in enumerate(theirs):
        its = set(best(other, count, margin))
        fits.append((len(mine & its) / len(mine | its), -float((own - other).abs().sum()), j))
    fits.sort(reverse=True)
    if len(fits) > 1 and fits[0][0] == fits[1][0] and fits[0][1] - fits[1][1] < margin * len(own):
        raise UndecidedError
    return fits[0][2]


def classes(selector, budget, tokens):
    """How many entries of a prompt are critical, recent and marginal; None where all are read exactly."""
    if budget >= tokens:
        return None
    whole = selector.critical + selector.recent + Fraction(selector.marginal, 2)
    recent = max(1, int(budget * selector.recent / whole)) if selector.recent else 0
    halves = min(int(budget * Fraction(selector.marginal, 2) / whole), tokens - budget)
    return budget - recent - halves, recent, 2 * halves


def chosen(received, critical, marginal, margin=0.0):
    """The critical and the marginal entries, by the attention they received, ``[entries]``."""
    ranked = best(received, critical, margin)
    both = best(received, critical + marginal, margin)
    assert both[:critical] == ranked
    return ranked, both[critical:]


def attended(queries, keys, values, exact, weights, scaling):
    """Equation 6 with the scale that makes it exact: ``[heads, dim]``.

    Args:
        queries: of the heads that share a KV head, ``[heads, dim]``.
        keys, values: of the KV head, ``[entries, dim]``.
        exact: the entries that are attended to.
        weights: the companion's attention to the marginal ones, 0 elsewhere, ``[heads, entries]``.
        scaling: of the model.
    """
    attention = torch.zeros_like(weights)
    attention[:, exact] = (queries @ keys[exact].T * scaling).softmax(-1)
    return (attention * (1 - weights.sum(1, keepdim=True)) + weights) @ values
