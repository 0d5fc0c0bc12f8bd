"""KVzip: what the model attends to while it repeats the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from evolkv.errors import UsageError
from evolkv.selectors.base import Passage, Selector, Words
from evolkv.selectors.prompt import PromptAttention


@dataclass(frozen=True)
class KVzip(Selector):
    """Keeps the tokens that the model attends to while it repeats the prompt, whatever is asked later.

    After the prompt, the model reads it once more in chunks, each behind the whole prompt and behind the words "Repeat
    the previous context exactly." (from the second chunk on: "Repeat the part of the previous context exactly, starting
    with" and the last `overlap` tokens of the chunk before). What an entry receives is the maximum, over all tokens of
    such a passage and over the query heads that share the KV head, of a softmax over the first `sinks` tokens of the
    prompt, the chunk, and the passage itself. Nothing of the passages stays in the cache.

    Kim et al. 2025, "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416,
    section 3. The paper always keeps the system prompt; here the first `sinks` tokens are, and the rest of the prompt
    is repeated with its chat template. The paper ranks the entries of all heads and layers together, which is
    ``dynamickv+adakv:safeguard=0+kvzip``. In a layer with a sliding window, which the paper leaves alone, an entry that
    no token of the passage sees any more receives nothing.

    A prompt of T tokens costs further passes over T tokens and the words, each of which attends to the prompt as well;
    a row of results says how many tokens were read for each of the prompt's, as ``prefill_factor``.

    Args:
        chunk: tokens of the prompt that are repeated at a time.
        overlap: tokens of the chunk before that a passage names.
        sinks: number of first tokens that are always kept, and take part in every softmax.
        words: whether the passages begin with words. They need the model's tokenizer.
    """

    name: ClassVar[str] = "kvzip"
    rereads: ClassVar[bool] = True
    chunk: int = 2000
    overlap: int = 8
    sinks: int = 4
    words: bool = True

    def __post_init__(self) -> None:
        for name, least in (("chunk", 1), ("overlap", 0), ("sinks", 0)):
            if (value := getattr(self, name)) < least:
                raise UsageError(f"kvzip: {name} is {value}; it must be {least} or more")

    @property
    def min_budget(self) -> int:
        """The sinks and one more token."""
        return self.sinks + 1

    @property
    def observed_queries(self) -> int:
        """None of the prompt's own."""
        return 0

    @property
    def asks_in_words(self) -> bool:
        """See `Selector.asks_in_words`."""
        return self.words

    def passages(self, ids: Sequence[int], words: Words | None) -> Iterator[Passage]:
        """See `Selector.passages`."""
        for start in range(0, len(ids), self.chunk):
            stop = min(start + self.chunk, len(ids))
            before = list(ids[max(0, start - self.overlap) : start])
            asked = [] if words is None else [*(words.later if start else words.first)]
            answer = [] if words is None else [*words.answer]
            yield Passage(start, stop, [*asked, *before, *answer, *ids[start:stop]])

    def received(self, reading: PromptAttention, passage: Passage) -> Tensor:
        """See `Selector.received`."""
        prompt = reading.first_query
        sinks = min(self.sinks, passage.start)
        chosen = torch.tensor([*range(sinks), *range(passage.start, passage.stop), *range(prompt, reading.num_tokens)])
        chosen = chosen.to(reading.key.device)
        part = replace(
            reading,
            key=reading.key[:, :, chosen],
            value=reading.value[:, :, :0],
            positions=chosen.expand(*reading.key.shape[:2], -1),
            seen=reading.num_tokens,
            first_query=sinks + passage.stop - passage.start,
        )
        held = part.first_query
        most = reading.key.new_zeros((*reading.key.shape[:2], held - sinks), dtype=torch.float32)
        for block in part.blocks(held, len(chosen)):
            weights = part.probabilities(block.start, block.stop)[..., sinks:held]
            most = torch.maximum(most, weights.amax(dim=(2, 3)))
        return most

    def score(self, prompt: PromptAttention) -> Tensor:
        """Attention that each entry received in the second reading, ``[batch, kv_heads, tokens]``; the sinks first."""
        if prompt.repeated is None:
            raise UsageError("kvzip needs the model to read the prompt again, which happens in a cache's first call")
        return prompt.repeated.masked_fill(prompt.places < self.sinks, torch.inf)
