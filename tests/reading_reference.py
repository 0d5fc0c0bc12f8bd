"""RocketKV's second stage as its equations say it, entry by entry: slow, and without any of EvolKV."""

from __future__ import annotations

import math

import torch


class UndecidedError(Exception):
    """A choice hangs on rounding."""


def split(tokens, read):
    """What a head holds of a prompt under a token budget, as section 3.6 of the paper has it."""
    ratio = tokens / read
    return int(tokens / ratio ** min(0.2 + 0.06 * math.log2(ratio), 0.8))


def chosen(queries, keys, held, read, scaling, margin=0.0):
    """The entries that one token attends to, ascending.

    Args:
        queries: of the query heads that share the KV head, ``[heads, dim]``.
        keys: of the KV head, the new token's last, ``[entries, dim]``.
        held: entries that were held after the prompt.
        read: the token budget.
        scaling: of the model.
        margin: relative distance below which a choice is `UndecidedError`.
    """
    entries, dim = keys.shape
    if read >= held or entries <= read // 2:
        return list(range(entries))
    queries, keys = queries.double(), keys.double()
    compression = held / read
    page = math.ceil(math.sqrt(compression))
    if page > compression:
        page = 1
    count, wanted = max(1, int(dim * page / compression)), read // 2

    def best(values, number):
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        if 0 < number < len(values):
            last, first = values[order[number - 1]], values[order[number]]
            # Entries of one page are equal, and the older one comes first.
            if last != first and last - first < margin * max(abs(each) for each in values):
                raise UndecidedError
        return order[:number]

    channels = best(queries.abs().sum(0).tolist(), count)
    scores = []
    pages = [range(start, min(start + page, entries)) for start in range(0, entries, page)]
    for query in queries:
        logits = []
        for members in pages:
            total = 0.0
            for channel in channels:
                direction = float(queries[:, channel].sum())
                if page > 1 and abs(direction) < margin * float(queries[:, channel].abs().sum()):
                    raise UndecidedError
                found = [float(keys[member, channel]) for member in members]
                total += float(query[channel]) * (max(found) if direction > 0 else min(found))
            share = float(query[channels].abs().sum() / query.abs().sum())
            logits += [total * scaling / math.sqrt(share)] * len(members)
        scores.append(torch.tensor(logits, dtype=torch.float64).softmax(0))
    return sorted(best(torch.stack(scores).mean(0).tolist(), wanted))


def attended(queries, keys, values, which, scaling):
    """The attention of one token's queries ``[heads, dim]`` to some entries, ``[heads, dim]``."""
    weights = (queries.double() @ keys[which].double().T * scaling).softmax(-1)
    return weights @ values[which].double()
