"""A profile in words: its facts, and the page that stands beside it on the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from evolkv import hub
from evolkv.errors import UsageError
from evolkv.hub import FILE_NAME, HubAddress
from evolkv.json_files import read_json
from evolkv.profile_file import MAX_FILE_BYTES
from evolkv.schemas import RESULTS_FORMAT
from evolkv.specs import BOOLEANS, parse_spec
from evolkv.version import __version__

if TYPE_CHECKING:
    from evolkv.profile import BudgetProfile

README, PICTURE = "README.md", "budgets.png"
#: Tells a page that EvolKV wrote, and may replace, from one of the repository's owner.
_MARK = "<!-- written by evolkv -->"
_MOST_RESULT_BYTES = 64 * 2**20
#: Allocations that a search compares, as people call them.
_ALLOCATIONS = {
    "best": "evolved, the fittest candidate",
    "mean": "evolved, the mean of the distribution",
    "gradient": "evolved, the gradient start",
    "uniform": "equal budgets",
    "pyramid": "pyramid-shaped budgets",
    "lukv": "LU-KV",
    "start": "the start",
}
#: Tasks that leave the chat template out unless their settings say otherwise, and subsets of LongBench that always do.
_PLAIN_TASKS = ("code", "gsm8k", "jsonl", "prompts")
_PLAIN_SUBSETS = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")


def provenance(profile: BudgetProfile) -> dict[str, str]:
    """Return what a profile records about itself, in words, by short names in the order to show them."""
    search, model = profile.search, profile.model
    parameters = ", ".join(f"{key} {value}" for key, value in profile.selector.items() if key != "name")
    found = {
        "model": f"{model['name']} ({model['num_layers']} layers × {model['num_kv_heads']} KV heads)",
        "budget": ("" if profile.share is None else f"{profile.share} of each prompt, in the proportions of ")
        + f"mean {profile.mean_budget:,.6g}, from {profile.budgets.min():,} to {profile.budgets.max():,} "
        f"{profile.unit}, by {profile.granularity}",
        "selector": profile.selector["name"] + (f" ({parameters})" if parameters else ""),
    }
    if "expanded_from" in search:
        found["expanded"] = f"from mean budget {search['expanded_from']}"
    if "task" in search:
        found["task"] = str(search["task"])
    if "haystack" in search:
        found["haystack"] = str(search["haystack"])
    if "strategy" in search:
        early = ", interrupted" if search.get("interrupted") else ""
        protocol = f", protocol {search['protocol']}" if _agnostic(search) else ""
        chunks = f", prompts in chunks of {chunk}" if (chunk := _chunk(search)) else ""
        found["search"] = (
            f"{search['strategy']}, {search.get('evaluations', '?')} candidates, metric {search.get('metric', '?')}"
            f"{protocol}{chunks}, seed {search.get('seed', '?')}, chosen: {search.get('chosen', '?')}{early}"
        )
    intervals = _intervals(profile)
    for name, scores in profile.scores.items():
        if name != "ci95":
            found[name] = _scores(scores, intervals if name == "validation" else {})
    if isinstance(versions := search.get("versions"), dict):
        found["versions"] = ", ".join(f"{key} {value}" for key, value in versions.items())
    return found


def _intervals(profile: BudgetProfile) -> dict[str, Any]:
    """Return the 95 % intervals of the validation scores, by allocation, as far as the profile holds them."""
    found = profile.scores.get("ci95")
    return found if isinstance(found, dict) else {}


def _scores(scores: Any, intervals: Mapping[str, Any]) -> str:
    if not isinstance(scores, dict):
        return str(scores)
    return ", ".join(_score(name, value, intervals.get(name)) for name, value in scores.items())


def _score(name: str, value: Any, interval: Any) -> str:
    said = f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
    return f"{said} ({interval[0]:.2f}–{interval[1]:.2f})" if _is_interval(interval) else said


def _is_interval(value: Any) -> TypeGuard[list[float]]:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(end, (int, float)) for end in value)


def read_rows(profile: BudgetProfile, path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the rows of a file that ``evolkv eval --json`` wrote.

    Args:
        profile: whose page is to show them.
        path: the file.

    Raises:
        UsageError: another kind of file, or rows of another model.
    """
    place = Path(os.path.expanduser(path))
    try:
        data = read_json(place, _MOST_RESULT_BYTES, "results made by `evolkv eval --json`")
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    rows = data.get("rows") if isinstance(data, dict) and data.get("format") == RESULTS_FORMAT else None
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise UsageError(f"{path}: not results of an evaluation; expected a file made by `evolkv eval --json`")
    models = sorted({str(row["model"]) for row in rows} - {profile.model["name"]})
    if models:
        raise UsageError(f"{path}: results of {models[0]}, but the profile is for {profile.model['name']}")
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not {"model", "task", "method", "n", "metric"} <= row.keys():
        return False
    return isinstance(row.get("score"), (int, float)) and _is_interval(row.get("ci95"))


def without_template(task: object) -> bool | None:
    """Return whether the examples of a task go to the model without its chat template.

    Args:
        task: its spec, as a search records it; anything else means nothing.

    Returns:
        None where some do and others do not, or where the task's file decides.
    """
    found = {_without_template(each) for each in str(task).split(" && ")}
    return found.pop() if len(found) == 1 else None


def _without_template(spec: str) -> bool | None:
    name = spec.partition(":")[0].strip()
    try:
        values = parse_spec(spec, "task", {name: "subset" if name == "longbench" else "path"})[1]
    except UsageError:
        return False
    said = BOOLEANS.get(values.get("chat", "").strip().lower())
    if name == "prompts" and not said and Path(values.get("path", "")).suffix.lower() in ("", ".jsonl"):
        # Of files and folders that may hold both, chats go into the template and texts do not.
        return None
    if said is not None:
        return not said
    if name == "longbench":
        return values.get("subset", "").strip().removesuffix("_e") in _PLAIN_SUBSETS
    return name in _PLAIN_TASKS


def generate_command(model: str, profile: str, search: Mapping[str, Any]) -> str:
    """Return the command that generates under a profile, with chat template and chunks as its search had them.

    Args:
        model: name of the model.
        profile: where the profile is.
        search: what the profile records of its search.
    """
    return shlex.join(["evolkv", *generate_words(model, profile, search)])


def generate_words(model: str, profile: str, search: Mapping[str, Any]) -> list[str]:
    """Return the words of `generate_command` after the program's name."""
    raw = ["--raw"] if without_template(search.get("task")) else []
    return ["generate", model, "--profile", profile, "--prompt-file", "question.txt", *raw, *_chunk_words(search)]


def eval_words(search: Mapping[str, Any]) -> list[str]:
    """Return the options with which `evolkv eval` reads prompts as a search did."""
    return [*(["--protocol", str(search["protocol"])] if _agnostic(search) else []), *_chunk_words(search)]


def _agnostic(search: Mapping[str, Any]) -> bool:
    """Return whether a search had another protocol than the usual one."""
    return search.get("protocol", "aware") != "aware"


def _chunk_words(search: Mapping[str, Any]) -> list[str]:
    return ["--prefill-chunk", str(chunk)] if (chunk := _chunk(search)) else []


def _chunk(search: Mapping[str, Any]) -> int | None:
    """Return the tokens of the chunks in which a search read its prompts; None if it read them at once."""
    chunk = search.get("prefill_chunk")
    return chunk if isinstance(chunk, int) else None


def template_note(task: object) -> str:
    """Return what there is to say of `generate_command` and the chat template, as a sentence, or nothing."""
    return "Add --raw for prompts without the chat template." if without_template(task) is None else ""


def python_example(model: str, profile: str, search: Mapping[str, Any]) -> str:
    """Return lines of Python that do what `generate_command` does; the arguments are the same."""
    text = 'tokenizer("…", return_tensors="pt")'
    reads = [f"inputs = {text}.to(model.device)"]
    chunks = f", prefill_chunk={chunk}" if (chunk := _chunk(search)) else ""
    if not without_template(search.get("task")):
        reads = [
            f"# Of a model without a chat template: inputs = {text}",
            'messages = [{"role": "user", "content": "…"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
        ]
    return "\n".join(
        [
            "import evolkv",
            "",
            f"model, tokenizer = evolkv.load_model({json.dumps(model, ensure_ascii=False)})",
            f"profile = evolkv.BudgetProfile.load({json.dumps(profile, ensure_ascii=False)})",
            *reads,
            f"with evolkv.compress(model, profile{chunks}):",
            "    output = model.generate(**inputs, max_new_tokens=64)",
            "print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))",
        ]
    )


def is_card(text: str) -> bool:
    """Return True if EvolKV wrote a page."""
    return _MARK in text


def card_text(profile: BudgetProfile, address: HubAddress, rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the page of a profile in Markdown, with the front matter that the Hub reads.

    Args:
        profile: what it is about.
        address: where it will be.
        rows: of an evaluation; see `read_rows`.
    """
    name, search = profile.model["name"], profile.search
    where = str(HubAddress(address.repo_id, address.filename, address.revision))
    where = where.removesuffix(f"/{FILE_NAME}") if address.filename == FILE_NAME else where
    mean = f"{profile.share} of each prompt" if profile.share else f"{profile.mean_budget:,.6g} {profile.unit}"
    each = "KV head" if profile.granularity == "head" else "layer"
    check = ["evolkv", "eval", name, "--task", "TASK", "--method", "full", where, "--budget", str(profile.target)]
    check += eval_words(search)
    parts = [
        _front_matter(name),
        _MARK,
        f"# EvolKV profile of {_plain(name)}",
        f"A budget of {profile.unit} for each {each} of `{name}`: {mean} per KV head on average, from "
        f"{profile.budgets.min():,} to {profile.budgets.max():,}. The selector `{profile.selector['name']}` says which "
        "tokens these are.",
        f"![Budgets by layer and KV head]({PICTURE})",
        "## How to use it",
        f"    pip install .    # in a clone of EvolKV's repository\n    {generate_command(name, where, search)}",
        *([note] if (note := template_note(search.get("task"))) else []),
        f"```python\n{python_example(name, where, search)}\n```",
        "The profile fits these weights only; EvolKV refuses others. It serves the kind of work that it was found on. "
        f"Check it on your own: `{shlex.join(check)}`.",
        "## Scores",
        *_score_sections(profile, rows),
        "## How it was made",
        _table(["", ""], [[key, _plain(value)] for key, value in provenance(profile).items()]),
        f"This page was written by EvolKV {__version__}. Everything on it stands in `{address.filename}`"
        f"{', or in the results of the evaluation' if rows else ''}.",
    ]
    return "\n\n".join(parts) + "\n"


def card_files(
    profile: BudgetProfile, address: HubAddress, rows: Sequence[Mapping[str, Any]], token: str | bool | None
) -> dict[str, bytes]:
    """Return the page and its picture by their names; none where the repository has a page of its own."""
    there = hub.read_text(HubAddress(address.repo_id, README, address.revision), MAX_FILE_BYTES, token)
    if there is not None and not is_card(there):
        return {}
    from evolkv.plots import budgets_png

    return {README: card_text(profile, address, rows).encode(), PICTURE: budgets_png(profile)}


def _front_matter(name: str) -> str:
    # An alias or a path is no address on the Hub.
    base = f"base_model: {name}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
    return f"---\nlibrary_name: evolkv\n{base}tags:\n- evolkv\n- kv-cache\n- kv-cache-compression\n---"


def _score_sections(profile: BudgetProfile, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = []
    if rows:
        cells = [
            [
                _plain(row["task"]),
                _plain(row["method"]),
                str(row["budget"]) if row.get("budget") is not None else "",
                f"{row['score']:.3f}",
                f"{row['ci95'][0]:.2f}–{row['ci95'][1]:.2f}",
                str(row["n"]),
                _plain(row["metric"]),
            ]
            for row in rows
        ]
        columns = ["task", "method", "budget", "score", "95 % interval", "n", "metric"]
        parts += ["On examples that no search saw:", _table(columns, cells)]
    validation = profile.scores.get("validation")
    if isinstance(validation, dict) and validation:
        chosen, intervals = profile.search.get("chosen"), _intervals(profile)
        cells = []
        for name, score in sorted(validation.items(), key=lambda each: -(each[1] or 0)):
            said = f"{_ALLOCATIONS.get(name, _plain(name))}{', **chosen**' if name == chosen else ''}"
            interval = intervals.get(name)
            ends = f"{interval[0]:.2f}–{interval[1]:.2f}" if _is_interval(interval) else "not kept"
            cells.append([said, "" if score is None else f"{score:.3f}", ends])
        metric = profile.search.get("metric", "unknown")
        parts += [
            f"On the validation examples, which candidates were not scored on and among which the search chose (metric "
            f"`{metric}`):",
            _table(["allocation", "score", "95 % interval"], cells),
        ]
    return parts or ["None were measured."]


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: object) -> str:
    """Return a text as it can stand in a cell of a table."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(str(text).split()))
