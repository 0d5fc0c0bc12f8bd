"""The task `general`: a mixture of workloads that needs no file."""

from __future__ import annotations

from evolkv.tasks.general.task import KINDS, General

__all__ = ["KINDS", "General"]
