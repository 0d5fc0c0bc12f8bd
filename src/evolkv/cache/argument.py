"""What transformers calls the cache in a call: ``cache`` since 5.24, ``past_key_values`` before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_NAMES = ("cache", "past_key_values")


def cache_argument(function: Callable[..., Any]) -> str:
    """The name under which a `forward` takes its cache.

    Code that a model brings along may still say ``past_key_values``.
    """
    parameters = inspect.signature(function).parameters
    return next((name for name in _NAMES if name in parameters), _NAMES[-1])


def given_cache(kwargs: dict[str, Any]) -> Any:
    """The cache among the keyword arguments of a call, by either name, or None."""
    return next((kwargs[name] for name in _NAMES if kwargs.get(name) is not None), None)


def with_cache(function: Callable[..., Any], kwargs: dict[str, Any], cache: Any) -> dict[str, Any]:
    """The keyword arguments of a call of `function`, with `cache` in place of the one there."""
    others = {name: value for name, value in kwargs.items() if name not in _NAMES}
    return {**others, cache_argument(function): cache}
