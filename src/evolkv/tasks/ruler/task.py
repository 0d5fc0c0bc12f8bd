"""The task `ruler`: one of RULER's thirteen tasks, at any length and for any tokenizer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar, get_args

from evolkv.errors import TaskError
from evolkv.models.chat import user_message
from evolkv.registry import unknown_name
from evolkv.tasks.base import Example, Split, Task, check_choice, check_request
from evolkv.tasks.haystacks import describe_haystack, read_haystack
from evolkv.tasks.prompts import encode_text, uses_chat
from evolkv.tasks.rows import Splitting, draw
from evolkv.tasks.ruler import needles, questions, variable_tracking, words
from evolkv.tasks.ruler.haystack import passages
from evolkv.tasks.ruler.prepared import read_prepared
from evolkv.tasks.ruler.puzzle import Family, Puzzle, largest

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(needles.TASKS, needles.FAMILY),
    "vt": variable_tracking.FAMILY,
    "cwe": words.COMMON,
    "fwe": words.CODED,
    "qa_1": questions.FAMILY,
    "qa_2": questions.FAMILY,
}
QUESTIONS = {
    "qa_1": ("SQuAD's dev-v2.0.json", questions.squad),
    "qa_2": ("HotpotQA's hotpot_dev_distractor_v1.json", questions.hotpotqa),
}


@dataclass(frozen=True)
class Ruler(Task):
    """RULER's synthetic long-context tasks at any length; essays are generated prose, or a file of your own (essays).

    C.-P. Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?" (arXiv
    2404.06654), with the templates, parameters, answer lengths and metrics of its code. An answer prefix follows
    the chat template, as there.

    Every example has as much haystack as fits: one more word (essay), line of noise, needle, uncommon word (three
    times, in `cwe`), coded word or document would be more than `context` tokens. What is asked for in one example
    is asked for in no other, and in no other split whatever the seed: each key, number, UUID, variable and word
    serves one split alone. Exceptions are `cwe`, whose words come back when all have been asked for (after 270
    examples), and `qa_*`, whose splits share no question (and no article of SQuAD) but may share an answer.

    An example depends on (seed, split, its index) and the settings alone, not on how many are asked for; only its
    place in the list does: examples are in the order of their prompts' text, so that neighbours share the most.

    Differences from RULER's code: the five tasks with an essay (niah_single_2, niah_single_3, niah_multikey_1,
    niah_multivalue, niah_multiquery) hide needles in generated prose, where RULER has Paul Graham's essays, so compare
    their scores with published ones only under `essays`, with that text; haystacks are filled up to the last unit,
    while RULER finds one size for all examples of a file; the demonstration of `vt` is shorter than 500 tokens where
    `context` is under 2,000; `qa_*` fill up with documents of the same split alone, and `qa_2` leaves out documents
    that the question does not need where `context` cannot hold all ten.

    Args:
        task: niah_single_1 to niah_single_3, niah_multikey_1 to niah_multikey_3, niah_multivalue, niah_multiquery,
            vt, cwe, fwe, qa_1 or qa_2.
        context: most tokens of a prompt, chat template and answer prefix included, together with the tokens that are
            generated (RULER's `max_seq_length`). Default 4096.
        path: for qa_1 SQuAD's `dev-v2.0.json`, for qa_2 HotpotQA's `hotpot_dev_distractor_v1.json`. For any task a
            file ending in .jsonl that RULER's scripts prepared, whose rows are used as they are. Default None.
        essays: a UTF-8 text file for the five tasks with an essay, such as the essays of the needle-in-a-haystack test
            (its folder `PaulGrahamEssays`, joined). The first quarter serves train, the second validation, the second
            half report, and a text that is too short goes round. Default None: generated prose.
        chat: whether to put the question in the model's chat template. Default None: where the tokenizer has one.
            Say false for prepared rows that are in a chat template already.
        split: "auto" (default) shares the questions or rows of `path` out to the splits; "all" uses every one for any
            split.

    Raises:
        UsageError: an unknown task.
        TaskError: a setting out of its range, missing, or of no use to the task.
    """

    name: ClassVar[str] = "ruler"
    default_metric: ClassVar[str] = "ruler_all"
    main_setting: ClassVar[str] = "task"

    task: str
    context: int = 4096
    path: str | None = None
    essays: str | None = None
    chat: bool | None = None
    split: Splitting = "auto"

    def __post_init__(self) -> None:
        if self.task not in FAMILIES:
            raise unknown_name("ruler task", self.task, FAMILIES)
        if self.context < 1:
            raise TaskError(f"ruler: context={self.context} is not a length; give the prompt's length in tokens")
        if self.task in QUESTIONS and self.path is None:
            raise TaskError(
                f"ruler: task={self.task} needs {QUESTIONS[self.task][0]}; write ruler:task={self.task},path=FILE"
            )
        if self.path is not None and self.task not in QUESTIONS and not self._is_prepared:
            raise TaskError(
                f"ruler: task={self.task} reads no file but one that RULER prepared, named *.jsonl, not {self.path}; "
                "leave path out"
            )
        if self.essays is not None and (self._is_prepared or not self._has_essay):
            raise TaskError(f"ruler: essays={self.essays} is of no use to task={self.task} here; leave it out")
        check_choice(self.name, "split", self.split, get_args(Splitting))
        if self.path is None and self.split != "auto":
            raise TaskError(f"ruler: split={self.split} is about the rows of a file; give path=FILE or leave split out")

    @property
    def free_text(self) -> bool:
        """False: examples are generated."""
        return False

    def examples(self, split: Split, n: int, tokenizer: Any, seed: int = 0) -> list[Example]:
        """Draw n examples, in the order of their prompts' text; fewer, with a warning, if a file has no more.

        Raises:
            TaskError: `context` is too small for the task or a prepared row, a file cannot be read or is malformed
                (the message names the place), a split of it is empty, or chat=true and the tokenizer has no chat
                template.
        """
        check_request(split, n)
        prompts = _Prompts(
            tokenizer,
            uses_chat(tokenizer, self.chat, self.name),
            self.context - FAMILIES[self.task].max_new_tokens,
        )
        if self._is_prepared:
            examples = self._prepared(split, n, prompts, seed)
        else:
            examples = self._generated(split, n, prompts, seed)
        # In this order neighbours share the longest prefixes.
        return sorted(examples, key=lambda example: example.prompt)

    def check_files(self) -> None:
        """Read the rows, questions or essays, where they are a file's."""
        if self.path is not None:
            read = partial(read_prepared, opening=self._opening) if self._is_prepared else QUESTIONS[self.task][1]
            deque(read(self.path), maxlen=0)
        if self.essays is not None:
            read_haystack(self.essays, needles.NEEDLE)

    def haystack_used(self) -> str | None:
        """Return "generated prose", or name and hash of the essays; None where there is no essay."""
        return describe_haystack(self.essays) if self._has_essay and not self._is_prepared else None

    @property
    def _is_prepared(self) -> bool:
        return self.path is not None and self.path.lower().endswith(".jsonl")

    @property
    def _opening(self) -> str:
        # As far as RULER's own scripts look: it holds no field of the template.
        return FAMILIES[self.task].prefix[:10]

    @property
    def _has_essay(self) -> bool:
        return self.task in needles.TASKS and needles.TASKS[self.task].haystack == "essay"

    def _prepared(self, split: Split, n: int, prompts: _Prompts, seed: int) -> list[Example]:
        assert self.path is not None
        rows = draw(
            read_prepared(self.path, self._opening),
            split,
            n,
            splitting=self.split,
            seed=f"ruler/{seed}",
            source=self.path,
            groups="inputs",
        )
        texts = [prompts.render(row.fields.input, row.fields.answer_prefix or "") for row in rows]
        rooms = [prompts.room(text) for text in texts]
        if min(rooms) < 0:
            where, length = rows[rooms.index(min(rooms))].where, self.context - min(rooms)
            raise TaskError(
                f"{where}: prompt and answer take {length} tokens, more than context={self.context}; "
                f"give context={length} or more"
            )
        return [
            self._example(f"ruler-{self.task}-{row.id}", text, tuple(row.fields.outputs), room)
            for row, text, room in zip(rows, texts, rooms, strict=True)
        ]

    def _generated(self, split: Split, n: int, prompts: _Prompts, seed: int) -> list[Example]:
        examples: list[Example] = []
        size, shortest = None, 0
        for index, puzzle in enumerate(islice(self._puzzles(split, n, prompts, seed), n)):
            room = partial(_room, prompts, puzzle)
            spare = room(puzzle.least)
            shortest = min(shortest, spare)
            # Once one does not fit, the others are measured only for the message.
            if shortest < 0:
                continue
            size = largest(room, puzzle.least, spare, size, puzzle.least + self.context)
            text = prompts.render(puzzle.text(size), puzzle.prefix)
            identifier = f"ruler-{self.task}-{split}-{seed}-{index}"
            examples.append(self._example(identifier, text, puzzle.answers, prompts.room(text)))
        if shortest < 0:
            raise TaskError(
                f"ruler: context={self.context} is too small for task={self.task} and "
                f"{FAMILIES[self.task].max_new_tokens} tokens of answer; give at least {self.context - shortest} tokens"
            )
        return examples

    def _puzzles(self, split: Split, n: int, prompts: _Prompts, seed: int) -> Iterable[Puzzle]:
        if self.task == "vt":
            return variable_tracking.chain_puzzles(split, seed, self.context, prompts.tokens)
        if self.task == "cwe":
            return words.common_word_puzzles(split, seed, self.context)
        if self.task == "fwe":
            return words.coded_word_puzzles(split, seed, self.context)
        if self.task in QUESTIONS:
            assert self.path is not None
            return questions.question_puzzles(QUESTIONS[self.task][1], self.path, split, n, self.split, seed)
        passage = passages(self.essays, needles.NEEDLE, self.context, split, seed) if self._has_essay else None
        return needles.needle_puzzles(needles.TASKS[self.task], split, seed, passage)

    def _example(self, identifier: str, prompt: str, answers: tuple[str, ...], room: int) -> Example:
        family = FAMILIES[self.task]
        # By its words and not by lines, since a prepared row may have lost its line breaks, or end with a template's.
        asked = max(prompt.rfind(opening) for opening in family.asks)
        return Example(
            id=identifier,
            prompt=prompt,
            references=answers,
            target=family.target(answers),
            max_new_tokens=family.max_new_tokens,
            metric=family.metric,
            question_at=asked if asked > 0 else None,
            # As in RULER's files: with the tokens that are generated.
            extra={"length": self.context - room},
        )


@dataclass(frozen=True)
class _Prompts:
    """Puts prompts together and measures them, against `most` tokens."""

    tokenizer: Any
    chat: bool
    most: int

    def render(self, text: str, prefix: str) -> str:
        return (user_message(self.tokenizer, text) if self.chat else text) + prefix

    def tokens(self, text: str) -> int:
        return len(encode_text(self.tokenizer, text))

    def room(self, prompt: str) -> int:
        return self.most - self.tokens(prompt)


def _room(prompts: _Prompts, puzzle: Puzzle, size: int) -> int:
    return prompts.room(prompts.render(puzzle.text(size), puzzle.prefix))
