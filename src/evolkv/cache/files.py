"""Compressed caches as files: a prompt is read once and asked later.

A file is in the safetensors format: tensors, and a description in JSON. Both are parsed, nothing in them is run. For
layer ``i`` and group ``j`` of its rows it has the tensors ``i.j.rows``, ``i.j.positions``, ``i.j.keys`` and
``i.j.values`` (see `RowGroup`), ``input_ids`` where the text is known, and `CompressedCache.image_offsets` where there
are some. Layer ``i`` of a hybrid model's layers with states has ``states.i.0.conv`` and the like (see
`StateLayer.parts`). For the next cut of a cache that evicts again (see `ReevictingLayer`) there are ``i.queries.s`` of
sequence ``s`` and ``i.j.received`` of a group's rows. Where there is padding among the tokens after the prompt,
``real`` marks the real ones. The description has a CRC-32 of each tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from evolkv.cache.layer import CompressedLayer
from evolkv.cache.reeviction import ReevictingLayer, Reeviction
from evolkv.cache.resolve import make_layers
from evolkv.cache.rows import RowGroup
from evolkv.cache.state import StateLayer, empty_states
from evolkv.errors import CacheFileError, RunError, UsageError
from evolkv.models import ModelInfo, describe_model, model_facts
from evolkv.models.forward import input_device
from evolkv.schemas import Schema, first_error
from evolkv.selectors import Selector, get_selector
from evolkv.whole_files import write_with

FORMAT = "evolkv.cache/1"
#: No text is longer; what says so is damaged.
_MOST = 2**31
_PARTS = ("rows", "positions", "keys", "values")


_Count = Annotated[int, Field(ge=0, le=_MOST)]


class _Model(Schema):
    name: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    dtype: str
    sliding_windows: list[int | None]
    #: What the phase of each key depends on.
    rotary: Any = None


class _Layer(Schema):
    budgets: list[_Count] | list[list[_Count]]
    #: How many groups of rows there are.
    groups: int = Field(ge=1)


class _States(Schema):
    #: The names of `StateLayer.parts`.
    parts: list[str]
    #: Which of the layer's states have seen tokens.
    updated: list[bool]


class _Reeviction(Schema):
    prefill_chunk: int | None
    evict: Literal["once", "again"]
    evict_every: int | None
    #: Whether the prompt may go on.
    open: bool


class _Description(Schema):
    """The description of a file's tensors."""

    model: _Model
    selector: dict[str, Any]
    prompt_lengths: list[int] = Field(min_length=1)
    prompt_width: int = Field(ge=1, le=_MOST)
    appended: _Count
    layers: list[_Layer]
    states: list[_States]
    reeviction: _Reeviction | None
    #: See `CompressedCache.prefill_factor`.
    prefill_factor: float = Field(ge=1, default=1.0)
    #: A checksum of each tensor, by name.
    crc32: dict[str, int]


def write_cache(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    layers: Sequence[CompressedLayer],
    states: Sequence[StateLayer],
    text: Mapping[str, Tensor | None],
    prefill_factor: float,
) -> None:
    """Writes what layers hold, and what is known of their text, to a file, whole or not at all, and makes its folders.

    Raises:
        UsageError: if there is nothing to write yet, or no file can be at `path`.
        RunError: if the file cannot be written.
    """
    first = layers[0]
    if not all(layer.is_initialized for layer in layers):
        raise UsageError("the cache holds nothing yet; have the model read a prompt with it before it is saved")
    if any(group.keys.dtype != model.dtype for layer in layers for group in layer.groups):
        raise UsageError(f"the cache does not hold {model.dtype}, as the model does; read the prompt without autocast")
    if first.by_length is not None and isinstance(first, ReevictingLayer) and first.evicts_later:
        raise UsageError(
            "a share, or an allocator's budgets, are laid out anew for all that was read when the cache cuts again, "
            "which a file cannot say; give a budget in entries and no allocator, or leave out evict and evict_every"
        )
    if first.unsaved is not None:
        raise UsageError(first.unsaved)
    if Path(path).is_dir():
        raise UsageError(f"{path} is a folder; expected a file name such as {Path(path) / 'document.cache'}")
    check_replaced(path)
    tensors = {
        f"{i}.{j}.{part}": getattr(group, part)
        for i, layer in enumerate(layers)
        for j, group in enumerate(layer.groups)
        for part in _PARTS
    }
    tensors |= {f"states.{i}.{name}": part for i, held in enumerate(states) for name, part in held.parts().items()}
    for i, layer in enumerate(layers):
        if isinstance(layer, ReevictingLayer):
            tensors |= _for_the_next_cut(i, layer)
    # The same for all layers.
    if first.real is not None:
        tensors["real"] = first.real
    tensors |= {name: each.long() for name, each in text.items() if each is not None}
    again = None
    if isinstance(first, ReevictingLayer):
        again = _Reeviction(**asdict(first.reeviction), open=first.open)
    # Rows that have room for more must not be stored with it.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = _Description(
        model=_model(model, describe_model(model)),
        selector=first.selector.to_dict(),
        prompt_lengths=first.prompt_lengths,
        prompt_width=first.prompt_width,
        appended=first.appended,
        layers=[_Layer(budgets=layer.budgets.tolist(), groups=len(layer.groups)) for layer in layers],
        states=[_States(parts=list(held.parts()), updated=list(held.has_previous_state.values())) for held in states],
        reeviction=again,
        prefill_factor=prefill_factor,
        crc32={name: _crc32(tensor) for name, tensor in tensors.items()},
    )
    metadata = {"format": FORMAT, "cache": description.model_dump_json()}
    try:
        write_with(path, lambda partial: save_file(tensors, partial, metadata))
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def check_replaced(path: str | os.PathLike[str]) -> None:
    """Check that a cache would be written over nothing, an empty file or an older cache.

    Raises:
        UsageError: there is another file, such as a profile or a model's weights.
    """
    place = Path(path)
    if not place.is_file() or not place.stat().st_size:
        return
    with contextlib.suppress(SafetensorError, OSError), safe_open(place, framework="pt") as file:
        if (file.metadata() or {}).get("format", "").startswith("evolkv.cache/"):
            return
    raise UsageError(f"{path} is there and is not a cache; give another path, or remove it")


def _for_the_next_cut(number: int, layer: ReevictingLayer) -> dict[str, Tensor]:
    tensors = {f"{number}.queries.{i}": queries for i, queries in enumerate(layer.queries)}
    if layer.received:
        # Rows were put in groups by the entries they kept at the last cut, so those of a group have as many numbers.
        for j, group in enumerate(layer.groups):
            tensors[f"{number}.{j}.received"] = torch.stack([layer.received[row] for row in group.rows.tolist()])
    return tensors


class StoredCache(NamedTuple):
    """A file's content: layers with keys and values, those with states, ids, `CompressedCache.image_offsets`, costs."""

    layers: list[CompressedLayer]
    states: list[StateLayer]
    input_ids: Tensor | None
    offsets: Tensor | None
    prefill_factor: float


def read_cache(path: str | os.PathLike[str], model: PreTrainedModel) -> StoredCache:
    """Read a file, tensor by tensor, onto the device that the model's ids go to, and check it.

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
        sliding_windows=model_facts(model).sliding_windows,
        rotary=None if rotary is None else json.loads(json.dumps(dict(rotary), default=str)),
    )


def _read(path: Path, model: PreTrainedModel) -> StoredCache:
    if not path.is_file():
        raise CacheFileError("no such file; expected a cache written by CompressedCache.save")
    try:
        with safe_open(path, framework="pt") as file:
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
        raise CacheFileError(f"damaged: {first_error(error)}; write it again") from None


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
        self.file, self.said, self.model = file, description, model
        self.heads, self.head_dim, self.dtype = description.model.num_kv_heads, info.head_dim, model.dtype
        self.value_dim = getattr(model.config.get_text_config(decoder=True), "v_head_dim", None) or info.head_dim
        self.query_heads, self.device = info.num_heads, input_device(model)
        self.batch = len(description.prompt_lengths)

    def read(self) -> StoredCache:
        """Return all that the file holds."""
        said, again = self.said, self.said.reeviction
        try:
            selector = get_selector(said.selector)
            reeviction = Reeviction()
            if again is not None:
                reeviction = Reeviction(again.prefill_chunk, again.evict, again.evict_every)
                reeviction.check_selector(selector)
        except UsageError as error:
            raise CacheFileError(f"damaged: {error}") from None
        large = [name for name, value in said.selector.items() if isinstance(value, int) and value >= _MOST]
        _check(not large, f"selector: {large} is out of range")
        _check(reeviction.wanted == (again is not None), "its settings for evicting again say never")
        _check(len(said.layers) == said.model.num_layers, "it has another number of layers than its model")
        _check(
            all(0 <= length <= said.prompt_width for length in said.prompt_lengths), "prompt_lengths are out of range"
        )
        try:
            budgets = [np.array(layer.budgets, dtype=np.int64) for layer in said.layers]
        except ValueError:
            raise CacheFileError("damaged: budgets have rows of different lengths; write it again") from None
        shapes = ((self.heads,), (self.batch, self.heads))
        _check(all(each.shape in shapes for each in budgets), "budgets do not fit its sequences and heads")
        padded = "real" in said.crc32
        real = self._tensor("real", torch.bool) if padded else None
        if real is not None:
            _check(real.shape == (self.batch, said.appended), "real does not fit its sequences and tokens")
        groups = [
            [self._group(f"{i}.{j}", said.model.sliding_windows[i], padded) for j in range(layer.groups)]
            for i, layer in enumerate(said.layers)
        ]
        for i, layer in enumerate(groups):
            rows = torch.cat([group.rows for group in layer]).sort().values
            every = torch.arange(self.batch * self.heads, device=rows.device)
            _check(torch.equal(rows, every), f"layer {i} does not have each row once")
        queries: list[list[Tensor]] = [[] for _ in groups]
        received: list[list[Tensor]] = [[] for _ in groups]
        if "0.queries.0" in said.crc32:
            queries = [self._queries(i, selector) for i in range(len(groups))]
        if "0.0.received" in said.crc32:
            received = [self._received(i, layer) for i, layer in enumerate(groups)]
        states = empty_states(self.model)
        self._fill_states(states)
        ids, offsets = (
            self._tensor(name, torch.int64) if name in said.crc32 else None for name in ("input_ids", "image_offsets")
        )
        if ids is not None:
            _check(ids.ndim == 2 and ids.shape[0] == self.batch, "input_ids do not fit its sequences")
        if offsets is not None:
            _check(offsets.shape == (self.batch, 1), "image_offsets do not fit its sequences")
        layers = make_layers(self.model, budgets, selector, reeviction)
        for i, layer in enumerate(layers):
            layer.lazy_initialization(groups[i][0].keys, groups[i][0].values)
            layer.groups, layer.prompt_lengths = groups[i], list(said.prompt_lengths)
            layer.prompt_width, layer.appended = said.prompt_width, said.appended
            layer.is_initialized, layer.real = True, real
            if isinstance(layer, ReevictingLayer) and again is not None:
                layer.open, layer.queries, layer.received = again.open, queries[i], received[i]
        return StoredCache(layers, states, ids, offsets, said.prefill_factor)

    def _group(self, name: str, window: int | None, padded: bool) -> RowGroup:
        rows, positions = self._tensor(f"{name}.rows", torch.int64), self._tensor(f"{name}.positions", torch.int32)
        keys, values = (self._tensor(f"{name}.{part}", self.dtype) for part in ("keys", "values"))
        fits = rows.ndim == 1 and len(rows) > 0 and 0 <= int(rows.min()) <= int(rows.max()) < self.batch * self.heads
        fits = fits and bool((rows.diff() > 0).all())
        _check(fits, f"{name}.rows are not rows of its sequences and heads")
        shape = keys.shape[:2]
        _check(
            keys.ndim == values.ndim == 3 and len(rows) == shape[0] and values.shape[:2] == shape,
            f"{name}.keys or values have the wrong shape",
        )
        _check(keys.shape[2] == self.head_dim, f"{name}.keys do not have the model's {self.head_dim} channels")
        _check(values.shape[2] == self.value_dim, f"{name}.values do not have the model's {self.value_dim} channels")
        # In a sliding-window layer later tokens have positions too.
        later = self.said.appended if window is None else 0
        _check(positions.shape == (shape[0], shape[1] - later), f"{name}.positions has the wrong shape")
        ends = torch.tensor(self.said.prompt_lengths, device=rows.device)[rows // self.heads, None]
        ends = ends if window is None else ends + self.said.appended
        # Padding that has not been dropped yet has the position -1 there.
        first = -1 if window is not None and padded else 0
        _check(bool(((positions >= first) & (positions < ends)).all()), f"{name}.positions are out of range")
        return RowGroup(rows, keys, values, positions)

    def _queries(self, layer: int, selector: Selector) -> list[Tensor]:
        wanted, found = selector.observed_queries, []
        for i, length in enumerate(self.said.prompt_lengths):
            name, most = f"{layer}.queries.{i}", length + self.said.appended
            most, queries = most if wanted is None else min(most, wanted), self._tensor(name, self.dtype)
            _check(
                queries.ndim == 3 and queries.shape[::2] == (self.query_heads, self.head_dim),
                f"{name} do not have the model's {self.query_heads} heads of {self.head_dim} channels",
            )
            _check(queries.shape[1] <= most, f"{name} are more than there can be")
            found.append(queries)
        return found

    def _received(self, layer: int, groups: list[RowGroup]) -> list[Tensor]:
        window = self.said.model.sliding_windows[layer]
        found: dict[int, Tensor] = {}
        for j, group in enumerate(groups):
            name = f"{layer}.{j}.received"
            received, rows = self._tensor(name, torch.float32), group.rows.tolist()
            ends = torch.tensor(self.said.prompt_lengths, device=group.rows.device)[group.rows // self.heads, None]
            left = int(((group.positions >= 0) & (group.positions < ends)).sum(dim=1).max())
            fits = received.ndim == 2 and len(received) == len(rows)
            # Since the last cut entries may have left a sliding window.
            fits = fits and (received.shape[1] == left or (window is not None and received.shape[1] > left))
            _check(fits, f"{name} has the wrong shape")
            found |= dict(zip(rows, received, strict=True))
        return [found[row] for row in range(self.batch * self.heads)]

    def _fill_states(self, states: list[StateLayer]) -> None:
        said = self.said.states
        _check(len(said) == len(states), f"it has states of {len(said)} layers, but the model keeps {len(states)}")
        for i, (layer, held) in enumerate(zip(states, said, strict=True)):
            parts = {name: self._tensor(f"states.{i}.{name}") for name in held.parts}
            for name, part in parts.items():
                _check(
                    part.is_floating_point() and part.ndim > 1 and len(part) == self.batch,
                    f"states.{i}.{name} does not fit its sequences",
                )
            try:
                layer.restore(parts, held.updated)
            except ValueError:
                raise CacheFileError(
                    f"damaged: layer {i} has other states than the model's; write it again with CompressedCache.save"
                ) from None

    def _tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)
        _check(dtype in (None, tensor.dtype), f"{name} is {tensor.dtype}, expected {dtype}")
        # A tensor is a window into the file, which somebody may change or cut under a running model.
        tensor = tensor.clone()
        _check(self.said.crc32.get(name) == _crc32(tensor), f"{name} does not hold what was written")
        return tensor.to(self.device)


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _check(holds: bool, complaint: str) -> None:
    if not holds:
        raise CacheFileError(f"damaged: {complaint}; write it again with CompressedCache.save")
