"""Needle in a haystack: a number hidden in a long text, asked for at the end.

The test is G. Kamradt's ("Needle In A Haystack", 2023) in the wording of RULER (Hsieh et al.,
arXiv 2404.06654, task `niah_single`), and in translations of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

from evolkv.errors import TaskError
from evolkv.models.chat import user_message
from evolkv.tasks.base import SPLITS, Example, Split, Task, check_request, partition
from evolkv.tasks.haystacks import describe_haystack, read_haystack
from evolkv.tasks.prompts import encode_text, question_at, uses_chat
from evolkv.tasks.prose import gap, prose
from evolkv.tasks.wording import WORDINGS, Wording

EXAMPLES_PER_PASSAGE = 16
"""Also the number of depths that consecutive examples are spread over: a power of two, in 4 bits."""

SLACK = 8
"""A prompt is at most this many tokens shorter than `context`, and never longer."""

# Eight tokens where every digit is one; the rest lets the model stop by itself.
MAX_NEW_TOKENS = 10

_SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*\s+|[。！？]["'”’」』）]*\s*|\n\s*\n""")
_SPACE = re.compile(r"\s+")
_BREAK_REACH = 400


@dataclass(frozen=True)
class NeedleInHaystack(Task):
    """Find a 7-digit number hidden in a long text: generated prose, or a file of your own (haystack).

    Examples share passages: those of one passage have the same text up to their first needle and come
    deepest needle first, so an engine can reuse the common prefix of neighbouring prompts. An example
    depends on (seed, split, its index) and the settings alone, not on how many are asked for; only its place
    in the list does. A number is congruent to its split's position in `SPLITS` modulo 3, so no number
    occurs in two splits.

    Args:
        context: length of a prompt in tokens, chat template and question included; prompts are at most
            `SLACK` = 8 tokens shorter and never longer. Default 1600.
        needles: how many numbers are hidden; one of them is asked for. Default 1.
        depth: where the asked needle is, from 0 (start of the text) to 1 (end). Default None: 16
            consecutive examples are spaced evenly over [0, 1]. Other needles are anywhere. Each
            needle stands at the sentence boundary nearest to its depth.
        haystack: path of a UTF-8 text file, such as the essays of the needle-in-a-haystack test (its folder
            `PaulGrahamEssays`, joined). Default None: generated prose. The first quarter of a file serves train, the
            second validation, the second half report.
        passages: how many different stretches of text a split draws on. Default None: one per 16 examples.
        chat: whether to put the prompt in the model's chat template. Default None: where the tokenizer has one.
        language: of needles, question and generated prose: "en" (default), "de", "fr", "es" or "zh". An example
            asks for the same number, for the same thing and at the same depth in every language.

    Raises:
        TaskError: a setting out of its range.
        UsageError: an unknown language; the message suggests the nearest.
    """

    name: ClassVar[str] = "niah"

    context: int = 1600
    needles: int = 1
    depth: float | None = None
    haystack: str | None = None
    passages: int | None = None
    chat: bool | None = None
    language: str = "en"

    def __post_init__(self) -> None:
        words = WORDINGS[self.language].words
        if self.context < 1:
            raise TaskError(f"niah: context={self.context} is not a length; give the prompt's length in tokens")
        if not 1 <= self.needles <= len(words):
            raise TaskError(f"niah: needles={self.needles} is out of range; expected 1 to {len(words)}")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise TaskError(f"niah: depth={self.depth} is out of range; expected 0 (start) to 1 (end)")
        if self.passages is not None and self.passages < 1:
            raise TaskError(f"niah: passages={self.passages} is out of range; expected at least 1")

    @property
    def free_text(self) -> bool:
        """False: examples are generated."""
        return False

    def examples(self, split: Split, n: int, tokenizer: Any, seed: int = 0) -> list[Example]:
        """Draw n examples, grouped by passage and within a passage by descending depth.

        Raises:
            TaskError: `context` cannot hold template, needles and question; the haystack file cannot be read
                or is too short; chat=true and the tokenizer has no chat template.
        """
        check_request(split, n)
        prompts = _Prompts(tokenizer, uses_chat(tokenizer, self.chat, self.name), self.context, self.language)
        sample = prompts.largest_needles(self.needles)
        needed = prompts.least(sample)
        if self.context < needed:
            raise TaskError(
                f"niah: context={self.context} is too small for template, {self.needles} needle(s) and "
                f"question; give at least {needed} tokens"
            )
        plans = [self._plan(split, index, seed) for index in range(n)]
        plans.sort(key=lambda plan: (plan.passage, -min(plan.depths), plan.index))
        count = self.passages or -(-n // EXAMPLES_PER_PASSAGE)
        texts = self._passages(split, count, tokenizer, seed)
        examples = []
        for passage, group in groupby(plans, key=lambda plan: plan.passage):
            text = texts(passage)
            # One length for all examples of the passage, so that a depth means the same place in each.
            end = prompts.longest_cut(text, sample, [0] * self.needles)
            for plan in group:
                examples.append(self._example(plan, split, seed, prompts, text, end))
        return examples

    def least_context(self, tokenizer: Any) -> int:
        """Return the fewest tokens that hold template, needles and question."""
        prompts = _Prompts(tokenizer, uses_chat(tokenizer, self.chat, self.name), self.context, self.language)
        return prompts.least(prompts.largest_needles(self.needles))

    def _plan(self, split: Split, index: int, seed: int) -> _Plan:
        rng = random.Random(f"niah/{seed}/{split}/{index}")
        words = rng.sample(WORDINGS[self.language].words, self.needles)
        numbers: list[int] = []
        while len(numbers) < self.needles:
            number = 3 * rng.randint(333_334, 3_333_332) + SPLITS.index(split)
            if number not in numbers:
                numbers.append(number)
        block, place = divmod(index, EXAMPLES_PER_PASSAGE)
        if self.depth is None:
            # Bit reversal spreads any first few of a block; one random shift per block makes them unbiased.
            shift = random.Random(f"niah-depth/{seed}/{split}/{block}").random()
            asked_depth = (int(f"{place:04b}"[::-1], 2) / EXAMPLES_PER_PASSAGE + shift) % 1
        else:
            asked_depth = self.depth
        others = [rng.random() for _ in range(self.needles - 1)]
        if self.passages is None:
            passage = index // EXAMPLES_PER_PASSAGE
        else:
            # A new order for every round, or each passage would always have the same depths.
            turn, place = divmod(index, self.passages)
            order = list(range(self.passages))
            random.Random(f"niah-passage/{seed}/{split}/{turn}").shuffle(order)
            passage = order[place]
        needles = list(zip(words, numbers, strict=True))
        return _Plan(index, passage, needles, [asked_depth, *others])

    def check_files(self) -> None:
        """Read the haystack, where it is a file."""
        if self.haystack is not None:
            read_haystack(self.haystack, WORDINGS[self.language].needle)

    def haystack_used(self) -> str:
        """Return "generated prose", or name and hash of the file."""
        return describe_haystack(self.haystack)

    def _passages(self, split: Split, count: int, tokenizer: Any, seed: int) -> Callable[[int], str]:
        """Passage index → text, long enough for a prompt of `context` tokens."""
        if self.haystack is None:
            # No tokenizer packs more than 10 characters of such prose into a token, on average.
            return lambda passage: prose(f"{seed}/{split}/{passage}", 10 * self.context, self.language)
        text = read_haystack(self.haystack, WORDINGS[self.language].needle).replace("\r\n", "\n")
        share = partition(len(text))[split]
        start, stop = (_nearest_break(text, edge, len(text)) for edge in (share.start, share.stop))
        region = text[start:stop]
        head = region[:100_000]
        per_token = max(1, len(head)) / max(1, len(encode_text(tokenizer, head)))
        # Density varies within a text: a tenth more characters than the average asks for.
        stride = max(1, round(1.1 * per_token * self.context))
        slots = len(region) // stride
        if slots < count:
            needed = 1.1 * count * self.context * (2 if split == "report" else 4)
            raise TaskError(
                f"niah: haystack {self.haystack} has about {len(text) / per_token:.0f} tokens; {count} "
                f"passage(s) of {self.context} in split {split!r} need about {needed:.0f}; "
                "give a longer text, fewer passages or a smaller context"
            )
        order = list(range(slots))
        random.Random(f"niah-haystack/{seed}/{split}").shuffle(order)
        starts = [_nearest_break(region, slot * stride, len(region)) for slot in order[:count]]
        # Where tokens are longer than average a passage runs on into the next, of the same split.
        return lambda passage: region[starts[passage] : starts[passage] + 4 * stride]

    def _example(self, plan: _Plan, split: Split, seed: int, prompts: _Prompts, text: str, end: int) -> Example:
        word, number = plan.needles[0]
        positions = [_nearest_break(text, round(depth * end), end) for depth in plan.depths]
        cut = prompts.longest_cut(text, plan.needles, positions, guess=end)
        place = split if self.language == "en" else f"{self.language}-{split}"
        prompt = prompts.render(text, cut, plan.needles, positions)
        return Example(
            id=f"niah-{place}-{seed}-{plan.index}",
            prompt=prompt,
            references=(str(number),),
            target=f"{gap(self.language)}{number}",
            max_new_tokens=MAX_NEW_TOKENS,
            metric=self.default_metric,
            question_at=question_at(prompt, prompts.wording.question.format(word=word)),
            extra={"depth": round(min(1.0, positions[0] / max(1, cut)), 4), "passage": plan.passage},
        )


@dataclass(frozen=True)
class _Plan:
    """An example before it is text. The first needle is the one asked for."""

    index: int
    passage: int
    needles: list[tuple[str, int]]
    depths: list[float]


@dataclass(frozen=True)
class _Prompts:
    """Renders prompts from a stretch of text and fits their length to `context` tokens.

    In every method `text[:cut]` is the haystack, `needles` are (word, number), of which the first is asked for, and
    `positions` are the needles' places in the text in characters.
    """

    tokenizer: Any
    chat: bool
    context: int
    language: str

    @property
    def wording(self) -> Wording:
        return WORDINGS[self.language]

    def render(self, text: str, cut: int, needles: Sequence[tuple[str, int]], positions: Sequence[int]) -> str:
        space, word = gap(self.language), needles[0][0]
        parts, done = [], 0
        for position, (key, number) in sorted(zip(positions, needles, strict=True)):
            position = min(position, cut)
            parts.append(text[done:position])
            if position and not text[position - 1].isspace():
                parts.append(space)
            parts.append(self.wording.needle.format(word=key, number=number) + space)
            done = position
        body = ("".join(parts) + text[done:cut]).rstrip()
        user = f"{self.wording.instruction}\n{body}\n{self.wording.question.format(word=word)}"
        prompt = user_message(self.tokenizer, user) if self.chat else f"{user}\n"
        return prompt + self.wording.answer.format(word=word)

    def length(self, text: str, cut: int, needles: Sequence[tuple[str, int]], positions: Sequence[int]) -> int:
        """Return the length of the rendered prompt in tokens."""
        return len(encode_text(self.tokenizer, self.render(text, cut, needles, positions)))

    def least(self, needles: Sequence[tuple[str, int]]) -> int:
        """Return the fewest tokens that hold a prompt with these needles."""
        return self.length("", 0, needles, [0] * len(needles)) + SLACK

    def largest_needles(self, count: int) -> list[tuple[str, int]]:
        """Return the `count` needles that take the most tokens."""
        space = gap(self.language)
        sizes = {word: len(encode_text(self.tokenizer, f"{space}{word}")) for word in self.wording.words}
        words = sorted(sizes, key=lambda word: (-sizes[word], word))
        return [(word, 9_999_999) for word in words[:count]]

    def longest_cut(
        self, text: str, needles: Sequence[tuple[str, int]], positions: Sequence[int], guess: int | None = None
    ) -> int:
        """Return how much of `text`, in characters, brings the prompt to `context` tokens or at most `SLACK` below.

        The cut is at the end of a word unless a single word is longer than the slack.
        """

        def missing(cut: int) -> int:
            return self.context - self.length(text, cut, needles, positions)

        sample = text[: 4 * self.context]
        per_token = max(1.0, len(sample) / max(1, len(encode_text(self.tokenizer, sample))))
        # Invariant: `low` fits, `high` does not.
        low, room, high = 0, missing(0), len(text) + 1
        probe = guess if guess is not None else round(room * per_token)
        while room > SLACK // 2 and high - low > 1:
            probe = min(max(probe, low + 1), high - 1)
            probe = _word_end(text, low, probe)
            left = missing(probe)
            if left >= 0:
                low, room = probe, left
            else:
                high = probe
            step = low + round(room * per_token)
            probe = step if step < high else (low + high) // 2
        if room > SLACK:
            raise TaskError(
                f"niah: a passage of {len(text)} characters is {room} tokens too short for "
                f"context={self.context}; give a longer haystack or a smaller context"
            )
        end = _word_end(text, 0, low)
        return end if end != low and missing(end) <= SLACK else low


def _word_end(text: str, low: int, high: int) -> int:
    """Return the last end of a word in (low, high], or high where there is none."""
    if high == len(text) or text[high].isspace():
        return high
    for position in range(high - 1, max(low, high - _BREAK_REACH), -1):
        if text[position].isspace():
            return position
    return high


def _nearest_break(text: str, position: int, end: int) -> int:
    """Return the start of the sentence nearest to `position`, at most `end`.

    Where no sentence starts within `_BREAK_REACH` characters (a list, a table) the start of a word will do,
    and where there is none, `position` itself.
    """
    if position - _BREAK_REACH <= 0:
        starts = [0]
    else:
        starts = []
    window = max(0, position - _BREAK_REACH), min(len(text), position + _BREAK_REACH)
    for pattern in (_SENTENCE_END, _SPACE):
        ends = [match.end() for match in pattern.finditer(text, *window)]
        reachable = [start for start in starts + ends if start <= end]
        if reachable:
            return min(reachable, key=lambda start: (abs(start - position), start))
    return position
