"""Thousands of requests of random shape on one model: does memory stay level, and is every answer the right one?

    python bench/soak.py [--requests 2000] [--model random:tiny] [--json FILE]

A request is a (padded) batch of random prompts under a random method, budget and selector: through `compress()` and
`generate()`, through a `CompressedCache` given to `generate()`, or through forward calls of one or several tokens on
such a cache (a quarter of these caches are reset and used again); or the prompts are documents that are read first,
some in chunks, and asked two questions in turn, of a copy of the cache or from a file, where some caches evict again.
Every answer is held against the same prompts one at a time: all logits must agree to a thousandth of their standard
deviation, up to the first token that differs, if one does (two logits that close may change places). Memory is the
resident set after each request, garbage collected and free memory returned; from after the warm-up (the first fifth) to
the end it may grow by less than 1 %. Exits with 1 if a check fails.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

import evolkv
from evolkv.errors import UsageError
from evolkv.selectors import get_selector
from lib.command import Bench, run
from lib.contenders import return_free_memory
from lib.shapes import load

TOLERANCE = 1e-3
MOST_GROWTH = 0.01
METHODS = ("per layer", "per head", "pyramid+snapkv", "adakv+snapkv", "cake+snapkv")
SELECTORS = ("snapkv", "knorm", "tova", "streaming_llm", "h2o", "keydiff")
MODES = ("compress", "cache", "forward", "conversation")
#: What a conversation goes on with once the documents are read: their cache, a copy of it, or one from a file.
BRANCHES = ("itself", "copy", "file")


@dataclass(frozen=True)
class Request:
    """One request.

    Args:
        prompts: token ids of each sequence, ``[tokens]``.
        method: what `CompressedCache` takes: a profile, or a method's name.
        budget: mean entries per head of a named method; None for a profile.
        mode: one of `MODES`.
        answer: tokens to generate, or to feed.
        reset: whether the cache serves another prompt first.
        settings: of a conversation: when its cache evicts again.
        branch: of a conversation: one of `BRANCHES`.
    """

    prompts: list[Tensor]
    method: Any
    budget: int | None
    mode: str
    answer: int
    reset: bool
    settings: dict[str, Any] = field(default_factory=dict)
    branch: str = "itself"


class Soak:
    """A model, and requests drawn for it."""

    def __init__(self, model: Any, seed: int, longest: int):
        self.model, self.longest = model, longest
        self.random = np.random.default_rng(seed)
        config = model.config.get_text_config(decoder=True)
        self.shape = (config.num_hidden_layers, config.num_key_value_heads)
        self.vocabulary = config.vocab_size
        self.kinds: Counter[str] = Counter()

    def draw(self) -> Request:
        """A random request."""
        batch = int(self.random.choice([1, 1, 2, 3, 5]))
        lengths = self.random.integers(8, self.longest, size=batch)
        if self.random.random() < 0.5:
            lengths[:] = lengths[0]
        prompts = [torch.from_numpy(self.random.integers(3, self.vocabulary, size=n)) for n in lengths]
        method, mode = str(self.random.choice(METHODS)), str(self.random.choice(MODES))
        selector: dict[str, Any] = {"name": str(self.random.choice(SELECTORS))}
        if selector["name"] == "snapkv":
            selector |= {"window": 4}
        least = max(8, get_selector(selector).min_budget)
        entries = int(self.random.integers(least, self.longest))
        budget: int | None = entries
        chosen: Any = method
        if method == "per layer":
            chosen, budget = evolkv.BudgetProfile.uniform(self.model, entries, selector=selector), None
        elif method == "per head":
            budgets = self.random.integers(least, self.longest, size=self.shape)
            chosen, budget = evolkv.BudgetProfile.from_budgets(self.model, budgets, selector=selector), None
        else:
            chosen = f"{method}:window=4"
        self.kinds.update([method, mode, f"batch of {batch}"])
        request = Request(prompts, chosen, budget, mode, int(self.random.integers(1, 12)), self.random.random() < 0.25)
        if mode != "conversation":
            return request
        settings: dict[str, Any] = {}
        # Methods whose layers compete lay out budgets once.
        if method in ("per layer", "per head", "pyramid+snapkv"):
            when = str(self.random.choice(["once", "again", "evict_every", "prefill_chunk"]))
            # Chunks are cut by columns, padding included: rows of several lengths would be cut otherwise alone.
            if when == "prefill_chunk" and len(set(lengths)) == 1:
                settings["prefill_chunk"] = int(self.random.integers(4, 64))
            elif when == "evict_every":
                settings["evict_every"] = int(self.random.integers(1, 16))
            elif when == "again":
                settings["evict"] = "again"
        branch = str(self.random.choice(BRANCHES))
        self.kinds.update([*settings, branch])
        return replace(request, settings=settings, branch=branch)

    def answer(self, request: Request, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens ``[rows, answer]`` and the logits that each followed from, ``[rows, answer, vocabulary]``."""
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        if request.mode == "conversation":
            return self._converse(ids, mask, request)
        if request.mode == "compress":
            with evolkv.compress(self.model, request.method, request.budget):
                return self._generate(ids, mask, request.answer)
        cache = evolkv.CompressedCache(self.model, request.method, request.budget)
        if request.reset:
            self.model(ids[:, -8:], cache=cache)
            cache.reset()
        if request.mode == "cache":
            return self._generate(ids, mask, request.answer, cache=cache)
        return self._forward(ids, mask, request.answer, cache)

    def _converse(self, ids: Tensor, mask: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        """The answers to two questions, the same for every row, one behind the other."""
        cache = evolkv.CompressedCache.prefill(
            self.model, request.method, ids, mask, request.budget, **request.settings
        )
        if request.branch == "copy":
            cache = cache.copy()
        elif request.branch == "file":
            with tempfile.TemporaryDirectory() as folder:
                cache.save(Path(folder) / "a.cache")
                cache = evolkv.CompressedCache.load(Path(folder) / "a.cache", self.model)
        answers = []
        for length in (5, 3):
            question = (torch.arange(length, device=ids.device) * 5 % (self.vocabulary - 3) + 3)[None]
            asked = cache.followed_by(question)
            answers.append(self._generate(asked.pop("input_ids"), asked.pop("attention_mask"), request.answer, **asked))
            assert cache.input_ids is not None
            cache.input_ids = torch.cat([cache.input_ids, question.expand(len(ids), -1), answers[-1][0]], dim=1)
        return torch.cat([tokens for tokens, _ in answers], dim=1), torch.cat([logits for _, logits in answers], dim=1)

    def _generate(self, ids: Tensor, mask: Tensor, tokens: int, **cache: Any) -> tuple[Tensor, Tensor]:
        output = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **cache,
        )
        return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, 1)

    def _forward(self, ids: Tensor, mask: Tensor, tokens: int, cache: Any) -> tuple[Tensor, Tensor]:
        """The same tokens for every row, fed singly and several at once."""
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = [self.model(ids, attention_mask=mask, position_ids=position, cache=cache).logits[:, -1:]]
        fed = (torch.arange(tokens, device=ids.device) * 7 % (self.vocabulary - 3) + 3).expand(len(ids), -1)
        length, start = mask.sum(-1, keepdim=True), 0
        while start < tokens:
            stop = min(tokens, start + (1 if start % 2 == 0 else 3))
            mask = torch.cat([mask, mask.new_ones(len(ids), stop - start)], dim=1)
            at = length + torch.arange(start, stop, device=ids.device)
            part = self.model(fed[:, start:stop], attention_mask=mask, position_ids=at, cache=cache)
            logits.append(part.logits)
            start = stop
        return fed, torch.cat(logits, 1)

    def wrong(self, request: Request) -> float:
        """The largest difference of logits from those of each prompt alone, in standard deviations of these."""
        tokens, logits = self.answer(request, request.prompts)
        worst = 0.0
        for i, prompt in enumerate(request.prompts):
            alone, reference = self.answer(request, [prompt])
            differing = (tokens[i] != alone[0]).nonzero()
            end = int(differing[0]) + 1 if len(differing) else logits.shape[1]
            expected = reference[0, :end].float()
            worst = max(worst, float((logits[i, :end].float() - expected).abs().max() / expected.std()))
        return worst


def main(bench: Bench, requests: int = 2000, longest: int = 256) -> dict[str, Any]:
    """Answer random requests, and check answers and memory.

    Args:
        requests: requests.
        longest: tokens of the longest prompt; at least 16.
    """
    if longest < 16:
        raise UsageError(f"--longest {longest}: expected at least 16 tokens")
    torch.manual_seed(bench.seed)
    model = load(bench.model, bench.dtype, bench.device)
    soak = Soak(model, bench.seed, longest)
    process, resident, differences = psutil.Process(), [], []
    started = time.perf_counter()
    for number in range(requests):
        differences.append(soak.wrong(soak.draw()))
        gc.collect()
        return_free_memory()
        resident.append(process.memory_info().rss)
        if number % 100 == 99:
            print(f"{number + 1} of {requests}", file=sys.stderr, flush=True)
    fifth = max(1, requests // 5)
    after_warm_up = statistics.median(resident[fifth : 2 * fifth] or resident)
    growth = statistics.median(resident[-fifth:]) / after_warm_up - 1
    wrong = sum(difference > TOLERANCE for difference in differences)
    return {
        "n": requests,
        "seconds": time.perf_counter() - started,
        "kinds": dict(sorted(soak.kinds.items())),
        "wrong_answers": wrong,
        "largest_difference": max(differences),
        "resident_bytes_after_warm_up": after_warm_up,
        "resident_growth": growth,
        "passed": wrong == 0 and growth < MOST_GROWTH,
    }


if __name__ == "__main__":
    run(__doc__, main, model="random:tiny", device="cpu")
