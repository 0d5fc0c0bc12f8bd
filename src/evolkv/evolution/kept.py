"""The parts of a prompt that a profile keeps, for one example, in a form that can be drawn."""

from __future__ import annotations

import math
import re
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel

from evolkv.cache.compressed import CompressedCache
from evolkv.models.forward import input_device
from evolkv.profile import BudgetProfile
from evolkv.tasks import Example, encode_prompt
from evolkv.tasks.prompts import encode_text

# Few enough for layers × stretches to fit into one attribute of a study.
_BINS, _CELLS = 100, 8_000
#: An answer of one or two characters stands in any text by chance.
_LEAST_ANSWER, _MOST_ANSWERS = 3, 4
#: Characters of the text on either side of an answer.
_AROUND = 60
#: Characters of languages that put no spaces between words: Thai, Lao, Khmer, Japanese, Chinese.
_UNSPACED = r"\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
#: Not within a word of any other language.
_BOUNDARY = rf"(?:(?<![^\W{_UNSPACED}])|(?![^\W{_UNSPACED}]))"


def kept_positions(
    model: PreTrainedModel,
    tokenizer: Any,
    example: Example,
    profile: BudgetProfile,
    prefill_chunk: int | None = None,
) -> dict[str, Any]:
    """Return the share of each stretch of a prompt that each layer keeps; `prefill_chunk` as for `CompressedCache`.

    Returns:
        ``example`` (its id), ``tokens`` (the prompt's length), ``bin`` (tokens per stretch) and ``share``: for each
        layer, the share of each stretch's entries, over all KV heads, that are kept, in [0, 1]. Where the prompt says
        what a reference answer repeats, also ``answers``: its tokens from ``start`` to before ``end``, and ``text``.
    """
    ids = encode_prompt(tokenizer, example)
    tokens = ids.shape[1]
    cache = CompressedCache(model, profile, prefill_chunk=prefill_chunk)
    with torch.inference_mode():
        model(ids.to(input_device(model)), cache=cache, use_cache=True, logits_to_keep=1)
    size = max(1, math.ceil(tokens / min(_BINS, _CELLS // len(cache.positions))))
    bins = math.ceil(tokens / size)
    room = torch.tensor([min(size, tokens - size * i) for i in range(bins)])
    share = []
    for heads in cache.positions:
        counts = sum(torch.bincount(positions.cpu() // size, minlength=bins) for positions in heads)
        share.append([round(value, 4) for value in (counts / (room * len(heads))).tolist()])
    answers = _answers(tokenizer, example, tokens)
    return {"example": example.id, "tokens": tokens, "bin": size, "share": share} | (
        {"answers": answers} if answers else {}
    )


def _answers(tokenizer: Any, example: Example, tokens: int) -> list[dict[str, Any]]:
    """Return the places of a prompt that hold a reference answer, at most `_MOST_ANSWERS` of them."""
    found = []
    for reference in (text for text in dict.fromkeys(example.references) if len(text) >= _LEAST_ANSWER):
        places = re.finditer(_BOUNDARY + re.escape(reference) + _BOUNDARY, example.prompt)
        for match in islice(places, _MOST_ANSWERS):
            # Prompts are encoded whole, so the tokens before a place are those of the text before it, but for merges.
            start, end = (len(encode_text(tokenizer, example.prompt[:at])) for at in match.span())
            if start < end <= tokens:
                around = example.prompt[max(0, match.start() - _AROUND) : match.end() + _AROUND]
                found.append({"start": start, "end": end, "text": f"…{' '.join(around.split())}…"})
    return found[:_MOST_ANSWERS]
