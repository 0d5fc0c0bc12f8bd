"""Compressed caches as files: a prompt is read once and asked later.

A file is in the safetensors format: tensors, and a description in JSON. Both are parsed, nothing in them is run. For
layer ``i`` and group ``j`` of its rows it has the tensors ``i.j.rows``, ``i.j.positions``, ``i.j.keys`` and
``i.j.values`` (see `RowGroup`), and ``input_ids`` where the text is known.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.cache.layer import CompressedLayer, RowGroup
from evolkv.errors import CacheFileError, RunError, UsageError
from evolkv.models import ModelInfo, describe_model, sliding_windows
from evolkv.selectors import Selector, get_selector
from evolkv.whole_files import write_with

FORMAT = "evolkv.cache/1"
_PARTS = ("rows", "positions", "keys", "values")


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    dtype: str
    sliding_windows: list[int | None]
    #: What the phase of each key depends on.
    rotary: Any = None


class _Layer(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    budgets: list[int] | list[list[int]]
    #: How many groups of rows there are.
    groups: int = Field(ge=1)


class _Description(BaseModel):
    """What a file says about its tensors."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: _Model
    selector: dict[str, Any]
    prompt_lengths: list[int] = Field(min_length=1)
    prompt_width: int = Field(ge=1)
    appended: int = Field(ge=0)
    layers: list[_Layer]


@dataclass(frozen=True)
class StoredCache:
    """What a file holds.

    Args:
        budgets: of each layer, ``[kv_heads]`` or ``[batch, kv_heads]``.
        selector: decided what was kept.
        groups: the rows of each layer.
        prompt_lengths: real tokens of each sequence's prompt.
        prompt_width: tokens of the prompts, padding included.
        appended: tokens seen after the prompt.
        input_ids: the text, ``[batch, tokens]``, or None.
    """

    budgets: list[np.ndarray]
    selector: Selector
    groups: list[list[RowGroup]]
    prompt_lengths: list[int]
    prompt_width: int
    appended: int
    input_ids: Tensor | None

    def fill(self, layers: Sequence[CompressedLayer]) -> None:
        """Gives empty layers what is held."""
        for layer, groups in zip(layers, self.groups, strict=True):
            layer.lazy_initialization(groups[0].keys, groups[0].values)
            layer.groups, layer.prompt_lengths = groups, list(self.prompt_lengths)
            layer.prompt_width, layer.appended = self.prompt_width, self.appended
            layer.is_initialized = True


def write_cache(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    layers: Sequence[CompressedLayer],
    input_ids: Tensor | None,
) -> None:
    """Writes what layers hold to a file, whole or not at all; missing folders are made.

    Raises:
        UsageError: if there is nothing to write yet, or no file can be at `path`.
        RunError: if the file cannot be written.
    """
    first = layers[0]
    if not all(layer.is_initialized for layer in layers):
        raise UsageError("the cache holds nothing yet; have the model read a prompt with it before it is saved")
    if Path(path).is_dir():
        raise UsageError(f"{path} is a folder; expected a file name such as {Path(path) / 'document.cache'}")
    description = _Description(
        model=_model(model, describe_model(model)),
        selector=first.selector.to_dict(),
        prompt_lengths=first.prompt_lengths,
        prompt_width=first.prompt_width,
        appended=first.appended,
        layers=[_Layer(budgets=layer.budgets.tolist(), groups=len(layer.groups)) for layer in layers],
    )
    tensors = {
        # Rows that have room for more must not be stored with it.
        f"{i}.{j}.{part}": getattr(group, part).contiguous()
        for i, layer in enumerate(layers)
        for j, group in enumerate(layer.groups)
        for part in _PARTS
    }
    if input_ids is not None:
        tensors["input_ids"] = input_ids.contiguous()
    metadata = {"format": FORMAT, "cache": description.model_dump_json()}
    try:
        write_with(path, lambda partial: save_file(tensors, partial, metadata))
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def read_cache(path: str | os.PathLike[str], model: PreTrainedModel) -> StoredCache:
    """Reads a file, tensor by tensor, onto the model's device, and checks it.

    Raises:
        CacheFileError: if it is missing, no such file, damaged, of another version, or made with another model.
    """
    try:
        return _read(Path(path), model)
    except CacheFileError as error:
        raise CacheFileError(f"{path}: {error}") from None


def _model(model: PreTrainedModel, info: ModelInfo) -> _Model:
    rotary = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None)
    return _Model(
        name=info.name,
        fingerprint=info.fingerprint,
        num_layers=info.num_layers,
        num_kv_heads=info.num_kv_heads,
        dtype=str(model.dtype).removeprefix("torch."),
        sliding_windows=sliding_windows(model),
        rotary=None if rotary is None else json.loads(json.dumps(dict(rotary), default=str)),
    )


def _read(path: Path, model: PreTrainedModel) -> StoredCache:
    if not path.is_file():
        raise CacheFileError("no such file; expected a cache written by CompressedCache.save")
    try:
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            description = _description(file.metadata() or {})
            info = describe_model(model)
            _check_model(description.model, _model(model, info))
            return _Reader(file, description, model, info).read()
    except SafetensorError as error:
        raise CacheFileError(f"no cache, or cut off: {error}; write it again with CompressedCache.save") from None
    except OSError as error:
        raise CacheFileError(f"cannot be read: {error.strerror or error}") from None


def _description(metadata: dict[str, str]) -> _Description:
    found = metadata.get("format", "")
    if found != FORMAT:
        if re.fullmatch(r"evolkv\.cache/[1-9][0-9]{0,8}", found):
            raise CacheFileError(f"the format is {found!r}, this version reads {FORMAT!r}; write it again, or upgrade")
        raise CacheFileError(f"no cache: the format is {found[:80]!r}, expected {FORMAT!r}")
    try:
        return _Description.model_validate_json(metadata.get("cache", ""))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the description"
        raise CacheFileError(f"damaged: {place}: {first['msg']}; write it again") from None


def _check_model(stored: _Model, present: _Model) -> None:
    if stored.fingerprint != present.fingerprint:
        raise CacheFileError(
            f"made with {stored.name} (fingerprint {stored.fingerprint}), but the model is {present.name} "
            f"(fingerprint {present.fingerprint}); load it with the model it was made with"
        )
    if stored.dtype != present.dtype:
        raise CacheFileError(
            f"made in {stored.dtype}, but the model computes in {present.dtype}; load the model with "
            f"dtype={stored.dtype!r}"
        )
    for what in ("sliding_windows", "rotary"):
        if getattr(stored, what) != getattr(present, what):
            raise CacheFileError(
                f"made with {what} {getattr(stored, what)}, but the model has {getattr(present, what)}; load the "
                "model with the settings that the cache was made with"
            )


class _Reader:
    """Takes the tensors of one file, each checked against the description."""

    def __init__(self, file: Any, description: _Description, model: PreTrainedModel, info: ModelInfo):
        self.file, self.said = file, description
        self.heads, self.head_dim, self.dtype = description.model.num_kv_heads, info.head_dim, model.dtype
        self.batch = len(description.prompt_lengths)

    def read(self) -> StoredCache:
        said = self.said
        try:
            selector = get_selector(said.selector)
        except UsageError as error:
            raise CacheFileError(f"damaged: {error}") from None
        _check(len(said.layers) == said.model.num_layers, "it has another number of layers than its model")
        _check(
            all(1 <= length <= said.prompt_width for length in said.prompt_lengths), "prompt_lengths are out of range"
        )
        try:
            budgets = [np.array(layer.budgets, dtype=np.int64) for layer in said.layers]
        except ValueError:
            raise CacheFileError("damaged: budgets have rows of different lengths; write it again") from None
        shapes = ((self.heads,), (self.batch, self.heads))
        _check(all(each.shape in shapes for each in budgets), "budgets do not fit its sequences and heads")
        groups = [
            [self._group(f"{i}.{j}", said.model.sliding_windows[i]) for j in range(layer.groups)]
            for i, layer in enumerate(said.layers)
        ]
        for i, layer in enumerate(groups):
            rows = torch.cat([group.rows for group in layer]).sort().values
            every = torch.arange(self.batch * self.heads, device=rows.device)
            _check(torch.equal(rows, every), f"layer {i} does not have each row once")
        ids = self._tensor("input_ids", torch.int64) if "input_ids" in self.file.keys() else None  # noqa: SIM118
        if ids is not None:
            _check(ids.ndim == 2 and ids.shape[0] == self.batch, "input_ids do not fit its sequences")
        return StoredCache(budgets, selector, groups, said.prompt_lengths, said.prompt_width, said.appended, ids)

    def _group(self, name: str, window: int | None) -> RowGroup:
        rows, positions = self._tensor(f"{name}.rows", torch.int64), self._tensor(f"{name}.positions", torch.int32)
        keys, values = (self._tensor(f"{name}.{part}", self.dtype) for part in ("keys", "values"))
        fits = rows.ndim == 1 and len(rows) > 0 and 0 <= int(rows.min()) <= int(rows.max()) < self.batch * self.heads
        _check(fits, f"{name}.rows are not rows of its sequences and heads")
        shape = keys.shape[:2]
        _check(
            keys.ndim == values.ndim == 3 and len(rows) == shape[0] and values.shape[:2] == shape,
            f"{name}.keys or values have the wrong shape",
        )
        _check(keys.shape[2] == self.head_dim, f"{name}.keys do not have the model's {self.head_dim} channels")
        # In a sliding-window layer later tokens have positions too.
        later = self.said.appended if window is None else 0
        _check(positions.shape == (shape[0], shape[1] - later), f"{name}.positions has the wrong shape")
        ends = torch.tensor(self.said.prompt_lengths, device=rows.device)[rows // self.heads, None]
        ends = ends if window is None else ends + self.said.appended
        _check(bool(((positions >= 0) & (positions < ends)).all()), f"{name}.positions are out of range")
        return RowGroup(rows, keys, values, positions)

    def _tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)
        _check(tensor.dtype == dtype, f"{name} is {tensor.dtype}, expected {dtype}")
        # On the CPU a tensor is a window into the file, which somebody may change or cut under a running model.
        return tensor.clone() if tensor.device.type == "cpu" else tensor


def _check(holds: bool, complaint: str) -> None:
    if not holds:
        raise CacheFileError(f"damaged: {complaint}; write it again with CompressedCache.save")
