"""The version of EvolKV: what every floor may know without importing the package."""

from __future__ import annotations

__version__ = "0.1.0"
