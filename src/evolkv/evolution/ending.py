"""Searches that end before they are done: interrupted, or out of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, TypeVar

from evolkv.errors import enough_memory
from evolkv.evolution.config import SearchConfig
from evolkv.evolution.limit import TimeLimit


class _Result(Protocol):
    @property
    def interrupted(self) -> bool: ...


Config = TypeVar("Config", bound=SearchConfig)
Result = TypeVar("Result", bound=_Result)


def carried_out(search: Callable[[Config], Result], config: Config, limit: TimeLimit) -> Result:
    """Run a search; if it is interrupted while it reads its study, return what the whole study comes to.

    What was read until then is less than what is known, and would take its place in the files of the result.

    Args:
        search: runs it.
        config: its settings.
        limit: the time limit that `search` keeps.

    Raises:
        RunError: if memory does not suffice.
        KeyboardInterrupt: if interrupted before the first step or generation was scored, or again.
    """
    less = "a smaller --ceiling, fewer --train and --val examples, and shorter prompts take less"
    kept = f"; what is done is in {config.storage}, and the same command goes on from there" if config.storage else ""
    with enough_memory("in the search", f"{less}{kept}"):
        result = search(config)
        if result.interrupted and config.storage is not None and not limit.computes:
            limit.over = True
            result = search(replace(config, on_progress=None))
            if result.interrupted and not limit.computes:
                raise KeyboardInterrupt
    return result
