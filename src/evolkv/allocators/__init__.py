"""Allocators: rules that decide how many entries each layer (and KV head) keeps, without a search.

`ALLOCATORS` maps a name to the function that lays out budgets under a mean budget, the same for every prompt. `layout`
runs one within what a model's layers can hold; `expand`, `fit` and `complete` bring budgets that are already there, or
weights, to an exact mean or total, and `in_classes` to a few classes of layers or heads. `lukv` lays out what a
calibration on examples has found. Allocators that decide for each prompt anew are in `evolkv.allocators.adaptive`.
"""

from __future__ import annotations

from evolkv.allocators.classes import in_classes
from evolkv.allocators.complete import complete
from evolkv.allocators.cosine import cosine
from evolkv.allocators.isotonic import non_increasing
from evolkv.allocators.layout import ALLOCATORS, expand, fit, layout
from evolkv.allocators.lukv import lukv
from evolkv.allocators.pyramid import pyramid
from evolkv.allocators.uniform import uniform

__all__ = [
    "ALLOCATORS",
    "complete",
    "cosine",
    "expand",
    "fit",
    "in_classes",
    "layout",
    "lukv",
    "non_increasing",
    "pyramid",
    "uniform",
]
