"""Numbers and commands as people read and type them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from evolkv.budgets import size_of
from evolkv.report.schemas import Row
from evolkv.specs import format_spec

#: The settings that are options of `evolkv search`, in the order in which a command gives them.
_OPTIONS = (
    *("task", "budget", "selector", "strategy", "granularity", "metric", "train", "val", "max_evals", "population"),
    *("sigma", "group_size", "lam", "gamma", "floor", "ceiling", "seed", "engine", "prefill_chunk", "minibatch"),
    *("start", "gradient_steps", "first", "dtype", "protocol"),
)


def number(value: float | str) -> str:
    """A number with its thousands apart; a share as it is."""
    if isinstance(value, str):
        return value
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"


def score(value: float) -> str:
    """A score to three decimals."""
    return f"{value:.3f}"


def interval(bounds: Sequence[float]) -> str:
    """A 95 % interval."""
    return f"{bounds[0]:.2f}–{bounds[1]:.2f}"


def in_chunks(tokens: int | None) -> str:
    """Return how prompts were read, if it was not at once."""
    return "" if tokens is None else f"in chunks of {number(tokens)}"


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f}\u202f%"


def listing(words: Sequence[str]) -> str:
    """Words as a sentence lists them: a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def counted(count: int, what: str) -> str:
    """A count with its noun: 1 candidate, 2 candidates."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def short(text: str, most: int = 400) -> str:
    """A text that came from outside, cut to what there is room for."""
    return text if len(text) <= most else text[: most - 1] + "…"


def shown_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) pairs of settings; nested ones on one line."""
    shown = {name: value for name, value in settings.items() if value is not None}
    if isinstance(selector := settings.get("selector"), Mapping):
        shown["selector"] = selector_spec(selector)
    if rivals := _rivals(settings):
        shown["rivals"] = ", ".join(f"{spec} {score:.3f}" if score is not None else spec for spec, score in rivals)
    return [(short(str(name).replace("_", " ")), short(_value(value))) for name, value in shown.items()]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(
            f"{name} {_value(inner) if _plain(inner) else json.dumps(inner)}" for name, inner in value.items()
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if _plain(value) else json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> bool:
    return not isinstance(value, (dict, list))


def search_command(settings: Mapping[str, Any], model: str) -> list[str]:
    """The command that runs a search with these settings, in the pieces that a line may be broken between.

    Args:
        settings: of the search; what is no option is left out.
        model: name of the model.
    """
    words = ["evolkv", "search", model]
    for name in _OPTIONS:
        option, value = f"--{name.replace('_', '-')}", settings.get(name)
        if name == "val":
            value = settings.get("validation", value)
        if name == "minibatch" and settings.get("strategy") != "joint" and value == _count(settings.get("train")):
            # On record for every strategy; those that need all examples in each generation refuse the option.
            continue
        if name == "max_evals" and settings.get("strategy") in ("gradient", "start"):
            # On record, too, and not used.
            continue
        if name == "selector" and (rivals := _rivals(settings)):
            words += [option, *(spec for spec, _ in rivals)]
            continue
        value = _count(value) or selector_spec(value) if isinstance(value, Mapping) else value
        if name == "start" and isinstance(value, str) and value.startswith("profile "):
            # Only the digest of a profile that a search started from is on record, not its path.
            value = "START.json"
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            words += [option, str(value)]
    return _pieces([*words, "--out", "profile.json"])


def _count(examples: Any) -> Any:
    """The number of examples that a search has on record for a split, if it has."""
    return examples.get("n") if isinstance(examples, Mapping) else None


def _rivals(settings: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """The selectors that a search was run under and the validation score of each, if there were several."""
    found = []
    for row in rows if isinstance(rows := settings.get("rivals"), list) else []:
        if isinstance(row, Mapping) and isinstance(selector := row.get("selector"), Mapping):
            score = row.get("score")
            found.append((str(selector_spec(selector)), float(score) if isinstance(score, (int, float)) else None))
    return found


def candidates(evaluations: int, settings: Mapping[str, Any]) -> int:
    """Return the number of candidates that a search evaluated, under all of its selectors."""
    rows = rows if isinstance(rows := settings.get("rivals"), list) else []
    counts = [row.get("evaluations") for row in rows if isinstance(row, Mapping)]
    return sum(count for count in counts if isinstance(count, int)) or evaluations


def selector_spec(selector: Mapping[str, Any]) -> str | None:
    """A selector as the command line takes it, such as snapkv:window=32,kernel=7; None if it has no name."""
    if not isinstance(name := selector.get("name"), str):
        return None
    return format_spec(name, {key: str(value) for key, value in selector.items() if key != "name"})


def eval_command(rows: Sequence[Row]) -> list[str]:
    """The command that scores the methods of one comparison's rows, in pieces."""
    methods = list(dict.fromkeys("profile.json" if row.method == "evolkv" else row.method for row in rows))
    budgets = sorted({row.budget for row in rows if row.budget is not None}, key=size_of)
    words = ["evolkv", "eval", rows[0].model, "--task", rows[0].task, "--method", *methods]
    words += ["--budget", *map(str, budgets)] if budgets else []
    words += ["--samples", str(rows[0].n)]
    # Where examples have several metrics, these are their own.
    words += ["--metric", rows[0].metric] if "+" not in rows[0].metric else []
    words += ["--protocol", rows[0].protocol] if rows[0].protocol else []
    words += ["--prefill-chunk", str(chunk)] if (chunk := rows[0].prefill_chunk) is not None else []
    words += ["--block-size", str(block)] if (block := rows[0].block_size) is not None else []
    words += ["--dtype", rows[0].dtype] if rows[0].dtype else []
    words += ["--seed", str(rows[0].seed)] if rows[0].seed is not None else []
    return _pieces(words)


def _pieces(words: Sequence[str]) -> list[str]:
    starts = [0, *(i for i, word in enumerate(words) if word.startswith("--")), len(words)]
    return [shlex.join(words[a:b]) for a, b in pairwise(starts)]
