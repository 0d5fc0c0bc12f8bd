"""The task `general`: its kinds take turns, each at several lengths."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

from evolkv.errors import TaskError
from evolkv.models.chat import render_chat
from evolkv.tasks.base import Example, Split, Task, check_request
from evolkv.tasks.code import CodeCompletion
from evolkv.tasks.general import puzzles
from evolkv.tasks.general.puzzles import Puzzle
from evolkv.tasks.niah import NeedleInHaystack
from evolkv.tasks.prompts import encode_text, question_at, uses_chat
from evolkv.tasks.ruler.puzzle import largest
from evolkv.tasks.wording import WORDINGS

#: Kinds with a puzzle of their own; the others are tasks that exist.
_PUZZLES: dict[str, Callable[[random.Random, Split], Puzzle]] = {
    "variables": puzzles.variables,
    "counting": puzzles.counting,
    "arithmetic": puzzles.arithmetic,
    "dialogue": puzzles.dialogue,
    "cloze": puzzles.cloze,
}
#: The kinds of examples, in the order in which they take turns.
KINDS = ("needle", "variables", "dialogue", "code", "keys", "counting", "cloze", "arithmetic")
#: Lengths as parts of `context`. Half of it on average, and prime to the number of kinds, so that each kind gets each.
LENGTHS = (0.2, 1.0, 0.4, 0.3, 0.6)
#: The least context is said in multiples of this.
_ROUND = 100
#: Needles of the kind `keys`.
NEEDLES = 4
_LANGUAGES = tuple(WORDINGS)


@dataclass(frozen=True)
class General(Task):
    """A mixture of workloads that needs no file: for a profile to use where nothing is known of the task.

    Eight kinds take turns: a needle in prose (in five languages), one of several needles, variables that get their
    values from one another, a fact told in a long conversation, the next line of code (of Python's standard library),
    the commonest of many words, a sentence to be continued as it stands in a text, and arithmetic after worked
    examples. Lengths take turns, too. `Example.extra` names the `kind`.

    A search weighs the examples of this task by what budgets can gain on each; see `evolkv.evaluation.balance`.

    Args:
        context: length of the longest prompts in tokens; the others have a fifth to three fifths of it, so that it is
            half of it on average. Prompts are a little shorter, never longer. Default 2000.

    Raises:
        TaskError: a setting out of its range.
    """

    name: ClassVar[str] = "general"
    default_metric: ClassVar[str] = "contains"
    balanced: ClassVar[bool] = True
    train_examples: ClassVar[int] = 3 * len(KINDS)

    context: int = 2000

    def __post_init__(self) -> None:
        if self.context < 1:
            raise TaskError(
                f"general: context={self.context} is not a length; give the longest prompt's length in tokens"
            )

    @property
    def kinds(self) -> int:
        """Number of examples that have every kind at every length."""
        return len(KINDS) * len(LENGTHS)

    def examples(self, split: Split, n: int, tokenizer: Any, seed: int = 0) -> list[Example]:
        """Draw n examples, one of each kind in turn.

        Raises:
            TaskError: `context` is too small for an example of some kind.
        """
        check_request(split, n)
        indices: defaultdict[_Slot, list[int]] = defaultdict(list)
        for index in range(n):
            indices[_Slot.of(index)].append(index)
        drawn: dict[int, Example] = {}
        short: list[_TooShortError] = []
        for slot, places in indices.items():
            try:
                some = self._draw(slot, split, places, tokenizer, seed)
            except _TooShortError as error:
                short.append(error)
                continue
            for index, example in zip(places, some, strict=False):
                extra = {**example.extra, "kind": slot.kind}
                drawn[index] = replace(example, id=f"general-{split}-{seed}-{index}-{slot.kind}", extra=extra)
        if short:
            # Of all kinds and lengths, so that the advice holds for each.
            worst = max(short, key=lambda error: error.least)
            # Other examples of the kind may need a little more.
            least = -(-worst.least // _ROUND) * _ROUND
            raise TaskError(f"general: context={self.context} {worst}; give at least context={least}")
        return [drawn[index] for index in sorted(drawn)]

    def _draw(self, slot: _Slot, split: Split, indices: list[int], tokenizer: Any, seed: int) -> list[Example]:
        part = LENGTHS[slot.length]
        context = max(1, round(part * self.context))
        if slot.kind in _PUZZLES:
            make = _PUZZLES[slot.kind]
            return [
                self._fitted(make(random.Random(f"general/{seed}/{split}/{i}"), split), part, tokenizer, slot.kind)
                for i in indices
            ]
        task: CodeCompletion | NeedleInHaystack
        if slot.kind == "code":
            task = CodeCompletion(context=context)
        else:
            needles = 1 if slot.kind == "needle" else NEEDLES
            task = NeedleInHaystack(context=context, needles=needles, language=_LANGUAGES[slot.language])
        if context < (needed := task.least_context(tokenizer)):
            raise _TooShortError(slot.kind, part, context, needed)
        # The same seed would have the same needle, or file, at every length.
        own = seed * len(KINDS) * len(LENGTHS) * len(_LANGUAGES) + slot.number
        return task.examples(split, len(indices), tokenizer, own)

    def _fitted(self, puzzle: Puzzle, part: float, tokenizer: Any, kind: str) -> Example:
        context = max(1, round(part * self.context))
        # The first token of an answer follows from the prompt before anything is evicted, so it must not be what is
        # asked: the last word of the prefix is left to the answer.
        prefix, _, last = puzzle.prefix.rpartition(" ")
        target = puzzle.target or f" {last} {puzzle.answer}"
        if prefix:
            puzzle = replace(puzzle, prefix=prefix)
        chat = puzzle.chat and uses_chat(tokenizer, None, self.name)
        render = partial(_render, puzzle, tokenizer, chat)

        def room(size: int) -> int:
            return context - len(encode_text(tokenizer, render(size)))

        spare = room(puzzle.least)
        if spare < 0:
            raise _TooShortError(kind, part, context, context - spare)
        prompt = render(largest(room, puzzle.least, spare, None, puzzle.least + context))
        return Example(
            id=kind,
            prompt=prompt,
            references=(puzzle.answer,),
            target=target,
            max_new_tokens=puzzle.max_new_tokens,
            metric=puzzle.metric,
            stop=puzzle.stop,
            question_at=question_at(prompt, puzzle.asks),
            extra={"mode": "flexible"} if puzzle.metric == "gsm8k" else {},
        )


class _TooShortError(Exception):
    """A kind needs more tokens than its part of the context gives it."""

    def __init__(self, kind: str, part: float, given: int, needed: int):
        super().__init__(f"gives {kind} {given} tokens, and needs {needed}")
        self.least = math.ceil(needed / part)


class _Slot(NamedTuple):
    """The kind of an example, and the numbers of its length and language."""

    kind: str
    length: int
    language: int

    @classmethod
    def of(cls, index: int) -> _Slot:
        """Return the slot of an example."""
        turn, kind = divmod(index, len(KINDS))
        # Shifted from round to round, or each language would have one length alone.
        language = (turn + turn // len(LENGTHS)) % len(_LANGUAGES) if KINDS[kind] == "needle" else 0
        return cls(KINDS[kind], index % len(LENGTHS), language)

    @property
    def number(self) -> int:
        """A number that no other slot has."""
        return (KINDS.index(self.kind) * len(LENGTHS) + self.length) * len(_LANGUAGES) + self.language


def _render(puzzle: Puzzle, tokenizer: Any, chat: bool, size: int) -> str:
    turns = puzzle.turns(size)
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
    if chat:
        return render_chat(tokenizer, messages) + puzzle.prefix
    if len(turns) == 1:
        return f"{turns[0]}\n{puzzle.prefix}"
    told = "\n".join(f"{each['role'].title()}: {each['content']}" for each in messages)
    return f"{told}\nAssistant: {puzzle.prefix}"
