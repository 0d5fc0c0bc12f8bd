"""Tests for numbers."""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np


def is_whole(value: Any) -> TypeGuard[int]:
    """Return True for a whole number of Python or NumPy, but not for a truth value, though it is an int in Python."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
