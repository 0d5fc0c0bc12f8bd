"""The compressed cache and its hook into attention."""

from __future__ import annotations

from evolkv.cache.block import compress
from evolkv.cache.compressed import CompressedCache
from evolkv.cache.reeviction import Reeviction

__all__ = ["CompressedCache", "Reeviction", "compress"]
