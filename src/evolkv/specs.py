r"""Specs as people write them: `name` or `name:key=value,key=value`, for tasks, selectors and allocators alike.

A comma in a value is written `\,`. Backslashes are literal (Windows paths need no care) except in a run directly before
a comma: there each pair stands for one backslash, and an odd one out escapes the comma.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import fields
from typing import Any

from evolkv.errors import UsageError
from evolkv.registry import NO_COMMA

#: Words for yes and no, in small letters.
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_COMMA = re.compile(r"(\\*),")
_HEAD = re.compile(r"\s*([^:,=\s]+)\s*(?:[:,]|&&|\Z)")


def parse_spec(
    text: str, kind: str, positional: Mapping[str, str] | None = None, names: Container[str] = ()
) -> tuple[str, dict[str, str]]:
    """Return the name in a spec, and its values as texts.

    Args:
        text: the spec.
        kind: what it describes ("task", "selector", …), for messages.
        positional: for some names, the key of a first value that is written without one (`ruler:vt`).
        names: those that a spec may begin with; one after a comma is a second spec, which has no place here.

    Raises:
        UsageError: a part that is not key=value, a key given twice, or a second spec.
    """
    name, _, rest = text.partition(":")
    name = name.strip()
    values: dict[str, str] = {}
    for index, part in enumerate(_split(rest) if rest.strip() else []):
        key, equals, value = part.partition("=")
        key = key.strip()
        if index and (":" in key or not equals) and (key.partition(":")[0] in names):
            raise UsageError(f"{kind} {text!r}: {part.strip()!r} begins another one. {NO_COMMA}")
        # A path may have "=" in it.
        if not index and positional and name in positional and (not equals or (key and not key.isidentifier())):
            key, equals, value = positional[name], "=", part.strip()
        if not equals or not key:
            raise UsageError(
                rf"{kind} {text!r}: {part!r} is not key=value; write {kind}s as name:key=value,key=value, and a comma "
                r"in a value as '\,'"
            )
        if key in values:
            raise UsageError(f"{kind} {text!r}: {key} is given twice; give it once")
        values[key] = value
    return name, values


def parse_named(text: str, kind: str, known: Mapping[str, type], names: Container[str] = ()) -> dict[str, Any]:
    """Return a mapping with the `name` in a spec and its values, as truth values and numbers where they read as such.

    Args:
        text, kind, names: as for `parse_spec`.
        known: the dataclass behind each name. A value of a field that is a text by default stays one.

    Raises:
        UsageError: as for `parse_spec`, or for an unknown name.
    """
    name, values = parse_spec(text, kind, names=names)
    if "name" in values:
        raise UsageError(f"{kind} {text!r}: name is given twice; give it once")
    texts = {field.name for field in fields(known[name]) if isinstance(field.default, str)}
    read = {key: value.strip() if key in texts else _value(value.strip()) for key, value in values.items()}
    return {"name": name, **read}


def format_spec(name: str, values: Mapping[str, str]) -> str:
    """Return the spec from which `parse_spec` reads the name and the values."""
    parts = [_COMMA.sub(r"\1\1\\,", f"{key}={value}") for key, value in values.items()]
    # A run of backslashes that ends a value stands before the comma that separates it from the next.
    parts[:-1] = [re.sub(r"(\\+)\Z", r"\1\1", part) for part in parts[:-1]]
    return f"{name}:{','.join(parts)}" if parts else name


def split_specs(text: str, names: Container[str]) -> list[str]:
    """Return the specs in a text that has commas between specs as well as within them.

    After a comma a new spec begins where a name stands alone or before a colon: one of `names`, or any name if the
    spec before has no colon.
    """
    specs, begin = [], 0
    for comma in _COMMA.finditer(text):
        head = _HEAD.match(text, comma.end())
        before = text[begin : comma.start()]
        if len(comma[1]) % 2 or head is None or not (head[1] in names or ":" not in before):
            continue
        specs.append(before + comma[1][: len(comma[1]) // 2])
        begin = comma.end()
    return [spec.lstrip(" ") for spec in (*specs, text[begin:])]


def _split(text: str) -> list[str]:
    parts, part, end = [], "", 0
    for comma in _COMMA.finditer(text):
        backslashes = len(comma[1])
        part += text[end : comma.start()] + "\\" * (backslashes // 2)
        if backslashes % 2:
            part += ","
        else:
            parts.append(part)
            part = ""
        end = comma.end()
    return [*parts, part + text[end:]]


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text
