"""The work of one step, for all groups of layers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evolkv_vllm.rule import BudgetRule


@dataclass
class Step:
    """A batch, as far as budgets are concerned. All arrays are on the CPU.

    Attributes:
        prompts: length of each request's prompt, ``[requests]``.
        starts: the first row of each request in the batch's queries, ``[requests]``.
        counts: how many queries each request brings, ``[requests]``.
        computed: tokens of each request before this step, ``[requests]``.
        lengths: tokens after it, ``[requests]``.
        evicted: entries that each class does without in this step, ``[classes, requests]``; 0 where the prompt is
            still being read.
        to_evict: entries that each class does without from the end of the prompt on, ``[classes, requests]``.
        reading: requests whose prompt is being read in this step.
        memories: what selectors remember of a request from layer to layer, by its number in the batch.
    """

    prompts: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    computed: NDArray[np.int64]
    lengths: NDArray[np.int64]
    evicted: NDArray[np.int64]
    to_evict: NDArray[np.int64]
    reading: list[int]
    memories: dict[int, dict[Any, Any]] = field(default_factory=dict)

    @property
    def requests(self) -> NDArray[np.int64]:
        """The request of each query, ``[queries]``."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @classmethod
    def of(cls, common: Any, rule: BudgetRule, block_size: int) -> Step:
        """Return the step that vLLM's `CommonAttentionMetadata` describes; groups of one step share one.

        Rehearsals of vLLM, of a graph for example, have no prompts. What pads a batch to the size of a graph has none,
        either.
        """
        global _latest
        number = common.num_reqs
        prompts = np.zeros(number, dtype=np.int64)
        if common.rswa_prefix_lens is not None:
            given = common.rswa_prefix_lens[:number].cpu().numpy()
            prompts[: len(given)] = given
        lengths, ends = common.seq_lens_cpu_upper_bound[:number], common.query_start_loc_cpu[: number + 1]
        parts = prompts, lengths.numpy(), ends.numpy()
        # By content, because vLLM writes each step's numbers into the same tensors.
        key = (rule.text, block_size, *(part.tobytes() for part in parts))
        if _latest is None or _latest[0] != key:
            _latest = key, cls._of(rule, block_size, *(part.astype(np.int64) for part in parts))
        return _latest[1]

    @classmethod
    def _of(
        cls,
        rule: BudgetRule,
        block_size: int,
        prompts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> Step:
        counts = np.diff(ends)
        computed = lengths - counts
        to_evict = _to_evict(rule, block_size, prompts.tobytes())
        # Rows without queries are there for the shape of a graph.
        real = counts > 0
        reads = real & (computed < prompts)
        evicted = np.where(real & ~reads, to_evict, 0)
        return cls(prompts, ends[:-1], counts, computed, lengths, evicted, to_evict, reads.nonzero()[0].tolist())


#: The latest step of this process and what it was made of.
_latest: tuple[Any, Step] | None = None


@lru_cache(maxsize=64)
def _to_evict(rule: BudgetRule, block_size: int, prompts: bytes) -> NDArray[np.int64]:
    """Return the entries to do without for some lengths of prompts, ``[classes, requests]``."""
    columns = [rule.evicts(tokens, block_size) for tokens in np.frombuffer(prompts, dtype=np.int64).tolist()]
    return np.stack(columns, axis=1)
