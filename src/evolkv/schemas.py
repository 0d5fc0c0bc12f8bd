"""Data from files that anyone may have written: what is wrong with it, and how two sets of settings differ."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from evolkv.budgets import MAX_BUDGET, Share
from evolkv.errors import UsageError
from evolkv.numbers import is_whole

M = TypeVar("M", bound=BaseModel)
#: A whole number that any program can read, also one whose numbers are all floats.
Count = Annotated[int, Field(ge=0, le=2**53)]

#: The format of a file of results, as `eval` and the demo write them.
RESULTS_FORMAT = "evolkv.results/1"


class Schema(BaseModel):
    """Part of such a file, checked without any conversion; what it has besides is ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


def _recorded_budget(value: Any) -> int | str:
    if isinstance(value, str):
        return str(Share(value))
    if not is_whole(value) or not 1 <= value <= MAX_BUDGET:
        raise ValueError(f"a whole number from 1 to {MAX_BUDGET}, or a share such as 10%")
    return int(value)


#: A budget as files hold it: a number of entries, or the text of a share. (Not a `PlainValidator`: pydantic then calls
#: Python to write a budget, and what Ctrl-C raises in there comes out as a serialization error.)
RecordedBudget = Annotated[int | str, BeforeValidator(_recorded_budget)]


def checked(kind: type[M], where: object, data: Any, refusal: type[UsageError] = UsageError) -> M:
    """Return data as a pydantic model of a kind.

    Raises:
        UsageError: it is not one; says `where` it comes from and which part of it is wrong. Of class `refusal`.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise refusal(f"{where}: {first_error(error)}") from None


def first_error(error: ValidationError) -> str:
    """Return the first thing that pydantic found wrong, as part of a line: where, what is there, what should be."""
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] == "json_invalid":
        return str(first["msg"])
    if first["type"] == "model_type":
        return f"{place} is {_short(repr(first['input']), 60)}, expected an object".lstrip()
    if isinstance(cause := first.get("ctx", {}).get("error"), UsageError):
        return f"{place}: {cause}" if place else str(cause)
    if first["input"] == [] or (first["type"] == "too_short" and not first["input"]):
        return f"{place} is empty"
    if first["type"] in ("too_short", "too_long"):
        side, limit = ("at least", "min_length") if first["type"] == "too_short" else ("at most", "max_length")
        count = len(first["input"])
        return f"{place} has {count} entr{'y' if count == 1 else 'ies'}, expected {side} {first['ctx'][limit]}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if isinstance(first["input"], (dict, list)) and first["type"] == "value_error":
        return f"{place} should have {message}"
    return f"{place} is {_short(repr(first['input']), 60)}, expected {message}".lstrip()


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], recorded: str, whole: Collection[str] = ()
) -> list[str]:
    """Return what differs between recorded settings and present ones: ``"seed: the study has 0, now 1"``.

    Args:
        before: the recorded settings; a mapping in them is compared key by key.
        now: the present settings.
        recorded: says where the recorded ones are, such as "the study has".
        whole: names of mappings whose values are compared as a whole: one that is missing is one difference.
    """
    old, new = dict(_flat(before, whole)), dict(_flat(now, whole))
    return [
        f"{key}: {recorded} {_value(old, key)}, now {_value(new, key)}"
        for key in {**old, **new}
        if key not in old or key not in new or old[key] != new[key]
    ]


def _flat(settings: Mapping[str, Any], whole: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value and prefix.rstrip(".") not in whole:
            yield from _flat(value, whole, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _value(settings: Mapping[str, Any], key: str) -> str:
    return _short(json.dumps(settings[key], ensure_ascii=False), 80) if key in settings else "nothing"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "…"
