"""The chat template of a tokenizer: messages in it, and what it puts around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evolkv.errors import TaskError

_MARK = "<<<the message>>>"


def user_message(tokenizer: Any, content: str) -> str:
    """Return `content` as the only user message in the model's chat template, up to where the answer begins.

    Raises:
        TaskError: as `render_chat`.
    """
    return render_chat(tokenizer, [{"role": "user", "content": content}])


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    **settings: Any,
) -> str:
    """Return messages in the model's chat template, up to where the answer begins.

    Args:
        tokenizer: the tokenizer, which has a chat template.
        messages: each with ``role`` and ``content`` (a text; of the last not blank), and what else the template takes.
        tools: descriptions of tools, as the template takes them.
        settings: what else the template takes.

    Raises:
        TaskError: the template raises, or what it makes does not contain the last message.
    """
    # Templates of models that read images as well may take a list of parts alone.
    parts = [{**each, "content": [{"type": "text", "text": each.get("content") or ""}]} for each in messages]
    extra: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False, **settings}
    extra |= {"tools": tools} if tools else {}
    reasons = []
    for form in (list(messages), parts):
        try:
            prompt = str(tokenizer.apply_chat_template(form, **extra))
        except Exception as error:  # a template is a program of the model's author
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
            continue
        if messages[-1]["content"].strip() in prompt:
            return prompt
        reasons.append("the message is not in what it makes")
    name = tokenizer.name_or_path or "this tokenizer"
    if len(messages) > 1:
        raise TaskError(f"the chat template of {name} cannot put such a chat ({reasons[0]}); give others, or mend it")
    raise TaskError(
        f"the chat template of {name} cannot put a user's message ({reasons[0]}); "
        "leave it out: --raw in generate, chat=false in a task; or mend it"
    )


def around_message(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]] = ({"role": "user"},),
    tools: Sequence[Mapping[str, Any]] | None = None,
    **settings: Any,
) -> tuple[str, str]:
    """Return the text that the chat template puts before and after the last message; nothing without a template.

    Args:
        tokenizer: the tokenizer.
        messages: as of `render_chat`; the last one's text is of no account. Default: one of the user.
        tools: as of `render_chat`.
        settings: what else the template takes.

    Raises:
        TaskError: as `render_chat`.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "", ""
    marked = [*messages[:-1], {**messages[-1], "content": _MARK}]
    before, _, after = render_chat(tokenizer, marked, tools, **settings).rpartition(_MARK)
    return before, after
