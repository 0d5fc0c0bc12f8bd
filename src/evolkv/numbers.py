"""What counts as a number."""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, of Python or NumPy; a truth value is none, though it is an int in Python."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
