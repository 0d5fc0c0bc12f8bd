"""The compressed cache and its hook into attention."""

from __future__ import annotations

from evolkv.cache.compressed import CompressedCache, compress

__all__ = ["CompressedCache", "compress"]
