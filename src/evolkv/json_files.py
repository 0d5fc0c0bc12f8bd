"""Read JSON files that anyone may have written, and say in one line what is wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from evolkv.errors import UsageError


def read_json(path: str | os.PathLike[str], most_bytes: int, expected: str) -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file.
        most_bytes: a larger file is refused before any of it is read.
        expected: what the file should be, for messages, such as "a profile made by evolkv".

    Raises:
        UsageError: a file that is missing, no regular file, too large, or not JSON. The message does not name the file.
    """
    source = Path(path)
    try:
        if source.exists() and not source.is_file():
            raise UsageError(f"is {'a folder' if source.is_dir() else 'not a regular file'}, expected {expected}")
        if source.stat().st_size > most_bytes:
            raise UsageError(f"larger than {most_bytes >> 20} MiB, expected {expected}")
        text = source.read_text(encoding="utf-8-sig")
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=unique_keys)
        check_characters(json.dumps(data, ensure_ascii=False))
        return data
    except FileNotFoundError:
        raise UsageError(f"no such file; expected {expected}") from None
    except UnicodeDecodeError:
        raise UsageError(f"not text; expected {expected}") from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        # Some of Python's messages end as the place begins.
        found = error.msg.removesuffix(" at")
        raise UsageError(f"not JSON: {found} at line {error.lineno}, column {error.colno}") from None
    except RepeatedKeyError as error:
        raise UsageError(f"key {error} is given twice; give it once") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"not JSON that can be read: {error}") from None


class RepeatedKeyError(ValueError):
    """An object has the key twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these keys and values; raise `RepeatedKeyError` where a key is there twice."""
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise RepeatedKeyError(repr(key))
        fields[key] = value
    return fields


def check_characters(text: str) -> str:
    """Return a text; raise `UsageError` for half of a surrogate pair, which JSON can spell and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{text[error.start]!a} is half of a character; write the whole character, or leave it out"
        ) from None
    return text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
