"""Every error that EvolKV raises on purpose.

The message of each is one line that says what was wrong, what was expected and what to do next.
`UsageError` and its children mean that the input was at fault (exit code 2 on the command line);
`RunError` means that the input was fine but the work could not be completed (exit code 1).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class EvolKVError(Exception):
    """Base of all errors raised on purpose."""


class UsageError(EvolKVError, ValueError):
    """An argument, a file or a combination of settings that cannot be used."""


class ModelError(UsageError):
    """A model that cannot be found, loaded or compressed."""


class ProfileError(UsageError):
    """A profile that is malformed or does not belong to the model at hand."""


class CacheFileError(UsageError):
    """A file with a compressed cache that is malformed or does not belong to the model at hand."""


class TaskError(UsageError):
    """A task, or its data, that cannot be used."""


class BudgetError(UsageError):
    """Budgets that cannot be met: below a floor, above a ceiling, or a total out of reach."""


class RunError(EvolKVError, RuntimeError):
    """Work that failed although its input was valid (out of memory, a failed conversion, …)."""


class StudyError(UsageError):
    """A study cannot be opened or continued: other settings, in use, or not a study."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return True if an error of PyTorch or Python says that memory did not suffice."""
    # By name, because to import PyTorch takes seconds. On a CPU it raises a plain RuntimeError.
    named = any(kind.__name__ in ("OutOfMemoryError", "MemoryError") for kind in type(error).__mro__)
    return named or (type(error) is RuntimeError and "can't allocate memory" in str(error))


@contextlib.contextmanager
def enough_memory(doing: str, less: str) -> Iterator[None]:
    """Turn an error that says that memory did not suffice into one line.

    Args:
        doing: what memory was needed for.
        less: what takes less of it.

    Raises:
        RunError: memory did not suffice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"out of memory {doing}; {less}") from error
