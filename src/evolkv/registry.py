"""Name → object tables whose misses suggest the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from evolkv.errors import UsageError

T = TypeVar("T")


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """The error for a `name` that is not among the `known` names of a `kind` of thing."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UsageError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}")


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
