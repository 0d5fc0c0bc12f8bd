"""What counts as a number, and as several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np


def is_whole(value: Any) -> TypeGuard[int]:
    """Return True for a whole number of Python or NumPy, but not for a truth value, though it is an int in Python."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_several(value: Any) -> TypeGuard[Iterable[Any]]:
    """Return True for what can be gone through; a tensor or an array without dimensions only says that it can."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0


def plain(value: Any) -> Any:
    """Return a number, text or truth value of NumPy as Python's own, which JSON can hold; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value
