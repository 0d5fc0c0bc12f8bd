"""Read budgets as they are written, in Python and on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv.errors import BudgetError
from evolkv.numbers import is_several, is_whole

#: No prompt is longer: a larger budget is a mistake.
MAX_BUDGET = 2**31
#: Decimals of a share in percent: more than a prompt can tell apart, and few enough for a float to hold.
SHARE_DIGITS = 8
_SHARE = rf"[0-9]{{1,2}}(\.[0-9]{{1,{SHARE_DIGITS}}})?%"


class Share(str):
    """A budget as a share of each prompt, such as ``10%`` or ``2.5%``. It is a text, in its shortest form.

    For a prompt of T tokens it stands for round(share · T) cache entries per KV head (halves go to the even number).

    Raises:
        BudgetError: anything but a percentage above 0% and below 100%.
    """

    def __new__(cls, text: str) -> Share:
        if not isinstance(text, str) or not re.fullmatch(_SHARE, text) or Decimal(text[:-1]) == 0:
            raise _wrong_share("the share", str(text))
        return super().__new__(cls, f"{Decimal(text[:-1]).normalize():f}%")

    @classmethod
    def of_fraction(cls, fraction: float | str | Decimal) -> Share:
        """Return the share that a fraction of 1 is: of 0.1 it is ``10%``.

        Raises:
            BudgetError: as for the class.
        """
        return cls(f"{100 * Decimal(str(fraction)):f}%")

    @property
    def fraction(self) -> float:
        """The share as a number between 0 and 1."""
        return float(self._percent / 100)

    def of(self, tokens: int) -> int:
        """Return the budget for a prompt, in cache entries per KV head."""
        return round(self._percent * tokens / 100)

    @property
    def _percent(self) -> Decimal:
        return Decimal(self[:-1])


#: A budget: cache entries per KV head, or a share of each prompt.
Budget = int | Share
#: One budget as it is given: a whole number, a share, or the text of either.
BudgetSpec = int | np.integer[Any] | str


def read_budget(spec: BudgetSpec, name: str = "the budget", several: bool = False) -> Budget:
    """Return one budget: cache entries per KV head, or a share of each prompt.

    Args:
        spec: the budget.
        name: of the argument, for messages.
        several: whether the argument may hold several, for messages.

    Raises:
        BudgetError: anything but a whole number from 1 to 2³¹, or a percentage above 0% and below 100%.
    """
    if not (isinstance(spec, str) and spec.strip().endswith("%")):
        return read_entries(spec, name, several)
    try:
        return Share(spec.strip())
    except BudgetError:
        raise _wrong_share(name, spec.strip()) from None


def read_entries(spec: BudgetSpec, name: str = "the budget", several: bool = False) -> int:
    """Return one budget where only a number of cache entries per KV head will do; see `read_budget`."""
    whole = int(spec) if is_whole(spec) or (isinstance(spec, str) and re.fullmatch(r"\s*[0-9]{1,12}\s*", spec)) else 0
    if not 1 <= whole <= MAX_BUDGET:
        several_ones = " (several: 64,128)" if several else ""
        shown = spec.strip() if isinstance(spec, str) and spec.strip().lstrip("-").isdigit() else repr(spec)
        raise BudgetError(
            f"{name} is {_short(shown)}; expected a whole number of cache entries per KV head, from 1 to "
            f"{MAX_BUDGET:,}, such as 64{several_ones}, or a share of each prompt, such as 10%"
        )
    return whole


def read_budgets(specs: BudgetSpec | Iterable[BudgetSpec], name: str = "the budget") -> list[Budget]:
    """Return budgets, each once, in their order.

    Args:
        specs: one budget or several; a text may hold several with commas between them, such as ``"64,128"``.
        name: of the argument, for messages.

    Raises:
        BudgetError: as for `read_budget`.
    """
    several: Iterable[Any] = specs if is_several(specs) and not isinstance(specs, (str, Mapping)) else [specs]
    parts = [part for spec in several for part in (spec.split(",") if isinstance(spec, str) else [spec])]
    return list(dict.fromkeys(read_budget(part, name, True) for part in parts))


def held_in_blocks(budgets: ArrayLike, tokens: int, block_size: int) -> NDArray[np.int64]:
    """Return what a server that stores entries in blocks holds of a prompt under some budgets, in their shape.

    The kept entries fill the last slots of the prompt, so their number is rounded up until they begin where a block
    begins. A budget that covers the prompt holds the prompt.

    Args:
        budgets: cache entries.
        tokens: length of the prompt.
        block_size: tokens of a block.
    """
    kept = np.minimum(np.asarray(budgets, dtype=np.int64), tokens)
    return np.asarray(tokens - (tokens - kept) // block_size * block_size)


def size_of(budget: Budget | str) -> float:
    """Return what budgets are put in order by, numbers among numbers and shares among shares."""
    return float(str(budget).rstrip("%"))


def _wrong_share(name: str, text: str) -> BudgetError:
    return BudgetError(
        f"{name} is {_short(text)}; expected a share of each prompt above 0% and below 100%, without spaces and "
        f"with at most {SHARE_DIGITS} digits behind the point, such as 10% or 2.5%"
    )


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "…"
