"""Selectors decide WHICH tokens a KV head keeps.

A new selector is one file with one dataclass, and one line in `SELECTORS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evolkv.errors import UsageError
from evolkv.registry import Registry, with_parameters
from evolkv.selectors.base import Passage, Selector, Words
from evolkv.selectors.chunkkv import ChunkKV
from evolkv.selectors.expected_attention import ExpectedAttention
from evolkv.selectors.h2o import H2O
from evolkv.selectors.keydiff import KeyDiff
from evolkv.selectors.knorm import KNorm
from evolkv.selectors.kvzip import KVzip
from evolkv.selectors.prompt import LayerContext, PromptAttention
from evolkv.selectors.pyramidinfer import PyramidInfer
from evolkv.selectors.rocketkv import RocketKV, RocketKVMultiTurn
from evolkv.selectors.smallkv import SmallKV
from evolkv.selectors.snapkv import SnapKV
from evolkv.selectors.streaming_llm import StreamingLLM
from evolkv.selectors.tova import TOVA
from evolkv.specs import parse_named

#: The selectors by name.
SELECTORS: Registry[type[Selector]] = Registry(
    "selector",
    {
        cls.name: cls
        for cls in (
            SnapKV,
            H2O,
            TOVA,
            StreamingLLM,
            KNorm,
            KeyDiff,
            ChunkKV,
            ExpectedAttention,
            RocketKV,
            RocketKVMultiTurn,
            KVzip,
            PyramidInfer,
            SmallKV,
        )
    },
    "evolkv.selectors",
    Selector,
)


#: One selector, as `get_selector` takes it.
SelectorSpec = str | Mapping[str, Any] | Selector


#: Allocators, which are often taken for selectors. A search may start from the first ones; see `evolkv.allocators`.
_STARTS, _OTHERS = ("uniform", "pyramid", "cosine", "lukv"), ("adakv", "cake", "dynamickv")
#: Methods that have a name of their own; see `evolkv.methods`.
METHOD_ALIASES = {"pyramidkv": "pyramid+snapkv"}


def spec_names() -> list[str]:
    """Return the names that begin a spec of a selector, or of a method."""
    return [*SELECTORS, *_STARTS, *_OTHERS, *METHOD_ALIASES, "full"]


def _method_instead(text: str) -> str | None:
    """Return what to say of a method, or an allocator, that stands where a selector is wanted; None for others."""
    head = text.partition(":")[0]
    *allocators, selector = METHOD_ALIASES.get(text, text).split("+")
    if not allocators and head in (*_STARTS, *_OTHERS):
        allocators, selector = [text], "pyramidinfer" if head == "cosine" else "snapkv"
    if head in SELECTORS or not allocators or selector.partition(":")[0] not in SELECTORS:
        return None
    what, method = "a method (an allocator and a selector)", text
    if allocators == [text]:
        what, method = "an allocator, not a selector", f"{text}+{selector}"
    start = f"--start {allocators[0]} " if allocators[0] in _STARTS else ""
    # LU-KV is calibrated on examples, and an evaluation has none for that.
    others = "" if "lukv" in allocators else f", and eval --method {method}"
    return f"{text!r} is {what}; give a search {start}--selector {selector}{others}"


def get_selector(spec: SelectorSpec) -> Selector:
    """Return the selector that `spec` describes.

    Args:
        spec: a name ("snapkv"), which parameters may follow ("snapkv:window=16,pooling=mean"); a mapping with the name
            and parameters (``{"name": "snapkv", "window": 16}``); or a selector, which is returned as it is.

    Raises:
        UsageError: a malformed spec, an unknown name or parameter (the nearest known one is suggested), or a value that
            is out of range.
    """
    if isinstance(spec, Selector):
        return spec
    if isinstance(spec, str):
        if (instead := _method_instead(spec)) is not None:
            raise UsageError(instead)
        spec = parse_named(spec, "selector", SELECTORS, spec_names())
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise UsageError(f"a selector is a name or a mapping with a 'name', not {spec!r}")
    return with_parameters(SELECTORS[spec["name"]], {key: value for key, value in spec.items() if key != "name"})


__all__ = [
    "H2O",
    "SELECTORS",
    "TOVA",
    "ChunkKV",
    "ExpectedAttention",
    "KNorm",
    "KVzip",
    "KeyDiff",
    "LayerContext",
    "Passage",
    "PromptAttention",
    "PyramidInfer",
    "RocketKV",
    "RocketKVMultiTurn",
    "Selector",
    "SelectorSpec",
    "SmallKV",
    "SnapKV",
    "StreamingLLM",
    "Words",
    "get_selector",
]
