"""Selectors decide WHICH tokens a KV head keeps.

A new selector is one file with one dataclass, and one line in `SELECTORS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evolkv.errors import UsageError
from evolkv.registry import Registry, unknown_name
from evolkv.selectors.base import LayerContext, PromptAttention, Selector
from evolkv.selectors.chunkkv import ChunkKV
from evolkv.selectors.expected_attention import ExpectedAttention
from evolkv.selectors.h2o import H2O
from evolkv.selectors.keydiff import KeyDiff
from evolkv.selectors.knorm import KNorm
from evolkv.selectors.snapkv import SnapKV
from evolkv.selectors.streaming_llm import StreamingLLM
from evolkv.selectors.tova import TOVA

SELECTORS: Registry[type[Selector]] = Registry(
    "selector",
    {cls.name: cls for cls in (SnapKV, H2O, TOVA, StreamingLLM, KNorm, KeyDiff, ChunkKV, ExpectedAttention)},
)


def get_selector(spec: str | Mapping[str, Any] | Selector) -> Selector:
    """The selector that `spec` describes.

    Args:
        spec: a name ("snapkv"), a mapping with the name and parameters
            (``{"name": "snapkv", "window": 16}``), or a selector, which is returned as it is.

    Raises:
        UsageError: for an unknown name or parameter (the nearest known one is suggested), or a value that is
            out of range.
    """
    if isinstance(spec, Selector):
        return spec
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or "name" not in spec:
        raise UsageError(f"a selector is a name or a mapping with a 'name', not {spec!r}")
    cls = SELECTORS[spec["name"]]
    known = cls.parameters()
    values = {key: value for key, value in spec.items() if key != "name"}
    for key, value in values.items():
        if key not in known:
            raise unknown_name(f"parameter of {cls.name}", key, known)
        # bool is an int in Python, but `"window": true` in a file is a mistake.
        if type(value) is not type(known[key]):
            raise UsageError(
                f"{cls.name}: {key} is {value!r}; expected {type(known[key]).__name__} like {known[key]!r}"
            )
    return cls(**values)


_TRUTH = {"true": True, "false": False}


def parse_selector(text: str) -> dict[str, Any]:
    """A selector as a mapping, from ``name`` or ``name:parameter=value,parameter=value``.

    Raises:
        UsageError: a part that is not parameter=value, or a parameter given twice.
    """
    name, _, rest = text.partition(":")
    spec: dict[str, Any] = {"name": name.strip()}
    for part in filter(str.strip, rest.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key:
            raise UsageError(f"selector {text!r}: {part!r} is not parameter=value; write for example snapkv:window=16")
        if key in spec:
            raise UsageError(f"selector {text!r}: {key} is given twice; give it once")
        spec[key] = _TRUTH.get(value.lower(), int(value) if value.lstrip("-").isdecimal() else value)
    return spec


__all__ = [
    "H2O",
    "SELECTORS",
    "TOVA",
    "ChunkKV",
    "ExpectedAttention",
    "KNorm",
    "KeyDiff",
    "LayerContext",
    "PromptAttention",
    "Selector",
    "SnapKV",
    "StreamingLLM",
    "get_selector",
    "parse_selector",
]
