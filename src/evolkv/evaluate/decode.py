"""Continuing a prefilled prompt: teacher-forced, or greedily, many rows at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.cache.compressed import CompressedCache
from evolkv.cache.replay import ReplayCache


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Token ids that end a text: the generation config's and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    ids.add(tokenizer.eos_token_id)
    return frozenset(int(i) for i in ids if i is not None)


def target_log_probs(
    model: PreTrainedModel,
    cache: CompressedCache | ReplayCache,
    next_logits: Tensor,
    tokens: int,
    target: Tensor,
) -> Tensor:
    """Log-probability of each token of a given continuation, under every row of a cache.

    Args:
        model: the model.
        cache: holds the prompt; each row is one candidate.
        next_logits: logits of the first new token, ``[vocabulary]``.
        tokens: length of the prompt.
        target: the continuation, ``[target]`` int64, at least one token.

    Returns:
        ``[rows, target]`` float32.
    """
    rows = cache.num_rows
    target = target.to(next_logits.device)
    first = next_logits.log_softmax(-1)[target[0]].expand(rows, 1)
    if len(target) == 1:
        return first
    with torch.inference_mode():
        output = model(
            target[None, :-1].expand(rows, -1),
            past_key_values=cache,
            position_ids=torch.arange(tokens, tokens + len(target) - 1, device=target.device).expand(rows, -1),
            use_cache=True,
        )
        logits = output.logits.float()
        chosen = logits.gather(-1, target[None, 1:, None].expand(rows, -1, -1))[..., 0]
        return torch.cat([first, chosen - logits.logsumexp(-1)], dim=1)


def greedy(
    model: PreTrainedModel,
    cache: CompressedCache | ReplayCache,
    next_logits: Tensor,
    tokens: Sequence[int],
    max_new_tokens: Sequence[int],
    end: Collection[int],
) -> list[list[int]]:
    """Greedy continuations of every row, stopping as soon as all rows have ended.

    Args:
        model: the model.
        cache: holds the prompts, one row each.
        next_logits: logits of the first new token, ``[rows, vocabulary]``.
        tokens: length of each row's prompt.
        max_new_tokens: the most tokens to generate, for each row.
        end: token ids that end a row; they are not part of the result.

    Returns:
        Token ids by row.
    """
    texts: list[list[int]] = [[] for _ in tokens]
    running = [limit > 0 for limit in max_new_tokens]
    newest = next_logits.argmax(-1)
    position = torch.tensor(tokens, device=newest.device)
    while True:
        for row, token in enumerate(newest.tolist()):
            if running[row] and token in end:
                running[row] = False
            elif running[row]:
                texts[row].append(token)
                running[row] = len(texts[row]) < max_new_tokens[row]
        if not any(running):
            return texts
        with torch.inference_mode():
            output = model(newest[:, None], past_key_values=cache, position_ids=position[:, None], use_cache=True)
        newest = output.logits[:, -1].argmax(-1)
        position = position + 1
