"""EvolKV: evolutionary KV-cache compression for large language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evolkv.on_demand import from_homes
from evolkv.version import __version__

if TYPE_CHECKING:
    from evolkv.cache import CompressedCache, compress
    from evolkv.errors import EvolKVError, RunError, UsageError
    from evolkv.evaluation import evaluate
    from evolkv.evolution import search
    from evolkv.evolution.progress_bar import progress_bar
    from evolkv.models import load_model
    from evolkv.profile import BudgetProfile

# Public name -> where it lives. Loaded on first use: torch takes seconds to import, and `evolkv --help` needs none
# of it.
_HOMES = {
    "BudgetProfile": "evolkv.profile",
    "CompressedCache": "evolkv.cache",
    "EvolKVError": "evolkv.errors",
    "RunError": "evolkv.errors",
    "UsageError": "evolkv.errors",
    "compress": "evolkv.cache",
    "evaluate": "evolkv.evaluation",
    "load_model": "evolkv.models",
    "progress_bar": "evolkv.evolution.progress_bar",
    "search": "evolkv.evolution",
}

__all__ = [
    "BudgetProfile",
    "CompressedCache",
    "EvolKVError",
    "RunError",
    "UsageError",
    "__version__",
    "compress",
    "evaluate",
    "load_model",
    "progress_bar",
    "search",
]


__getattr__ = from_homes(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
