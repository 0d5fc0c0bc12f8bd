"""Look things up by name. A miss suggests the nearest name; other packages may add entries."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, cast

from evolkv.errors import UsageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: For a message on several names where one is expected.
NO_COMMA = "A comma does not separate names here; give them one by one"

#: What can stand in a spec: neither ``:``, ``,``, ``=`` nor ``+``, which mean something there.
_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """Return the error for a `name` that is not among the `known` names of a `kind` of thing."""
    known = sorted(known)
    by_letters = {each.lower(): each for each in known}
    near = difflib.get_close_matches(str(name).lower(), by_letters, n=1, cutoff=0.5)
    hint = f" Did you mean {by_letters[near[0]]!r}?" if near else ""
    if "," in str(name):
        hint = f" {NO_COMMA}."
    return UsageError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}")


def with_parameters(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return an object of a dataclass that has a name, and defaults for all of its fields.

    Args:
        cls: its class.
        values: of its parameters, by name; of the types that their defaults have.

    Raises:
        UsageError: an unknown parameter, or a value of another type.
    """
    owner = getattr(cls, "name", cls.__name__)
    defaults = {field.name: field.default for field in fields(cast(Any, cls))}
    parameters = {}
    for key, value in values.items():
        if key not in defaults:
            raise unknown_name(f"parameter of {owner}", key, defaults)
        kind = type(defaults[key])
        # bool is an int in Python, but `"window": true` in a file is a mistake.
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UsageError(f"{owner}: {key} is {value!r}; expected {kind.__name__} like {defaults[key]!r}")
        parameters[key] = kind(value)
    return cls(**parameters)


class Registry(Mapping[str, T]):
    """A mapping from names to entries of one kind: EvolKV's own, then those of installed packages and of `register`.

    A package's entry is imported when it is asked for. One that is called as an entry of EvolKV's is passed over, with
    a warning.

    Args:
        kind: what an entry is, in the words of an error message ("selector", "task", …).
        entries: EvolKV's own, by name.
        group: the entry point group in which packages offer others (``evolkv.selectors``). Default None: they cannot.
        base: what others' entries must be subclasses of. Default None: anything.
    """

    def __init__(self, kind: str, entries: Mapping[str, T], group: str | None = None, base: type | None = None):
        self.kind = kind
        self.group = group
        self.base = base
        self._entries = dict(entries)
        self._own = frozenset(entries)

    def register(self, name: str, entry: T) -> None:
        """Add an entry, for this process. The same name again takes the place of what was registered before.

        Args:
            name: of letters, digits, ``_``, ``-`` and ``.``.
            entry: the class or function; if it has a `name`, this one.

        Raises:
            UsageError: the name is EvolKV's own, cannot stand in a spec, or is not the entry's; or the entry is no
                subclass of `base`.
        """
        if name in self._own:
            raise UsageError(f"{self.kind} {name!r} is EvolKV's own; register yours under another name")
        self._check(name, entry)
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise unknown_name(self.kind, name, self)
        if name not in self._entries:
            self._entries[name] = self._load(self._offers[name])
        return self._entries[name]

    # Mapping's own `get` waits for a KeyError, and a miss here is a UsageError.
    def get(self, name: str, default: Any = None) -> Any:
        """Return the entry of a name.

        Args:
            name: the name.
            default: what is returned where there is none.
        """
        if name not in self:
            return default
        return self[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._entries or name in self._offers)

    def __iter__(self) -> Iterator[str]:
        yield from list(self._entries)
        yield from (name for name in self._offers if name not in self._entries)

    def __len__(self) -> int:
        return len({*self._entries, *self._offers})

    @cached_property
    def _offers(self) -> dict[str, EntryPoint]:
        """Return the entry points that packages offer, by name; none of them is imported yet."""
        offers = {} if self.group is None else {each.name: each for each in entry_points(group=self.group)}
        for name in self._own.intersection(offers):
            logger.warning(
                "%s %r of package %s is passed over: EvolKV has one", self.kind, name, _package(offers.pop(name))
            )
        return offers

    def _load(self, offer: EntryPoint) -> T:
        try:
            entry = offer.load()
        except Exception as error:  # whatever another's module raises
            raise UsageError(
                f"{self.kind} {offer.name!r} of package {_package(offer)} cannot be imported "
                f"({type(error).__name__}: {error}); mend or uninstall the package"
            ) from error
        self._check(offer.name, entry)
        return cast(T, entry)

    def _check(self, name: str, entry: Any) -> None:
        if not _NAME.fullmatch(name):
            raise UsageError(f"{self.kind} {name!r}: expected a name of letters, digits, '_', '-' and '.'")
        if self.base is not None and not (isinstance(entry, type) and issubclass(entry, self.base)):
            raise UsageError(
                f"{self.kind} {name!r} is {entry!r}; expected a subclass of {self.base.__module__}.{self.base.__name__}"
            )
        own = getattr(entry, "name", name)
        if own != name:
            raise UsageError(f"{self.kind} {name!r} calls itself {own!r}; give both the same name")


def _package(offer: EntryPoint) -> str:
    return offer.dist.name if offer.dist is not None else offer.value
