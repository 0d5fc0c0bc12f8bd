"""The profile: the budgets a search found, with the selector and model they belong to, as one file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evolkv import allocators, hub
from evolkv.budgets import MAX_BUDGET, BudgetSpec, read_budget
from evolkv.errors import BudgetError, ProfileError, RunError, UsageError
from evolkv.models import ModelInfo, describe_model, is_quantized, sliding_windows
from evolkv.numbers import is_whole
from evolkv.schemas import first_error
from evolkv.selectors import Selector, SelectorSpec, get_selector
from evolkv.whole_files import write_with

FORMAT = "evolkv.profile/1"
#: A profile of a thousand layers with a thousand heads stays below it: a larger file is something else.
MAX_FILE_BYTES = 64 * 2**20


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    num_layers: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    fingerprint: str
    sliding_windows: list[Annotated[int, Field(ge=1)] | None] = []


class _File(BaseModel):
    """The types of a profile file; what the numbers must satisfy is checked by `BudgetProfile` itself."""

    model_config = ConfigDict(strict=True, extra="ignore")

    format: str
    model: _Model
    budget: int
    granularity: Literal["layer", "head"]
    budgets: list[list[int]]
    selector: dict[str, Any]
    search: dict[str, Any] = {}
    scores: dict[str, Any] = {}


@dataclass(frozen=True, eq=False)
class BudgetProfile:
    """How many cache entries each layer and KV head of one model keeps, and which selector chooses them.

    Make one with `uniform`, `from_budgets` or `load`. Profiles with the same content are equal.

    Args:
        model: `{"name", "num_layers", "num_kv_heads", "fingerprint"}` of the model the budgets belong to; and where a
            layer's sliding window is smaller than what the selector always keeps, the `"sliding_windows"` of all.
        budget: c, the mean budget that was aimed at, in cache entries per KV head.
        granularity: "layer" (all heads of a layer keep the same number) or "head".
        budgets: the whole allocation, (L, H) ints; kept as a read-only int64 array.
        selector: `{"name": ..., **parameters}`; parameters left out get their defaults.
        search: where the budgets come from (task, strategy, seed, evaluations, library versions, …).
        scores: what was measured with them.

    Raises:
        ProfileError: budgets that are not (L, H) whole numbers between what the selector always keeps (or a layer's
            sliding window, if that is smaller) and 2**31, rows that are not constant at granularity "layer", or a
            selector that does not exist.
    """

    model: dict[str, Any]
    budget: int
    granularity: Literal["layer", "head"]
    budgets: NDArray[np.int64]
    selector: dict[str, Any]
    search: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "search", "scores"):
            object.__setattr__(self, name, deepcopy(dict(getattr(self, name))))
        try:
            selector = get_selector(self.selector)
        except UsageError as error:
            raise ProfileError(f"selector: {error}") from None
        object.__setattr__(self, "selector", selector.to_dict())
        if self.granularity not in ("layer", "head"):
            raise ProfileError(f'granularity is {self.granularity!r}, expected "layer" or "head"')
        budgets = _matrix(self.budgets, self.num_layers, self.num_kv_heads)
        _check_range("budget", self.budget, selector.min_budget, selector)
        floors = self._floors(selector)
        for (layer, head), budget in np.ndenumerate(budgets):
            _check_range(f"budgets[{layer}][{head}]", int(budget), floors[layer], selector)
        if self.granularity == "layer":
            uneven = np.flatnonzero((budgets != budgets[:, :1]).any(axis=1))
            if uneven.size:
                raise ProfileError(
                    f'budgets[{uneven[0]}] differ among heads, but granularity is "layer"; '
                    'make the row constant or the granularity "head"'
                )
        budgets.flags.writeable = False
        object.__setattr__(self, "budgets", budgets)

    def _floors(self, selector: Selector) -> list[int]:
        """Return the least that a head of each layer may get, ``[layers]``."""
        windows = self.model.get("sliding_windows") or [None] * self.num_layers
        if len(windows) != self.num_layers:
            raise ProfileError(
                f"model.sliding_windows has {len(windows)} entries, expected one for each of {self.num_layers} layers"
            )
        return [min(selector.min_budget, window or selector.min_budget) for window in windows]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.model["num_layers"]

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return self.model["num_kv_heads"]

    @property
    def total(self) -> int:
        """Sum of all budgets, in cache entries."""
        return int(self.budgets.sum())

    @property
    def mean_budget(self) -> float:
        """Mean over layers and heads, in cache entries."""
        return self.total / self.budgets.size

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BudgetProfile):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.model["fingerprint"], self.selector["name"], self.budgets.tobytes()))

    @classmethod
    def uniform(cls, model: Any, budget: BudgetSpec, selector: SelectorSpec = "snapkv") -> BudgetProfile:
        """Return the profile in which every layer and head keeps `budget` entries.

        Args:
            model: a transformers model, or the `ModelInfo` of one.
            budget: cache entries per KV head.
            selector: as `evolkv.selectors.get_selector` takes it: a name, `"name:parameter=value"`, or a mapping.

        Raises:
            BudgetError, ProfileError: a budget out of range or an unknown selector.
        """
        info = _info(model)
        return cls.from_budgets(info, allocators.uniform(info.num_layers, read_budget(budget)), selector)

    @classmethod
    def from_budgets(
        cls,
        model: Any,
        budgets: ArrayLike,
        selector: SelectorSpec = "snapkv",
        *,
        budget: int | None = None,
        granularity: Literal["layer", "head"] | None = None,
        search: Mapping[str, Any] | None = None,
        scores: Mapping[str, Any] | None = None,
    ) -> BudgetProfile:
        """Return the profile with the given budgets.

        Args:
            model: a transformers model, or the `ModelInfo` of one.
            budgets: L ints, or (L, H) ints.
            selector: as `evolkv.selectors.get_selector` takes it: a name, `"name:parameter=value"`, or a mapping.
            budget: the mean budget that was aimed at. Default: the mean of `budgets`, rounded.
            granularity: default "layer" if every row is constant, else "head".
            search: provenance, JSON values.
            scores: measurements, JSON values.

        Raises:
            ProfileError: as for the class.
        """
        info, chosen = _info(model), get_selector(selector)
        matrix = _matrix(budgets, info.num_layers, info.num_kv_heads)
        constant = bool((matrix == matrix[:, :1]).all())
        windows = [] if isinstance(model, ModelInfo) else sliding_windows(model)
        narrow = any(window is not None and window < chosen.min_budget for window in windows)
        return cls(
            model={
                "name": info.name,
                "num_layers": info.num_layers,
                "num_kv_heads": info.num_kv_heads,
                "fingerprint": info.fingerprint,
                **({"sliding_windows": windows} if narrow else {}),
            },
            budget=round(float(matrix.mean())) if budget is None else budget,
            granularity=granularity or ("layer" if constant else "head"),
            budgets=matrix,
            selector=chosen.to_dict(),
            search=dict(search or {}),
            scores=dict(scores or {}),
        )

    def expand(self, budget: BudgetSpec, ceiling: ArrayLike | None = None) -> BudgetProfile:
        """Carry the allocation to another mean budget, larger or smaller (arXiv 2509.08315, sec. 3).

        Budgets keep their proportions and stay at or above what the selector always keeps. `search` records
        the budget they were found at; `scores` is empty, for it belongs to the old budgets.

        Args:
            budget: the new mean budget c′, in cache entries.
            ceiling: the most an entry may get: an int, or L ints, or (L, H) ints. Default: no limit.

        Returns:
            A profile with mean budget exactly `budget`.

        Raises:
            BudgetError: a mean budget out of reach of the selector's minimum or of the ceiling.
        """
        selector = get_selector(self.selector)
        budget = read_budget(budget)
        if budget < selector.min_budget:
            raise BudgetError(
                f"the budget is {budget}; expected at least {selector.min_budget} entries per head, which "
                f"{selector.name} always keeps"
            )
        limit = np.asarray(MAX_BUDGET if ceiling is None else ceiling)
        budgets = self.budgets
        if self.granularity == "layer":
            budgets, limit = budgets[:, 0], limit.min(axis=1) if limit.ndim == 2 else limit
        budgets = allocators.expand(budgets, budget, self._floors(selector), limit)
        found_at = self.search.get("expanded_from", self.budget)
        return replace(
            self,
            budget=budget,
            budgets=_matrix(budgets, self.num_layers, self.num_kv_heads),
            search={**self.search, "expanded_from": found_at},
            scores={},
        )

    def check_model(self, model: Any, strict: bool = True) -> None:
        """Check that the profile belongs to a model.

        Args:
            model: a transformers model, or the `ModelInfo` of one.
            strict: whether the fingerprint must match as well. False lets a profile be tried on a fine-tune
                of the model it was found on.

        Raises:
            ProfileError: another number of layers or KV heads, or another fingerprint.
        """
        info = _info(model)
        for what, mine, theirs in (
            ("layers", self.num_layers, info.num_layers),
            ("KV heads per layer", self.num_kv_heads, info.num_kv_heads),
        ):
            if mine != theirs:
                raise ProfileError(
                    f"the profile is for {mine} {what} (model {self.model['name']}), but {info.name} has "
                    f"{theirs}; use a profile that was made for this model"
                )
        if strict and self.model["fingerprint"] != info.fingerprint:
            message = (
                f"the profile was made for {self.model['name']} (fingerprint {self.model['fingerprint']}), "
                f"but the model is {info.name} (fingerprint {info.fingerprint}); "
            )
            if not isinstance(model, ModelInfo) and is_quantized(model):
                raise ProfileError(
                    f"{message}its weights are quantized, so they cannot be compared; if it is the same model, use "
                    "BudgetProfile.from_budgets(model, profile.budgets, profile.selector)"
                )
            raise ProfileError(
                f"{message}search a profile for this model; to try one from a relative, such as the model that it was "
                "tuned from, use BudgetProfile.from_budgets(model, profile.budgets, profile.selector)"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file as JSON values."""
        return {
            "format": FORMAT,
            "model": deepcopy(self.model),
            "budget": int(self.budget),
            "granularity": self.granularity,
            "budgets": self.budgets.tolist(),
            "selector": dict(self.selector),
            "search": deepcopy(self.search),
            "scores": deepcopy(self.scores),
        }

    @classmethod
    def from_dict(cls, data: Any) -> BudgetProfile:
        """Return the profile that `to_dict`, or a file, describes.

        Raises:
            ProfileError: not a profile, a newer format, a field of the wrong type (named by its JSON path),
                or as for the class.
        """
        _check_format(data)
        try:
            parsed = _File.model_validate(data)
        except ValidationError as error:
            raise ProfileError(first_error(error)) from None
        return cls(
            model=parsed.model.model_dump(exclude_unset=True),
            budget=parsed.budget,
            granularity=parsed.granularity,
            budgets=_matrix(parsed.budgets, parsed.model.num_layers, parsed.model.num_kv_heads),
            selector=parsed.selector,
            search=parsed.search,
            scores=parsed.scores,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to a JSON file, whole or not at all; missing folders are made.

        Raises:
            ProfileError: what is no name of a file, or provenance that JSON cannot hold.
            RunError: the file cannot be written.
        """
        text = self._text()
        if hub.is_address(path):
            raise ProfileError(f"{path} is an address on the Hub; use push_to_hub, or give a file name")
        target = Path(os.path.expanduser(path))
        if target.is_dir():
            raise ProfileError(f"{target} is a folder; expected a file name such as {target / 'profile.json'}")
        if target.exists() and not target.is_file():
            raise ProfileError(f"{target} is not a regular file; expected a file name such as profile.json")
        try:
            write_with(target, lambda partial: partial.write_bytes(text.encode()))
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BudgetProfile:
        """Read a profile from a JSON file and validate it.

        Args:
            path: the file; or its address on the Hugging Face Hub, ``hf://org/name`` or
                ``hf://org/name@revision/folder/file.json``.

        Raises:
            ProfileError: a file that is missing, unreadable or no profile, or as for `from_dict`.
            RunError: if the Hub cannot be reached.
        """
        if hub.is_address(path):
            address = hub.HubAddress.parse(str(path))
            return cls.from_hub(address.repo_id, address.filename, address.revision)
        source = Path(os.path.expanduser(path))
        try:
            return cls.from_dict(_read_json(source))
        except ProfileError as error:
            raise ProfileError(f"{source}: {error}") from None

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        filename: str = hub.FILE_NAME,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> BudgetProfile:
        """Read a profile from a model repository on the Hugging Face Hub and validate it.

        Only JSON is read. What was read before is at hand without a connection.

        Args:
            repo_id: ``org/name``.
            filename: the file's path in the repository.
            revision: branch, tag or commit. Default: the main branch.
            token: to read with. Default: that of ``hf auth login``.

        Raises:
            ProfileError: no such repository, revision or file, one that is no profile, or as for `from_dict`.
            RunError: if the Hub cannot be reached.
        """
        address = hub.HubAddress(repo_id, filename, revision)
        path = hub.download(address, MAX_FILE_BYTES, token)
        try:
            return cls.from_dict(_read_json(path))
        except ProfileError as error:
            raise ProfileError(f"{address}: {error}") from None

    def push_to_hub(
        self,
        repo_id: str,
        filename: str = hub.FILE_NAME,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Write the profile to a model repository on the Hugging Face Hub, which is made if it is missing.

        Args:
            repo_id: ``org/name``.
            filename: the file's path in the repository; what was there is replaced.
            revision: the branch. Default: the main branch.
            token: to write with. Default: that of ``hf auth login``.
            private: whether a repository that is made is private. Default: the owner's setting.
            commit_message: default says what the profile is.
            create_pr: propose the file in a pull request.

        Returns:
            The commit's address on the web, or that of the pull request.

        Raises:
            ProfileError: a name that is not valid, or provenance that JSON cannot hold.
            RunError: if the Hub cannot be reached, or refuses.
        """
        what = f"EvolKV profile of {self.model['name']} at mean budget {self.budget}"
        return hub.upload(
            hub.HubAddress(repo_id, filename, revision),
            self._text().encode(),
            commit_message or what,
            token,
            private,
            create_pr,
        )

    def _text(self) -> str:
        """What is in the file."""
        try:
            text = _to_json(self.to_dict())
        except (TypeError, ValueError) as error:
            raise ProfileError(f"search and scores must hold finite JSON values: {error}") from None
        _check_characters(text)
        return text


def _info(model: Any) -> ModelInfo:
    return model if isinstance(model, ModelInfo) else describe_model(model)


def _matrix(budgets: ArrayLike, num_layers: int, num_kv_heads: int) -> NDArray[np.int64]:
    """Return a copy of L or (L, H) whole numbers as an int64 (L, H) matrix."""
    if not isinstance(budgets, Iterable):
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
    given = np.asarray(rows)
    if given.dtype.kind not in "iu":
        raise ProfileError("budgets must be whole numbers of cache entries that fit 64 bits")
    matrix = given.astype(np.int64)
    return np.repeat(matrix[:, None], num_kv_heads, axis=1) if matrix.ndim == 1 else matrix


def _check_range(name: str, budget: int, least: int, selector: Selector) -> None:
    if not is_whole(budget):
        raise ProfileError(f"{name} is {budget!r}, expected a whole number of cache entries")
    if budget < least:
        raise ProfileError(
            f"{name} is {budget}, expected at least {least}: what the selector {selector.name!r} always keeps"
        )
    if budget > MAX_BUDGET:
        raise ProfileError(f"{name} is {budget}, expected at most {MAX_BUDGET}")


def _check_format(data: Any) -> None:
    found = data.get("format") if isinstance(data, Mapping) else None
    if found == FORMAT:
        return
    if isinstance(found, str):
        if (newer := re.fullmatch(r"evolkv\.profile/([1-9][0-9]{0,8})", found)) and int(newer[1]) > 1:
            raise ProfileError(f"the format is {found!r}, this version reads {FORMAT!r}; upgrade evolkv to read it")
        raise ProfileError(f"not a profile: the format is {found[:80]!r}, expected {FORMAT!r}")
    raise ProfileError(f'not a profile: expected a JSON object with "format": "{FORMAT}"')


def _read_json(path: Path) -> Any:
    if path.is_dir():
        raise ProfileError("is a folder, expected a profile file")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ProfileError(f"not a profile: larger than {MAX_FILE_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ProfileError("no such file; expected a profile made by `evolkv search` or BudgetProfile.save") from None
    except UnicodeDecodeError:
        raise ProfileError("not a profile: the file is not text, expected JSON") from None
    except OSError as error:
        raise ProfileError(f"cannot be read: {error.strerror or error}") from None
    try:
        data = json.loads(text, parse_constant=_reject_constant)
        _check_characters(json.dumps(data, ensure_ascii=False))
        return data
    except json.JSONDecodeError as error:
        raise ProfileError(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise ProfileError(f"not JSON that can be read: {error}") from None


def _check_characters(text: str) -> None:
    # JSON can spell half of a surrogate pair, which no file can hold.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ProfileError(
            f"{text[error.start]!a} is half of a character; write the whole character, or leave it out"
        ) from None


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _to_json(data: Mapping[str, Any]) -> str:
    """JSON with the budgets one layer per line, which is how people compare them."""
    parts = []
    for key, value in data.items():
        if key == "budgets":
            shown = "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
        else:
            dumped = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
            shown = dumped.replace("\n", "\n  ")
        parts.append(f"  {json.dumps(key)}: {shown}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} of type {type(value).__name__}")
