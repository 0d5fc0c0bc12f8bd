"""Continuing a prefilled prompt: teacher-forced, or greedily, many rows at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.cache.compressed import CompressedCache
from evolkv.cache.replay import ReplayCache
from evolkv.errors import RunError
from evolkv.evaluation.workers import check_wanted

#: Turns logits ``[rows, read, vocabulary]`` into a value for each of the tokens ``[rows, read]`` that they predict, of
#: which the first is token number `first` of each row's text: float32, ``[rows, read]``.
Judge = Callable[[Tensor, Tensor, int], Tensor]

# Memory limit for the logits of one pass, and bytes per logit: in the model's dtype, in float32, and as log-softmax.
_LOGITS_BYTES, _BYTES_PER_LOGIT = 2**30, 12


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Return the token ids that end a text: the generation config's and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    ids.add(tokenizer.eos_token_id)
    return frozenset(int(i) for i in ids if i is not None)


class RepetitionPenalty:
    """Makes tokens that a row has seen less probable, as `generate()` does under ``repetition_penalty``.

    Keskar et al. 2019, "CTRL", arXiv 1909.05858, section 4.1, over prompt and answer as in transformers.

    Args:
        factor: logits of seen tokens are divided by it where positive, else multiplied.
        seen: token ids that each row begins with, ``[tokens]`` int64.
        logits: ``[rows, vocabulary]``, for their shape and device.
    """

    def __init__(self, factor: float, seen: Sequence[Tensor], logits: Tensor):
        self.factor = factor
        self.seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        for row, ids in enumerate(seen):
            self.seen[row, ids.to(logits.device)] = True

    @classmethod
    def of(
        cls, model: PreTrainedModel, prompts: Sequence[Tensor], later: Tensor, logits: Tensor
    ) -> RepetitionPenalty | None:
        """Return the one of the model's generation config, over each row's prompt and what all read later, or None."""
        factor = getattr(model.generation_config, "repetition_penalty", None)
        if factor is None or factor == 1:
            return None
        return cls(factor, [torch.cat([ids, later.to(ids.device)]) for ids in prompts], logits)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the logits after the penalty."""
        penalised = torch.where(logits < 0, logits * self.factor, logits / self.factor)
        return torch.where(self.seen, penalised, logits)

    def add(self, newest: Tensor) -> None:
        """Count a new token of each row, ``[rows]``, as seen."""
        self.seen.scatter_(1, newest[:, None], True)


def target_log_probs(
    model: PreTrainedModel,
    cache: CompressedCache | ReplayCache,
    next_logits: Tensor,
    tokens: Sequence[int],
    targets: Sequence[Tensor],
    later: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return the log-probability of each token of given continuations, teacher-forced; see `judge_targets`."""
    return judge_targets(model, cache, next_logits, tokens, targets, later, _log_probs)


def _log_probs(logits: Tensor, expected: Tensor, first: int) -> Tensor:
    """Return the log-probabilities of the tokens that came; see `Judge`."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), expected.flatten(), reduction="none")
    return -loss.view(expected.shape)


def judge_targets(
    model: PreTrainedModel,
    cache: CompressedCache | ReplayCache,
    next_logits: Tensor,
    tokens: Sequence[int],
    targets: Sequence[Tensor],
    later: Sequence[Tensor] | None,
    judge: Judge,
) -> list[Tensor]:
    """Return a value for each token of given continuations, teacher-forced.

    That takes one forward pass where logits are small.

    Args:
        model: the model.
        cache: holds the prompts, one row each.
        next_logits: logits of the first new token, ``[rows, vocabulary]``.
        tokens: length of each row's prompt.
        targets: each row's continuation, ``[target]`` int64, at least one token.
        later: what each row reads between its prompt and its continuation, ``[question]`` int64; None for nothing.
        judge: gives the values. It may be asked about tokens before and behind a row's continuation, too.

    Returns:
        By row, ``[target]`` float32.
    """
    device = next_logits.device
    skipped = [0] * len(targets) if later is None else [len(question) for question in later]
    texts = targets if later is None else [torch.cat(pair) for pair in zip(later, targets, strict=True)]
    # What stands behind a shorter text is never looked at: attention is causal.
    padded = torch.nn.utils.rnn.pad_sequence([text.to(device) for text in texts], batch_first=True)
    first = judge(next_logits[:, None], padded[:, :1], 0)
    width, least = padded.shape[1], min(skipped)
    if width == 1:
        return list(first)
    position = torch.tensor(tokens, device=device)[:, None] + torch.arange(padded.shape[1] - 1, device=device)
    fan = cache.fan if isinstance(cache, ReplayCache) else 1
    # No logits for questions: over the vocabulary they would be most of the memory. Long answers are read in pieces.
    total, kept = width - 1, min(width - 1, width - least)
    piece = total
    if isinstance(cache, CompressedCache):
        piece = max(1, _LOGITS_BYTES // (_BYTES_PER_LOGIT * next_logits.shape[-1] * len(targets)))
    pieces: list[Tensor] = []
    start, end = 0, min(total, total - kept + piece)
    with torch.inference_mode():
        while start < total:
            check_wanted()
            wanted = end - max(start, total - kept)
            cache.expect_answers([max(0, skip - start) for skip in skipped])
            output = model(
                padded[::fan, start:end],
                cache=cache,
                position_ids=position[::fan, start:end],
                use_cache=True,
                logits_to_keep=wanted,
            )
            pieces.append(judge(output.logits, padded[:, end + 1 - wanted : end + 1], end + 1 - wanted))
            start, end = end, min(total, end + piece)
    rest = torch.cat(pieces, dim=1)
    scored = torch.cat([first, rest], dim=1) if least == 0 else rest
    return [row[skip - least :][: len(target)] for row, skip, target in zip(scored, skipped, targets, strict=True)]


def greedy(
    model: PreTrainedModel,
    cache: CompressedCache | ReplayCache,
    next_logits: Tensor,
    tokens: Sequence[int],
    max_new_tokens: Sequence[int],
    end: Collection[int],
    later: Tensor | None = None,
    penalty: RepetitionPenalty | None = None,
    keep_end: bool = False,
) -> list[list[int]]:
    """Return greedy continuations of all rows, stopping as soon as all rows have ended.

    Args:
        model: the model.
        cache: holds the prompts, one row each.
        next_logits: logits of the first new token, ``[rows, vocabulary]``.
        tokens: length of each row's prompt.
        max_new_tokens: the most tokens to generate, for each row.
        end: token ids that end a row.
        later: what all rows read between prompt and continuation, ``[question]`` int64; None for nothing.
        penalty: what makes tokens less probable that a row has seen, `later` included; None for nothing.
        keep_end: whether the token that ended a row is part of the result.

    Returns:
        Token ids by row.

    Raises:
        RunError: if the logits are not numbers.
    """
    texts: list[list[int]] = [[] for _ in tokens]
    running = [limit > 0 for limit in max_new_tokens]
    position = torch.tensor(tokens, device=next_logits.device)
    if later is not None and len(later):
        question = later.to(position.device).expand(len(texts), -1)
        places = position[:, None] + torch.arange(len(later), device=position.device)
        with torch.inference_mode():
            output = model(question, cache=cache, position_ids=places, use_cache=True, logits_to_keep=1)
        next_logits, position = output.logits[:, -1], position + len(later)
    newest = most_probable(next_logits, penalty)
    while True:
        check_wanted()
        for row, token in enumerate(newest.tolist()):
            if running[row] and token in end:
                texts[row] += [token] * keep_end
                running[row] = False
            elif running[row]:
                texts[row].append(token)
                running[row] = len(texts[row]) < max_new_tokens[row]
        if not any(running):
            return texts
        with torch.inference_mode():
            output = model(newest[:, None], cache=cache, position_ids=position[:, None], use_cache=True)
        newest = most_probable(output.logits[:, -1], penalty)
        position = position + 1


def not_a_number() -> RunError:
    """Return the error for a model that overflows."""
    return RunError(
        "what the model computes is not a number: its number format is too narrow, or its weights are damaged; "
        "try --dtype float32 or --dtype bfloat16"
    )


def most_probable(logits: Tensor, penalty: RepetitionPenalty | None = None) -> Tensor:
    """Return the most probable token of each row, ``[rows]``; RunError if the logits are not numbers."""
    # The largest of values of which one is not a number is not a number either.
    largest, newest = (logits if penalty is None else penalty(logits)).max(-1)
    if bool(largest.isnan().any()):
        raise not_a_number()
    if penalty is not None:
        penalty.add(newest)
    return newest
