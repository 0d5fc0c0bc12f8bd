"""Name → object tables whose misses suggest the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from evolkv.errors import UsageError

T = TypeVar("T")


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """The error for a `name` that is not among the `known` names of a `kind` of thing."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UsageError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}")


def parse_named(text: str, kind: str, example: str) -> dict[str, Any]:
    """A mapping with ``name`` and parameters, from ``name`` or ``name:parameter=value,parameter=value``.

    Args:
        text: what to read.
        kind: what is named, for messages.
        example: of such a text, for messages.

    Raises:
        UsageError: a part that is not parameter=value, or a parameter given twice.
    """
    name, _, rest = text.partition(":")
    spec: dict[str, Any] = {"name": name.strip()}
    for part in filter(str.strip, rest.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key:
            raise UsageError(f"{kind} {text!r}: {part!r} is not parameter=value; write for example {example}")
        if key in spec:
            raise UsageError(f"{kind} {text!r}: {key} is given twice; give it once")
        spec[key] = _value(value)
    return spec


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def with_parameters(cls: type[T], values: Mapping[str, Any]) -> T:
    """An object of a dataclass that has a name, and defaults for all of its fields.

    Args:
        cls: its class.
        values: of its parameters, by name; of the types that their defaults have.

    Raises:
        UsageError: an unknown parameter, or a value of another type.
    """
    owner, known = getattr(cls, "name", cls.__name__), {field.name: field.default for field in fields(cast(Any, cls))}
    found = {}
    for key, value in values.items():
        if key not in known:
            raise unknown_name(f"parameter of {owner}", key, known)
        kind = type(known[key])
        # bool is an int in Python, but `"window": true` in a file is a mistake.
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UsageError(f"{owner}: {key} is {value!r}; expected {kind.__name__} like {known[key]!r}")
        found[key] = kind(value)
    return cls(**found)


class Registry(Mapping[str, T]):
    """A read-only mapping from names to entries of one kind.

    Args:
        kind: what an entry is, in the words of an error message ("selector", "task", …).
        entries: the entries by name.
    """

    def __init__(self, kind: str, entries: Mapping[str, T]):
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise unknown_name(self.kind, name, self._entries) from None

    # Mapping's own `get` waits for a KeyError, and a miss here is a UsageError.
    def get(self, name: str, default: Any = None) -> Any:
        """The entry called `name`, or `default`."""
        return self._entries.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
