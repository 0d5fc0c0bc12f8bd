"""The replay engine prefills every prompt once, and continues it under each candidate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evolkv.cache.replay import RankedPrompt, ReplayCache
from evolkv.cache.soft import BLOCK_BYTES
from evolkv.errors import RunError, UsageError
from evolkv.evaluation.engine import Engine, Progress
from evolkv.evaluation.lengths import ByLength
from evolkv.evaluation.memory import USABLE, free_memory
from evolkv.evaluation.prefill import Prefiller, RecordingStore
from evolkv.evaluation.scoring import Question, encode_examples
from evolkv.evaluation.slope import slope
from evolkv.evaluation.utility import utility
from evolkv.models import model_facts
from evolkv.selectors import Selector
from evolkv.tasks import Example

# Rows of a batch, candidates times examples, and tokens that they are scored on together. Matrix products gain from
# more up to about here; and since every candidate's new tokens stand in the attention mask of every other one on the
# same prompt, twice as many long answers at once soon take four times as long.
_MAX_ROWS, _MAX_TOKENS = 96, 1024

# Layers that all candidates must have in common before these are computed once for all.
_LEAST_SHARED = 2

# Bytes per logit of comparing one row with the full cache: both as log-probabilities, and four float32 between.
_COMPARING = 6 * 4


class _Ranked(NamedTuple):
    """An example, with the model's own answer where its metric needs one, and what its prefill left behind."""

    question: Question
    prompt: RankedPrompt

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        reference = self.question.reference
        return self.prompt.nbytes + (0 if reference is None else reference.nbytes)


@dataclass(frozen=True)
class Needs:
    """Bytes that one example takes, from above.

    Args:
        tokens: length of its prompt.
        snapshot: its ranked entries, held all the time.
        slope: the pass through the model and back; 0 where the metric has no slope.
        batch: a batch of candidates.
    """

    tokens: int
    snapshot: int
    slope: int
    batch: int


class ReplayEngine(Engine):
    """Scores candidates by replay: eviction happens after prefill, so the prefill serves every candidate.

    Each example's ranked entries are kept (at most `ceiling` per KV head), and a whole population is decoded as one
    batch. Scores equal those of `NaiveEngine` up to rounding.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        examples: what to score on.
        selector: ranks the tokens.
        metric: "logprob" or another of `SCORERS`, the name of a text metric, or None for each example's own.
        ceiling: the largest budget that will be asked for; None for the longest prompt.
        memory_limit: bytes that snapshots and one batch of candidates may take together; None for nine tenths of what
            is free. `room` says how many of them are left to candidates, and may be changed.
        hold: whether to prefill now and hold the result for any number of `score` calls. False prefills during `score`,
            one example at a time: right for scoring once.
        on_progress: called with (done, total) after each example that was prefilled.
        beside: lengths of all prompts whose snapshots share the memory, these examples' among them. Default: these.
        rankings: selectors that come after this one on the same examples: their rankings are recorded as well.
        lengths: carries candidates to each prompt's length; None where they are the same for every prompt.
        store: where recorded prompts are looked for before they are prefilled, and left for those who come after, each
            under this key with the number of the example behind it; None for nowhere.

    Raises:
        UsageError: for no examples, a prompt that does not fit the model, or a selector that cannot be replayed.
        RunError: if the snapshots do not fit into memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        examples: Sequence[Example],
        selector: Selector,
        metric: str | None = "logprob",
        ceiling: int | None = None,
        memory_limit: int | None = None,
        hold: bool = True,
        on_progress: Progress | None = None,
        beside: Sequence[int] = (),
        rankings: Sequence[Selector] = (),
        store: tuple[RecordingStore, str] | None = None,
        lengths: ByLength | None = None,
    ):
        selector.check_replay()
        self.model, self.tokenizer = model, tokenizer
        self.questions = encode_examples(tokenizer, model, examples, metric)
        #: Bytes that one batch of candidates may take.
        self.room = memory_limit if memory_limit is not None else int(USABLE * free_memory(model))
        #: Bytes of the snapshots, and how many of them are the full cache's logits.
        self.held_bytes = self.reference_bytes = 0
        self._selector, self._ceiling = selector, ceiling or max(question.tokens for question in self.questions)
        self._rankings, self._store, self._lengths = [selector, *rankings], store, lengths
        self._on_progress, self._beside = on_progress, beside or [question.tokens for question in self.questions]
        self._held: list[_Ranked] | None = self._prefill_all() if hold else None

    def score(self, budgets: np.ndarray, columns: Sequence[int] | None = None) -> np.ndarray:
        """See `Engine.score`."""
        budgets = np.asarray(budgets, dtype=np.int64)
        wanted = list(range(len(self.questions)) if columns is None else columns)
        if not len(budgets):
            return np.empty((0, len(wanted)))
        scores = np.empty((len(budgets), len(self.questions)))
        for places, batch in self._batches(len(budgets), wanted):
            rows = max(1, min(map(self._rows_at_once, batch)) // len(batch))
            for part in np.array_split(np.arange(len(budgets)), math.ceil(len(budgets) / rows)):
                scores[np.ix_(part, np.array(places))] = self._score_batch(batch, budgets[part])
        return scores[:, wanted]

    def slope(
        self,
        budgets: np.ndarray,
        sharpness: float,
        columns: Sequence[int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.slope`."""
        held = self._held
        if held is None:
            raise UsageError("a slope is asked for many times; make the engine with hold=True")
        asked = [held[column] for column in columns]
        carried, by_carried = budgets, np.ones(budgets.shape)
        if self._lengths is not None:
            lengths = [each.prompt.tokens for each in asked]
            pairs = map(self._lengths.carry_soft, budgets, lengths)
            carried, by_carried = (np.stack(each) for each in zip(*pairs, strict=True))
        losses, slopes, start = [], [], 0
        while start < len(asked):
            now = slice(start, start + self._rows_of_slope(asked[start]))
            prompts, questions = zip(*((each.prompt, each.question) for each in asked[now]), strict=True)
            part, by_row = slope(self.model, prompts, questions, carried[now], sharpness)
            losses.append(part)
            slopes.append(by_row)
            start = now.stop
        return np.concatenate(losses), np.concatenate(slopes) * by_carried

    def utility(self) -> np.ndarray:
        """See `Engine.utility`."""
        if self._held is None:
            raise UsageError("a calibration goes by prompts that are held; make the engine with hold=True")
        shape = len(self._held[0].prompt.keys), self._held[0].prompt.keys[0].shape[0], self._ceiling
        total = np.zeros(shape)
        grams: dict[nn.Module, Tensor] = {}
        for ranked in self._held:
            if ranked.question.target is None:
                raise UsageError(f"metric {ranked.question.scorer.metric!r} has no answer that is read; use logprob")
            self._rows_at_once(ranked)
            for layer, part in enumerate(utility(self.model, ranked.prompt, ranked.question, grams)):
                total[layer, :, : part.shape[1]] += part
        return total.astype(np.float32)

    def close(self) -> None:
        """Free the prefill; scoring would begin with another."""
        self.room += self.held_bytes
        self._held, self.held_bytes, self.reference_bytes = None, 0, 0

    def _batches(self, candidates: int, columns: Sequence[int]) -> Iterator[tuple[list[int], list[_Ranked]]]:
        """Yield examples to be scored together, in order, and their numbers: `candidates` on each make a full batch."""
        prefill = self._prefiller()
        places: list[int] = []
        batch: list[_Ranked] = []
        for done, column in enumerate(columns, 1):
            ranked = self._held[column] if self._held is not None else self._rank(prefill, column)
            if self._held is None and self._on_progress is not None:
                self._on_progress(done, len(columns))
            limit = self._rows_at_once(ranked)
            joins = not batch or ranked.question.joins(batch[0].question)
            if batch and ((len(batch) + 1) * candidates > limit or not joins):
                yield places, batch
                places, batch = [], []
            places.append(column)
            batch.append(ranked)
        if batch:
            yield places, batch

    def _prefiller(self) -> Prefiller:
        return Prefiller(self.model, self._rankings)

    def _prefill_all(self) -> list[_Ranked]:
        prefill = self._prefiller()
        ranked: list[_Ranked] = []
        total = len(self.questions)
        for column in range(total):
            ranked.append(self._rank(prefill, column))
            prompt = ranked[-1].prompt
            self.held_bytes += ranked[-1].nbytes
            self.reference_bytes += ranked[-1].nbytes - prompt.nbytes
            expected = _held_bytes(self.model, prompt, self._beside, self._ceiling) + self.reference_bytes
            if expected > self.room:
                # Some searches hold prompts whole, whatever the ceiling.
                ceiling = "a lower ceiling, " if self._ceiling < max(self._beside) else ""
                raise RunError(
                    f"the snapshots of {len(self._beside)} examples need about {_mib(expected)}, and "
                    f"{_mib(self.room)} may be used; use fewer examples, {ceiling}or engine 'naive'"
                )
            if self._on_progress is not None:
                self._on_progress(column + 1, total)
        self.room -= self.held_bytes
        return ranked

    def _rank(self, prefill: Prefiller, column: int) -> _Ranked:
        question = self.questions[column]
        if self._store is None:
            recorded = prefill(question.prompt)
        else:
            store, name = self._store
            recorded = store.get(f"{name}/{column}", self._selector) or prefill(question.prompt)
            store.put(f"{name}/{column}", recorded)
        question = question.scorer.refer(question, recorded)
        return _Ranked(question, RankedPrompt.from_recorded(recorded, self._selector, self._ceiling))

    def _score_batch(self, batch: list[_Ranked], budgets: np.ndarray) -> np.ndarray:
        """Return scores ``[candidates, examples of the batch]``."""
        scorer, prompts = batch[0].question.scorer, [each.prompt for each in batch]
        carried = self._carried(budgets, prompts)
        shared = lowest_changed(carried) if scorer.teacher_forced and hasattr(self.model.get_decoder(), "layers") else 0
        shared = shared if shared >= _LEAST_SHARED else 0
        cache = ReplayCache(self.model, prompts, carried, shared)
        logits = torch.cat([each.prompt.next_logits.expand(len(budgets), -1) for each in batch])
        questions = [each.question for each in batch for _ in budgets]
        scores = [answer.score for answer in scorer.score(cache, logits, questions)]
        return np.array(scores).reshape(len(batch), len(budgets)).T

    def _carried(self, budgets: np.ndarray, prompts: Sequence[RankedPrompt]) -> np.ndarray:
        """Return candidates for each prompt, ``[prompts, candidates, layers, kv_heads]``."""
        if self._lengths is None:
            return np.broadcast_to(budgets, (len(prompts), *budgets.shape))
        held = [[key.shape[1] for key in prompt.keys] for prompt in prompts]
        return np.stack(
            [self._lengths.carry(budgets, prompt.tokens, most) for prompt, most in zip(prompts, held, strict=True)]
        )

    def _rows_at_once(self, ranked: _Ranked) -> int:
        """Return how many rows like this example's are worth computing as one batch, and fit into memory; at least one.

        Raises:
            RunError: if not even one does.
        """
        question = ranked.question
        each, pair, shared = self._batch_bytes(ranked)
        # The most rows for which rows * each + rows² * pair fits.
        room = max(0, self.room - shared)
        fitting = (math.sqrt(each**2 + 4 * pair * room) - each) / (2 * pair)
        if fitting < 1:
            raise RunError(
                f"one candidate on example {question.example.id} needs about {_mib(each + pair + shared)} besides "
                f"the snapshots, and {_mib(max(self.room, 0))} is left; use fewer examples, a lower ceiling, or "
                "engine 'naive'"
            )
        return int(min(fitting, _MAX_ROWS, max(1, _MAX_TOKENS // _queries(question))))

    def _batch_bytes(self, ranked: _Ranked) -> tuple[int, int, int]:
        """Return bytes of a batch: for each row, for each pair of rows, and for all rows together."""
        question, prompt = ranked
        new = len(question.later) + question.answer_tokens
        each, pair = _candidate_bytes(self.model, prompt, _queries(question), new)
        shared = 2 * max(key.nbytes + value.nbytes for key, value in zip(prompt.keys, prompt.values, strict=True))
        if question.reference is not None:
            shared += _COMPARING * question.reference.numel()
        return each, pair, shared

    def needs(self, rows: int) -> Needs:
        """Return what the first example, which must be held, takes when so many rows like it are scored at once."""
        assert self._held is not None
        ranked = self._held[0]
        rows = min(rows, self._rows_at_once(ranked))
        each, pair, shared = self._batch_bytes(ranked)
        tokens = len(ranked.question.later) + ranked.question.answer_tokens
        return Needs(
            ranked.question.tokens,
            ranked.nbytes,
            sum(slope_bytes(self.model, ranked.prompt, tokens)) if ranked.question.scorer.teacher_forced else 0,
            rows * each + rows**2 * pair + shared,
        )

    def _rows_of_slope(self, ranked: _Ranked) -> int:
        """Return how many rows like this example's can go through the model and back at once; at least one.

        Raises:
            RunError: if not even one fits into memory.
        """
        tokens = len(ranked.question.later) + ranked.question.answer_tokens
        each, shared = slope_bytes(self.model, ranked.prompt, tokens)
        if each + shared > self.room:
            raise RunError(
                f"the way back through example {ranked.question.example.id} needs about {_mib(each + shared)} besides "
                f"the snapshots, and {_mib(max(self.room, 0))} is left; use fewer or shorter examples, or "
                "--start uniform"
            )
        return int(min((self.room - shared) // each, max(1, _MAX_TOKENS // tokens)))


def _queries(question: Question) -> int:
    """Return how many tokens a row reads at once."""
    later = len(question.later)
    return later + question.answer_tokens if question.scorer.teacher_forced else max(1, later)


def _held_bytes(model: PreTrainedModel, prompt: RankedPrompt, lengths: Sequence[int], ceiling: int) -> int:
    """Return the bytes that prompts of some lengths hold, given one of them."""
    total = len(lengths) * sum(state.nbytes for state in prompt.states)
    if prompt.selector is not None:
        ceiling = int(prompt.selector.held_under(np.array(ceiling)))
    layers = zip(prompt.keys, prompt.values, prompt.positions, model_facts(model).most_held(ceiling), strict=True)
    for *parts, most in layers:
        entries = np.minimum(lengths, most).sum()
        total += sum(part[:, 0].nbytes for part in parts) * int(entries)
    return total


def slope_bytes(model: PreTrainedModel, prompt: RankedPrompt, tokens: int) -> tuple[int, int]:
    """Return bytes at the peak of a pass through a model and back, from above: for each row, and for all together."""
    config, element = model.config.get_text_config(decoder=True), prompt.keys[0].element_size()
    hidden, width = config.hidden_size, _feed_forward_width(model)
    # What each layer keeps for the way back: inputs of its products and activations, norms in float32.
    activations = config.num_hidden_layers * tokens * (element * (8 * hidden + 4 * width) + 4 * 4 * hidden)
    cuts = sum(4 * 4 * key.shape[0] * key.shape[1] for key in prompt.keys)
    logits = tokens * config.vocab_size * (2 * element + 3 * 4)
    # One layer's entries in float32, and a few blocks of its attention weights.
    entries = max(4 * (key.numel() + value.numel()) for key, value in zip(prompt.keys, prompt.values, strict=True))
    heads = config.num_attention_heads
    weights = min(BLOCK_BYTES, 4 * heads * tokens * max(key.shape[1] + tokens for key in prompt.keys))
    # Twice, and sixteen blocks: what has been freed is not at once given back, or used again.
    return int(2 * activations + cuts + logits), int(2 * entries + 16 * weights)


def lowest_changed(budgets: np.ndarray) -> int:
    """Return the lowest layer on which candidates ``[…, candidates, layers, kv_heads]`` differ; 0 if none do."""
    differs = (budgets != budgets[..., :1, :, :]).any(axis=-1).reshape(-1, budgets.shape[-2]).any(axis=0)
    return int(differs.argmax())


def _candidate_bytes(model: PreTrainedModel, prompt: RankedPrompt, queries: int, new: int) -> tuple[int, int]:
    """Return bytes at the peak of a forward pass, from above: for each row, and for each pair of rows.

    Rows are attended to in one call, in which the mask has a place for each query and each other row's new tokens.
    """
    config = model.config.get_text_config(decoder=True)
    element = prompt.keys[0].element_size()
    logits = queries * config.vocab_size * (element + 2 * 4)
    width = _feed_forward_width(model)
    hidden = queries * (8 * config.hidden_size + 4 * width) * element
    own = sum(
        key.shape[0] * (key.shape[2] + value.shape[2]) for key, value in zip(prompt.keys, prompt.values, strict=True)
    )
    # A boolean mask and its float copy inside the attention kernel.
    mask = config.num_attention_heads * queries * (1 + 4)
    states = sum(state.nbytes for state in prompt.states)
    entries = max(key.shape[1] for key in prompt.keys)
    return int(logits + hidden + 2 * own * new * element + mask * entries + states), int(mask * max(1, new))


def _feed_forward_width(model: PreTrainedModel) -> int:
    config = model.config.get_text_config(decoder=True)
    # By its name in most models, OPT and GPT-2.
    widths = [getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner")]
    return int(max(filter(None, widths), default=4 * config.hidden_size))


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
