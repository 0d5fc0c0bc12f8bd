"""Read budgets as they are written, in Python and on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from evolkv.errors import BudgetError
from evolkv.numbers import is_whole

#: One budget: a whole number, or the text of one.
BudgetSpec = int | np.integer[Any] | str
#: No prompt is longer: a larger budget is a mistake.
MAX_BUDGET = 2**31


def read_budget(spec: BudgetSpec, name: str = "the budget") -> int:
    """Return one budget, in cache entries per KV head; `name` is for messages.

    Raises:
        BudgetError: anything but a whole number from 1 to 2³¹.
    """
    whole = int(spec) if is_whole(spec) or (isinstance(spec, str) and re.fullmatch(r"\s*[0-9]{1,12}\s*", spec)) else 0
    if not 1 <= whole <= MAX_BUDGET:
        shown = spec.strip() if isinstance(spec, str) and spec.strip().lstrip("-").isdigit() else repr(spec)
        shown = shown if len(shown) <= 40 else shown[:37] + "…"
        raise BudgetError(
            f"{name} is {shown}; expected a whole number of cache entries per KV head, at least 1, such as 64 "
            "(several: 64,128)"
        )
    return whole


def read_budgets(specs: BudgetSpec | Iterable[BudgetSpec], name: str = "the budget") -> list[int]:
    """Return budgets, each once, in their order.

    Args:
        specs: one budget or several; a text may hold several with commas between them, such as ``"64,128"``.
        name: of the argument, for messages.

    Raises:
        BudgetError: as for `read_budget`.
    """
    several: Iterable[Any] = specs if isinstance(specs, Iterable) and not isinstance(specs, (str, Mapping)) else [specs]
    parts = [part for spec in several for part in (spec.split(",") if isinstance(spec, str) else [spec])]
    return list(dict.fromkeys(read_budget(part, name) for part in parts))
