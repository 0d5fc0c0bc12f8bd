"""Prompts without answers: your traffic as it is, from text files, JSON Lines or chat logs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from evolkv.errors import TaskError, UsageError
from evolkv.models.chat import around_message, render_chat
from evolkv.schemas import Schema
from evolkv.tasks.base import Example, read_text
from evolkv.tasks.prompts import cut_middle, encode_text, question_at, uses_chat
from evolkv.tasks.rows import (
    AnyText,
    Count,
    Name,
    PromptRows,
    Row,
    Splitting,
    Text,
    check_question,
    checked_rows,
    digest,
    parse_rows,
)


@dataclass(frozen=True)
class RawPrompts(PromptRows):
    """Your own prompts, without answers: text files, JSON Lines or chat logs.

    The metric is `fidelity`, which compares with the model's own greedy continuation under the full cache. The path is

    * a folder: each of its files, those of its folders included, as below; hidden ones are left out;
    * a `.jsonl` file: a prompt on each line, an object with `prompt` (text) or `messages` (a chat: a list of objects
      with `role` and `content`), and optionally `max_new_tokens`, `id`, `question` beside a `prompt` (a text that ends
      it, which the protocol "agnostic" leaves out of what it compresses) and `tools` beside `messages` (for the chat
      template). Other fields are ignored;
    * any other file: one prompt, the whole text.

    Messages go through the model's chat template. The model answers the last message that is not the assistant's: what
    the assistant said after it is left out, so a log can be taken as it is. Under the protocol "agnostic" the last
    message of several is the question. Chats that begin with the same words, up to the first message of the user, are
    in the same split.

    Args:
        path: the file or folder, UTF-8.
        max_new_tokens: most tokens of the model's continuation, whatever the rows say. Default None: each row's own,
            else 64.
        split: as of task `jsonl`: "auto" (default) gives a quarter of the prompts to train, a quarter to validation
            and half to report; "all" uses every prompt for any split.
        chat: whether to put a prompt in the model's chat template as a user message. Default False.
        context: most tokens of a prompt, or of all messages together, before the chat template; of a longer prompt, or
            of the longest messages, the middle is cut out, as LongBench does. Default None: nothing is cut.

    Raises:
        TaskError: a setting out of its range.
    """

    name: ClassVar[str] = "prompts"
    default_metric: ClassVar[str] = "fidelity"
    main_setting: ClassVar[str] = "path"
    groups: ClassVar[str] = "prompts (a text file is one prompt, and a chat's first message tells it apart)"

    path: str
    max_new_tokens: int | None = None
    split: Splitting = "auto"
    chat: bool = False
    context: int | None = None

    def __post_init__(self) -> None:
        self._check_settings()

    def _rows(self) -> Iterator[Row[_Prompt]]:
        root = Path(os.path.expanduser(self.path))
        for file in _files(root, self.path):
            text = read_text(str(file))
            label = file.relative_to(root).as_posix() if file != root else file.name
            if file.suffix.lower() == ".jsonl":
                for (number, where), fields in checked_rows(_Prompt, parse_rows(text, str(file))):
                    name = fields.id or f"{label.removesuffix(file.suffix)}-{number}"
                    yield Row(name, where, fields, fields.group, fields.content)
            elif file.suffix.lower() == ".json":
                raise TaskError(
                    f"{file}: expected JSON Lines, with one object on each line; convert it to a .jsonl file"
                )
            else:
                for _, fields in checked_rows(_Prompt, [((1, str(file)), {"prompt": text})]):
                    yield Row(label, str(file), fields, fields.group, fields.content)

    def _example(self, row: Row[_Prompt], tokenizer: Any) -> Example:
        fields = row.fields
        place: int | None = None
        if fields.prompt is not None:
            prompt, place = self._asked(fields.prompt, fields.question, tokenizer)
        else:
            turns = _shortened(fields.turns, tokenizer, self.context)
            if not uses_chat(tokenizer, None, self.name):
                raise TaskError(
                    f"{row.where}: 'messages' need a chat template, and this tokenizer has none; take another model, "
                    "or give each chat as a 'prompt', a text"
                )
            try:
                prompt = render_chat(tokenizer, turns, fields.tools)
                if len(turns) > 1:
                    place = question_at(prompt, turns[-1]["content"], around_message(tokenizer, turns, fields.tools)[1])
            except TaskError as error:
                raise TaskError(f"{row.where}: {error}") from None
        return Example(
            id=row.id,
            prompt=prompt,
            references=(),
            max_new_tokens=self.max_new_tokens or fields.max_new_tokens or 64,
            metric=self.default_metric,
            question_at=place,
        )


def _joined(content: Any) -> Any:
    """Return the text of a content that is a list of text parts."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text, or a list of text parts alone")
    return "".join(map(str, texts))


class _Message(Schema):
    # What else there is, such as tool_calls, is for the chat template.
    model_config = ConfigDict(extra="allow")

    role: Text
    content: Annotated[AnyText | None, BeforeValidator(_joined)] = None


class _Prompt(Schema):
    prompt: Text | None = None
    messages: Annotated[list[_Message], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    question: Text | None = None
    max_new_tokens: Count | None = None
    id: Name | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> _Prompt:
        if (self.prompt is None) == (self.messages is None):
            raise UsageError("expected either 'prompt', a text, or 'messages', a chat")
        if self.prompt is not None and self.question is not None:
            check_question(self.prompt, self.question)
        if self.messages is not None and self.question is not None:
            raise UsageError("'question' is for a 'prompt'; of 'messages' the last is the question")
        if self.messages is not None and not (self.turns and (self.turns[-1].get("content") or "").strip()):
            raise UsageError("'messages' has no text for the assistant to answer; expected one of the user")
        return self

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The messages up to the last one that is not the assistant's."""
        turns = [message.model_dump(exclude_unset=True) for message in self.messages or ()]
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        return turns

    @property
    def group(self) -> str:
        if self.prompt is not None:
            return self.prompt
        roles = [turn["role"] for turn in self.turns]
        first = roles.index("user") + 1 if "user" in roles else len(roles)
        return json.dumps(self.turns[:first])

    @property
    def content(self) -> str:
        return digest(json.dumps([self.prompt, self.turns, self.tools, self.max_new_tokens]))


def _files(root: Path, path: str) -> list[Path]:
    """Return the files that a path stands for, in the order of their names."""
    if not root.is_dir():
        return [root]
    within = sorted(root.rglob("*"), key=lambda file: file.relative_to(root).as_posix())
    found = [
        file
        for file in within
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]
    if not found:
        raise TaskError(f"folder {path} has no files; put one prompt in each, or JSON Lines in a .jsonl file")
    return found


def _shortened(turns: list[dict[str, Any]], tokenizer: Any, limit: int | None) -> list[dict[str, Any]]:
    """Return messages of at most `limit` tokens together: the longest loses its middle, then the next one."""
    lengths = [len(encode_text(tokenizer, turn.get("content") or "")) for turn in turns] if limit is not None else []
    left = set(range(len(turns)))
    turns = [dict(turn) for turn in turns]
    while limit is not None and left and sum(lengths) > limit:
        longest = max(left, key=lambda i: lengths[i])
        left.remove(longest)
        # Something of each message stays: without it the chat would be another.
        lengths[longest] = max(2, lengths[longest] - (sum(lengths) - limit))
        turns[longest]["content"] = cut_middle(tokenizer, turns[longest].get("content") or "", lengths[longest])
    return turns
