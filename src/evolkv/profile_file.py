"""The file of a profile: its schema, and how it is written. It needs neither torch nor the model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError, field_validator, model_validator

from evolkv.budgets import MAX_BUDGET, Budget, Share
from evolkv.errors import ProfileError, RunError
from evolkv.json_files import check_characters
from evolkv.numbers import is_several, is_whole
from evolkv.schemas import Count, RecordedBudget, Schema, first_error
from evolkv.whole_files import write_with

FORMAT = "evolkv.profile/1"
#: A profile of a thousand layers with a thousand heads stays below it: a larger file is something else.
MAX_FILE_BYTES = 64 * 2**20

Granularity = Literal["layer", "head"]


class ProfileModel(Schema):
    """The model that the budgets belong to.

    `sliding_windows`, in tokens by layer, is there only if a layer has one.
    """

    name: str
    num_layers: Annotated[int, Field(ge=1)]
    num_kv_heads: Annotated[int, Field(ge=1)]
    fingerprint: str
    sliding_windows: list[Annotated[int, Field(ge=1)] | None] = Field([])


class _Search(Schema):
    """The part of `search` that other programs read; there may be more."""

    task: str | None = None
    haystack: str | None = None
    strategy: str | None = None
    metric: str | None = None
    chosen: str | None = None
    seed: int | None = None
    evaluations: Count | None = None
    expanded_from: RecordedBudget | None = None
    interrupted: bool | None = None
    versions: dict[str, str] | None = None
    seen: list[str] | None = None


class _Scores(Schema):
    """The part of `scores` that other programs read; there may be more."""

    train: dict[str, Any] = Field({})
    validation: Any = None

    @field_validator("validation")
    @classmethod
    def _shares(cls, validation: Any) -> Any:
        scores = list(validation.values()) if isinstance(validation, dict) else [validation]
        if not all(score is None or (isinstance(score, (int, float)) and 0 <= score <= 1) for score in scores):
            raise ValueError("scores from 0 to 1")
        return validation


class ProfileFile(Schema):
    """The content of a profile's file, checked as far as that needs no selector."""

    format: str
    model: ProfileModel
    budget: int
    #: Where the budgets are in proportion to the prompt: the part of it that is kept on average.
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    granularity: Granularity
    budgets: list[list[int]]
    selector: dict[str, Any]
    search: dict[str, Any] = Field({})
    scores: dict[str, Any] = Field({})

    @model_validator(mode="before")
    @classmethod
    def _is_profile(cls, data: Any) -> Any:
        _check_format(data)
        return data

    @field_validator("share")
    @classmethod
    def _is_share(cls, share: float | None) -> float | None:
        return None if share is None else Share.of_fraction(share).fraction

    @model_validator(mode="after")
    def _fits_together(self) -> ProfileFile:
        layers, windows = self.model.num_layers, self.model.sliding_windows
        if windows and len(windows) != layers:
            raise ProfileError(f"model.sliding_windows has {len(windows)} entries, expected {layers}, one per layer")
        budgets = as_matrix(self.budgets, layers, self.model.num_kv_heads)
        check_budgets(self.budget, budgets, self.granularity, 1, [1] * layers)
        for name, section, kind in (("search", self.search, _Search), ("scores", self.scores, _Scores)):
            try:
                kind.model_validate(section)
            except ValidationError as error:
                raise ProfileError(f"{name}.{first_error(error)}") from None
        return self

    @property
    def target(self) -> Budget:
        """The mean budget that was aimed at, as `BudgetProfile.target`."""
        return self.budget if self.share is None else Share.of_fraction(self.share)

    @classmethod
    def parse(cls, data: Any) -> ProfileFile:
        """Return the content of a file, checked.

        Raises:
            ProfileError: not a profile, a newer format, or a field that is wrong, named by its JSON path.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ProfileError(first_error(error)) from None


def unit_of(selector: Mapping[str, Any]) -> str:
    """Return what budgets under one of EvolKV's own selectors count, as `Selector.unit` says it.

    Args:
        selector: its settings; to ask the selector itself takes PyTorch.
    """
    reads = selector.get("name") in ("rocketkv_mt", "smallkv") or bool(selector.get("held"))
    return "entries read by a token" if reads else "cache entries"


def as_matrix(budgets: ArrayLike, num_layers: int, num_kv_heads: int) -> NDArray[np.int64]:
    """Return a copy of L or (L, H) whole numbers as an int64 (L, H) matrix."""
    if not is_several(budgets):
        raise ProfileError(f"budgets is {budgets!r}, expected one row per layer")
    rows: list[Any] = list(budgets)
    if len(rows) != num_layers:
        raise ProfileError(f"budgets has {len(rows)} rows, expected one for each of the model's {num_layers} layers")
    if any(np.ndim(row) for row in rows):
        for layer, row in enumerate(rows):
            if np.ndim(row) != 1 or len(row) != num_kv_heads:
                raise ProfileError(
                    f"budgets[{layer}] has {np.size(row)} entries, expected one for each of the {num_kv_heads} KV heads"
                )
    array = np.asarray(rows)
    if array.dtype.kind not in "iu":
        raise ProfileError("budgets must be whole numbers of cache entries that fit 64 bits")
    matrix = array.astype(np.int64)
    return np.repeat(matrix[:, None], num_kv_heads, axis=1) if matrix.ndim == 1 else matrix


def check_budgets(
    mean: int, matrix: NDArray[np.int64], granularity: str, least: int, floors: Sequence[int], because: str = ""
) -> None:
    """Raise `ProfileError` for budgets out of their range, above their mean, or uneven in a layer where all are alike.

    Args:
        mean: the mean budget that was aimed at.
        matrix: the budgets, (L, H).
        granularity: "layer" or "head".
        least: the least mean.
        floors: the least that a head of each layer may get, L ints.
        because: ends the message about a smaller one.
    """
    if granularity not in ("layer", "head"):
        raise ProfileError(f'granularity is {granularity!r}, expected "layer" or "head"')
    _check_budget("budget", mean, least, because)
    for layer, head in np.argwhere((matrix < np.array(floors)[:, None]) | (matrix > MAX_BUDGET))[:1]:
        _check_budget(f"budgets[{layer}][{head}]", int(matrix[layer, head]), floors[layer], because)
    if (found := float(matrix.mean())) > mean + 0.5:
        # Nothing would show it: files and tables name the profile by what it aimed at.
        raise ProfileError(f"the mean of budgets is {found:,.6g}, expected no more than budget, which is {mean:,}")
    uneven = np.flatnonzero((matrix != matrix[:, :1]).any(axis=1))
    if granularity == "layer" and uneven.size:
        raise ProfileError(
            f'budgets[{uneven[0]}] differ among heads, but granularity is "layer"; '
            'make the row constant or the granularity "head"'
        )


def _check_budget(name: str, budget: int, least: int, because: str) -> None:
    if not is_whole(budget):
        raise ProfileError(f"{name} is {budget!r}, expected a whole number of cache entries")
    if budget < least:
        raise ProfileError(f"{name} is {budget}, expected at least {least}{because}")
    if budget > MAX_BUDGET:
        raise ProfileError(f"{name} is {budget}, expected at most {MAX_BUDGET}")


def _check_format(data: Any) -> None:
    name = data.get("format") if isinstance(data, Mapping) else None
    if name == FORMAT:
        return
    if not isinstance(name, str):
        raise ProfileError(f'not a profile: expected a JSON object with "format": "{FORMAT}"')
    if (newer := re.fullmatch(r"evolkv\.profile/([1-9][0-9]{0,8})", name)) and int(newer[1]) > 1:
        raise ProfileError(f"the format is {name!r}, this version reads {FORMAT!r}; upgrade evolkv to read it")
    raise ProfileError(f"not a profile: the format is {name[:80]!r}, expected {FORMAT!r}")


def profile_text(data: Mapping[str, Any]) -> str:
    """Return the text of a profile's file, with one layer per line, which is how people compare budgets.

    Raises:
        ProfileError: content that JSON cannot hold, or that could not be read again.
    """
    parts = []
    try:
        for key, value in data.items():
            if key == "budgets":
                shown = "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
            else:
                dumped = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
                shown = dumped.replace("\n", "\n  ")
            parts.append(f"  {json.dumps(key)}: {shown}")
    except (TypeError, ValueError) as error:
        raise ProfileError(f"search and scores must hold finite JSON values: {error}") from None
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    try:
        check_characters(text)
    except ValueError as error:
        raise ProfileError(str(error)) from None
    ProfileFile.parse(json.loads(text))
    return text


def write_profile(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write a profile's file, whole or not at all; missing folders are made.

    Raises:
        ProfileError: as for `profile_text`, or for what is no name of a file.
        RunError: the file cannot be written.
    """
    text, target = profile_text(data), Path(os.path.expanduser(path))
    if target.is_dir():
        raise ProfileError(f"{target} is a folder; expected a file name such as {target / 'profile.json'}")
    if target.exists() and not target.is_file():
        raise ProfileError(f"{target} is not a regular file; expected a file name such as profile.json")
    try:
        write_with(target, lambda partial: partial.write_bytes(text.encode()))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} of type {type(value).__name__}")
