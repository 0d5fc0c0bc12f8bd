"""The compressed cache and its hook into attention."""

from __future__ import annotations

from evolkv.cache.transformers_needed import check_transformers

# Before the modules below, which import what older versions of transformers do not have.
check_transformers()

from evolkv.cache.block import compress  # noqa: E402
from evolkv.cache.compressed import CompressedCache  # noqa: E402
from evolkv.cache.reeviction import Reeviction  # noqa: E402

__all__ = ["CompressedCache", "Reeviction", "compress"]
