"""The user's settings: a profile, or a method and a budget; by environment variable or by configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evolkv.errors import UsageError
from evolkv.methods import Method, chosen_method

#: The environment variable with the path of a profile, or its address on the Hub.
VARIABLE = "EVOLKV_PROFILE"
#: The key in vLLM's ``additional_config``.
KEY = "evolkv"
_FIELDS = ("profile", "method", "budget", "exact")


@dataclass(frozen=True)
class Settings:
    """One profile, or one method with a budget.

    Attributes:
        profile: path of a profile, or its address on the Hub; or None.
        method: a method's name, such as ``pyramidkv``, or None.
        budget: mean cache entries per KV head, or a share of each prompt such as ``10%``; None for the profile's own.
        source: where the settings come from, for messages.
        exact: whether budgets are kept to the entry, instead of rounded up to where a block begins.
    """

    profile: str | None
    method: str | None
    budget: int | str | None
    source: str
    exact: bool = False

    @classmethod
    def read(cls, additional_config: Any) -> Settings | None:
        """Return the settings, or None where nothing is asked for.

        Args:
            additional_config: vLLM's configuration of that name. What it says goes before the environment variable.

        Raises:
            UsageError: settings that cannot be used.
        """
        given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if given is None:
            path = os.environ.get(VARIABLE, "").strip()
            return cls(path, None, None, VARIABLE) if path else None
        source = f"additional_config[{KEY!r}]"
        if not isinstance(given, Mapping):
            raise UsageError(
                f"{source} is {given!r}; expected a mapping such as {{'profile': 'profile.json'}} or "
                "{'method': 'pyramidkv', 'budget': 512}"
            )
        unknown = sorted(set(given) - {*_FIELDS})
        if unknown:
            raise UsageError(f"{source} has no setting {unknown[0]!r}; expected some of {', '.join(_FIELDS)}")
        for name in ("profile", "method"):
            if not isinstance(given.get(name), str | None):
                raise UsageError(f"{source}[{name!r}] is {given[name]!r}; expected a text")
        budget = given.get("budget")
        if isinstance(budget, bool) or not isinstance(budget, int | str | None):
            raise UsageError(
                f"{source}['budget'] is {budget!r}; expected a number such as 512, or a share such as '10%'"
            )
        exact = given.get("exact", False)
        if not isinstance(exact, bool):
            raise UsageError(f"{source}['exact'] is {exact!r}; expected true or false")
        settings = cls(given.get("profile"), given.get("method"), budget, source, exact)
        if settings.profile is None and settings.method is None:
            raise UsageError(f"{source} names neither a profile nor a method; add 'profile', or 'method' and 'budget'")
        return settings

    def chosen(self) -> Method:
        """Return the method that is asked for.

        Raises:
            UsageError: one that cannot run in vLLM, or as `evolkv.methods.chosen_method`.
        """
        try:
            method = chosen_method(self.profile, self.method, self.budget)
        except UsageError as error:
            raise UsageError(f"{self.source}: {error}") from None
        if method.is_full or method.selector is None:
            raise UsageError(f"{self.source}: method {method.name!r} evicts nothing; leave the setting out")
        if method.observers:
            raise UsageError(
                f"{self.source}: method {method.name!r} lays out budgets for each prompt anew, and vLLM's scheduler "
                "has to know them beforehand; use a profile, or budgets that are the same for every prompt, such as "
                f"{method.selector.name!r} or 'pyramidkv'"
            )
        if method.selector.layer is not None:
            raise UsageError(
                f"{self.source}: selector {method.selector.name!r} needs cache layers of its own, which vLLM has not; "
                "use a profile or method with another selector, such as 'snapkv'"
            )
        return method
