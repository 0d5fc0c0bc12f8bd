"""The profile: the budgets a search found, with the selector and model they belong to, as one file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evolkv import allocators, hub
from evolkv.budgets import MAX_BUDGET, Budget, BudgetSpec, Share, read_budget
from evolkv.errors import BudgetError, ProfileError, UsageError
from evolkv.json_files import read_json
from evolkv.models import ModelInfo, describe_model, model_facts
from evolkv.models.facts import cache_shape
from evolkv.models.identity import is_quantized
from evolkv.profile_file import (
    FORMAT,
    MAX_FILE_BYTES,
    Granularity,
    ProfileFile,
    as_matrix,
    check_budgets,
    profile_text,
    write_profile,
)
from evolkv.selectors import Selector, SelectorSpec, get_selector


@dataclass(frozen=True, eq=False)
class BudgetProfile:
    """The number of cache entries that each layer and KV head of one model keeps, and the selector that chooses them.

    Make one with `uniform`, `from_budgets` or `load`. Profiles with the same content are equal.

    Args:
        model: `{"name", "num_layers", "num_kv_heads", "fingerprint"}` of the model the budgets belong to; and where
            layers have sliding windows, the `"sliding_windows"` of all.
        budget: c, the mean budget that was aimed at, in cache entries per KV head.
        granularity: "layer" (all heads of a layer keep the same number) or "head".
        budgets: the whole allocation, (L, H) ints; kept as a read-only int64 array. With a `share` they are those of
            one length of prompt, and give the proportions for all others: see `budgets_at`.
        selector: `{"name": ..., **parameters}`; parameters left out get their defaults.
        search: where the budgets come from (task, strategy, seed, evaluations, library versions, …).
        scores: what was measured with them.
        share: the mean budget as a share of each prompt, or None where budgets are the same for every prompt.

    Raises:
        ProfileError: budgets that are not (L, H) whole numbers between what the selector always keeps (or a layer's
            sliding window, if that is smaller) and 2**31, budgets whose mean is above `budget` by more than rounding,
            rows that are not constant at granularity "layer", or a selector that does not exist.
    """

    model: dict[str, Any]
    budget: int
    granularity: Granularity
    budgets: NDArray[np.int64]
    selector: dict[str, Any]
    search: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    share: Share | None = None

    def __post_init__(self) -> None:
        for name in ("model", "search", "scores"):
            object.__setattr__(self, name, deepcopy(dict(getattr(self, name))))
        try:
            selector = get_selector(self.selector)
        except UsageError as error:
            raise ProfileError(f"selector: {error}") from None
        object.__setattr__(self, "selector", selector.to_dict())
        budgets = as_matrix(self.budgets, self.num_layers, self.num_kv_heads)
        because = f": what the selector {selector.name!r} always keeps"
        check_budgets(self.budget, budgets, self.granularity, selector.min_budget, self._floors(selector), because)
        budgets.flags.writeable = False
        object.__setattr__(self, "budgets", budgets)
        object.__setattr__(self, "budget", int(self.budget))
        object.__setattr__(self, "share", None if self.share is None else Share(self.share))

    def _floors(self, selector: Selector) -> list[int]:
        """Return the least that a head of each layer may get, ``[layers]``."""
        least = selector.min_budget
        return [min(least, window or least) for window in self._windows]

    @property
    def _windows(self) -> list[int | None]:
        """The sliding window of each layer in tokens, None where it sees everything or where the profile is old."""
        return self.model.get("sliding_windows") or [None] * self.num_layers

    @property
    def _most(self) -> NDArray[np.int64]:
        """The most that a head of each layer can hold of a prompt: its sliding window, if it has one; ``[layers]``."""
        return np.array([window or MAX_BUDGET for window in self._windows])

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
    def target(self) -> Budget:
        """The mean budget that was aimed at: the share of each prompt if there is one, else the number of entries."""
        return self.budget if self.share is None else self.share

    @property
    def unit(self) -> str:
        """Name of the things that a budget counts, as people read it."""
        return get_selector(self.selector).unit

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
            budget: cache entries per KV head, or a share of each prompt, such as ``"10%"``.
            selector: as `evolkv.selectors.get_selector` takes it: a name, `"name:parameter=value"`, or a mapping.

        Raises:
            BudgetError, ProfileError: a budget out of range or an unknown selector.
        """
        info, target = _info(model), read_budget(budget)
        if not isinstance(target, Share):
            return cls.from_budgets(info, allocators.uniform(info.num_layers, target), selector)
        most = max(target.of(info.max_context), get_selector(selector).min_budget)
        return cls.from_budgets(info, allocators.uniform(info.num_layers, most), selector, share=target)

    @classmethod
    def from_budgets(
        cls,
        model: Any,
        budgets: ArrayLike,
        selector: SelectorSpec = "snapkv",
        *,
        budget: int | None = None,
        granularity: Granularity | None = None,
        search: Mapping[str, Any] | None = None,
        scores: Mapping[str, Any] | None = None,
        share: str | None = None,
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
            share: the mean budget as a share of each prompt, such as ``"10%"``, for which `budgets` give the
                proportions. Default: budgets are the same for every prompt.

        Raises:
            ProfileError: as for the class.
            BudgetError: for what is no share.
            UsageError: for budgets that the selector cannot keep to; see `Selector.check_budgets`.
        """
        info, chosen = _info(model), get_selector(selector)
        matrix = as_matrix(budgets, info.num_layers, info.num_kv_heads)
        constant = bool((matrix == matrix[:, :1]).all())
        windows = [] if isinstance(model, ModelInfo) else model_facts(model).sliding_windows
        if windows:
            chosen.check_budgets(matrix, windows)
        sliding = any(window is not None for window in windows)
        return cls(
            model={
                **{key: getattr(info, key) for key in ("name", "num_layers", "num_kv_heads", "fingerprint")},
                **({"sliding_windows": windows} if sliding else {}),
            },
            budget=round(float(matrix.mean())) if budget is None else budget,
            granularity=granularity or ("layer" if constant else "head"),
            budgets=matrix,
            selector=chosen.to_dict(),
            search=dict(search or {}),
            scores=dict(scores or {}),
            share=share,  # type: ignore[arg-type]
        )

    def budgets_at(
        self, tokens: int, ceiling: ArrayLike | None = None, share: Share | None = None
    ) -> NDArray[np.int64]:
        """Return the budgets of a prompt, (L, H).

        Without a share they are `budgets`. With one, the proportions of `budgets` are brought to the total
        round(share · tokens) · L · H by the rule of `complete`, as far as this allows: no head gets less than the
        selector always keeps, and none more than it can hold.

        Args:
            tokens: length of the prompt.
            ceiling: the most an entry can hold besides the prompt's length: an int, or L ints. Default: the sliding
                windows.
            share: the share, if it is another than the profile's own.
        """
        share = share or self.share
        if share is None:
            return self.budgets
        by_head = self.granularity == "head"
        budgets = self.budgets if by_head else self.budgets[:, 0]
        limit = np.minimum(tokens, self._most if ceiling is None else ceiling)
        total = share.of(tokens) * budgets.size
        fitted = allocators.fit(budgets, total, self._floors(get_selector(self.selector)), limit)
        return as_matrix(fitted, self.num_layers, self.num_kv_heads)

    def expand(self, budget: BudgetSpec, ceiling: ArrayLike | None = None) -> BudgetProfile:
        """Carry the allocation to another mean budget, larger or smaller (arXiv 2509.08315, sec. 3).

        Budgets keep their proportions and stay at or above what the selector always keeps. `search` records
        the budget they were found at; `scores` is empty, for it belongs to the old budgets.

        Args:
            budget: the new mean budget c′, in cache entries; or a share of each prompt, for which `budgets` stay as
                they are and give the proportions.
            ceiling: the most an entry may get: an int, or L ints, or (L, H) ints. Default: the sliding windows, as far
                as they can hold so much; no limit for other layers.

        Returns:
            A profile with mean budget exactly `budget`.

        Raises:
            BudgetError: a mean budget out of reach of the selector's minimum or of the ceiling.
        """
        selector = get_selector(self.selector)
        budget = read_budget(budget)
        found_at = self.search.get("expanded_from", self.target)
        search: dict[str, Any] = {**self.search, "expanded_from": found_at}
        if isinstance(budget, Share):
            return replace(self, share=budget, search=search, scores={})
        if budget < selector.min_budget:
            raise BudgetError(
                f"the budget is {budget}; expected at least {selector.min_budget} entries per head, which "
                f"{selector.name} always keeps"
            )
        if ceiling is None:
            ceiling = self._most if budget <= self._most.mean() else MAX_BUDGET
        limit = np.asarray(ceiling)
        budgets = self.budgets
        if self.granularity == "layer":
            budgets, limit = budgets[:, 0], limit.min(axis=1) if limit.ndim == 2 else limit
        budgets = allocators.expand(budgets, budget, self._floors(selector), limit)
        matrix = as_matrix(budgets, self.num_layers, self.num_kv_heads)
        return replace(self, budget=budget, budgets=matrix, search=search, scores={}, share=None)

    def in_classes(self, count: int, granularity: Granularity = "layer") -> BudgetProfile:
        """Return a profile in which only a few budgets occur, each in as many layers, or heads, as any other.

        A serving engine keeps one table of blocks for each budget that occurs, and pads classes that are smaller than
        others. See `evolkv.allocators.in_classes`. `scores` is empty, for it belongs to the old budgets.

        Args:
            count: how many budgets may occur; it must divide the number of layers without a sliding window, or of
                their heads.
            granularity: "layer", where each layer counts with its mean, or "head".

        Returns:
            A profile in which the layers without a sliding window have the same total; where that is no multiple of a
            class's size, the next lower one.

        Raises:
            UsageError: a count that does not divide the number of layers, or of heads.
            BudgetError: a total that does not leave each layer what the selector always keeps.
        """
        floors = self._floors(get_selector(self.selector))
        budgets = allocators.in_classes(self.budgets, count, floors, self._windows, granularity)
        search = {**self.search, "classes": int(count)}
        return replace(self, budgets=budgets, granularity=granularity, search=search, scores={})

    def check_model(self, model: Any) -> None:
        """Check that the profile belongs to a model.

        Args:
            model: a transformers model, or the `ModelInfo` of one.

        Raises:
            ProfileError: another number of layers or KV heads, or another fingerprint.
        """
        info = _info(model)
        self._check_shape(info.name, info.num_layers, info.num_kv_heads)
        if self.model["fingerprint"] != info.fingerprint:
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

    def check_config(self, config: Any) -> None:
        """Check what the config of a model tells, before its weights are read; `check_model` checks the rest.

        Args:
            config: transformers' config of the model.

        Raises:
            ProfileError: another number of layers or KV heads.
        """
        self._check_shape(*cache_shape(config))

    def _check_shape(self, name: str, num_layers: int, num_kv_heads: int) -> None:
        for what, mine, theirs in (
            ("layers", self.num_layers, num_layers),
            ("KV heads per layer", self.num_kv_heads, num_kv_heads),
        ):
            if mine != theirs:
                raise ProfileError(
                    f"the profile is for {mine} {what} (model {self.model['name']}), but {name} has "
                    f"{theirs}; use a profile that was made for this model"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file as JSON values."""
        return {
            "format": FORMAT,
            "model": deepcopy(self.model),
            "budget": self.budget,
            **({} if self.share is None else {"share": self.share.fraction}),
            "granularity": self.granularity,
            "budgets": self.budgets.tolist(),
            "selector": dict(self.selector),
            "search": deepcopy(self.search),
            "scores": deepcopy(self.scores),
        }

    @classmethod
    def from_dict(cls, data: Any) -> BudgetProfile:
        """Return the profile that `to_dict`, or a file, describes.

        Args:
            data: JSON values, as `to_dict` returns them.

        Raises:
            ProfileError: not a profile, a newer format, a field of the wrong type (named by its JSON path),
                or as for the class.
        """
        parsed = ProfileFile.parse(data)
        return cls(
            model=parsed.model.model_dump(exclude_unset=True),
            budget=parsed.budget,
            granularity=parsed.granularity,
            budgets=np.array(parsed.budgets),
            selector=parsed.selector,
            search=parsed.search,
            scores=parsed.scores,
            share=None if parsed.share is None else Share.of_fraction(parsed.share),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to a JSON file, whole or not at all; missing folders are made.

        Args:
            path: the file; what was there is replaced.

        Raises:
            ProfileError: what is no name of a file, or provenance that JSON cannot hold.
            RunError: the file cannot be written.
        """
        if hub.is_address(path):
            raise ProfileError(f"{path} is an address on the Hub; use push_to_hub, or give a file name")
        write_profile(path, self.to_dict())

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
        return cls._read(Path(os.path.expanduser(path)), os.path.expanduser(path))

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
        return cls._read(hub.download(address, MAX_FILE_BYTES, token), address)

    @classmethod
    def _read(cls, path: Path, name: object) -> BudgetProfile:
        try:
            data = read_json(path, MAX_FILE_BYTES, "a profile made by `evolkv search` or BudgetProfile.save")
            return cls.from_dict(data)
        except UsageError as error:
            raise ProfileError(f"{name}: {error}") from None

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
        card: bool = True,
        results: str | os.PathLike[str] | None = None,
    ) -> str:
        """Write the profile to a model repository on the Hugging Face Hub, which is made if it is missing.

        Beside the profile go `README.md`, the repository's page, with the budgets, the scores, how the profile was made
        and how to use it; and the picture that the page shows, `budgets.png`. A README that EvolKV did not write stays
        as it is.

        Args:
            repo_id: ``org/name``.
            filename: the file's path in the repository; what was there is replaced.
            revision: the branch. Default: the main branch.
            token: to write with. Default: that of ``hf auth login``.
            private: whether a repository that is made is private. Default: the owner's setting.
            commit_message: default says what the profile is.
            create_pr: propose the files in a pull request.
            card: write the page and its picture.
            results: a file that ``evolkv eval --json`` wrote, whose scores and intervals the page is to show.

        Returns:
            The commit's address on the web, or that of the pull request.

        Raises:
            ProfileError: a name that is not valid, or provenance that JSON cannot hold.
            UsageError: results that cannot be read, or that are of another model.
            RunError: if the Hub cannot be reached, or refuses.
        """
        from evolkv.profile_card import card_files, read_rows

        address = hub.HubAddress(repo_id, filename, revision)
        files = {filename: profile_text(self.to_dict()).encode()}
        rows = [] if results is None else read_rows(self, results)
        if card:
            files |= card_files(self, address, rows, token)
        what = f"EvolKV profile of {self.model['name']} at mean budget {self.target}"
        return hub.upload(address, files, commit_message or what, token, private, create_pr)


def _info(model: Any) -> ModelInfo:
    return model if isinstance(model, ModelInfo) else describe_model(model)
