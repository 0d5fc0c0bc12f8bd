"""Prompts: the tokens that a model reads, the cut of a long text, the place of the question."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from evolkv.errors import TaskError
from evolkv.tasks.base import Example


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before a text (most often one BOS or none), and those it puts after it."""
    # Asked each time, because a tokenizer's settings can change. Any text shows it.
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    before = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:before], whole[before + len(bare) :]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text that the model is to continue.

    The ids begin with BOS once, where the tokenizer adds it or a chat template wrote it. Nothing stands behind the
    text: after an EOS, which some tokenizers add, the text would be over.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    before, _ = special_tokens(tokenizer)
    # Some chat templates begin with a line break.
    written = before and text.lstrip().startswith("".join(tokenizer.convert_ids_to_tokens(before)))
    return ids if written else before + ids


def encode_prompt(tokenizer: Any, example: Example) -> torch.LongTensor:
    """Return the token ids of an example's prompt: LongTensor [1, T].

    Args:
        tokenizer: the model's tokenizer.
        example: the example; its chat template, if any, is in the prompt already.
    """
    return torch.tensor([encode_text(tokenizer, example.prompt)], dtype=torch.long)  # type: ignore[return-value]


def prompt_lengths(tokenizer: Any, examples: Iterable[Example]) -> list[int]:
    """Return the tokens of each example's prompt."""
    return [len(encode_text(tokenizer, example.prompt)) for example in examples]


def uses_chat(tokenizer: Any, choice: bool | None, task: str) -> bool:
    """Return whether prompts go into the chat template.

    Args:
        tokenizer: the tokenizer.
        choice: yes or no; None for "where there is one".
        task: name of the task, for messages.

    Raises:
        TaskError: `choice` is something else, or asks for a chat template where there is none.
    """
    if not (choice is None or isinstance(choice, bool)):
        raise TaskError(f"{task}: chat={choice!r} is unknown; expected True, False or None")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if choice and not has_template:
        raise TaskError(f"{task}: chat=true, but this tokenizer has no chat template; use chat=false")
    return has_template if choice is None else choice


def cut_middle(tokenizer: Any, prompt: str, limit: int) -> str:
    """Return a prompt of at most `limit` tokens: the first and last halves of a longer one, as LongBench cuts them.

    A chat's markup stays in it; only a BOS that is added to every text is left out.
    """
    ids = encode_text(tokenizer, prompt)
    if len(ids) <= limit:
        return prompt
    half = limit // 2
    before, _ = special_tokens(tokenizer)
    start, end = ids[:half], ids[-half:]
    if start[: len(before)] == before:
        start = start[len(before) :]
    # A tokenizer's clean-up would alter spacing everywhere, not just where the text is cut.
    return "".join(tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (start, end))


def question_at(prompt: str, question: str, behind: str = "") -> int | None:
    """Return where a prompt's last occurrence of a question begins; None if it is not there, or nothing is before.

    Args:
        prompt: the prompt.
        question: its words.
        behind: what stands behind the question, and may hold its words, too; see `around_message`.
    """
    place = prompt.removesuffix(behind).rfind(question.strip())
    return place if place > 0 else None
