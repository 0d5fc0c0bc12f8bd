"""What a report is made of: result files and studies, recognised by their content and checked."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolkv.errors import UsageError
from evolkv.registry import unknown_name
from evolkv.report.records import Curve, Profile, Results, Row, Search, checked
from evolkv.report.studies import study_searches

#: A search of ten thousand candidates on a large model stays below it: a larger file is something else.
MAX_FILE_BYTES = 512 * 2**20
_SQLITE = b"SQLite format 3\0"

_KINDS: dict[str, type[Search | Results | Profile | Curve]] = {
    "evolkv.search/1": Search,
    "evolkv.results/1": Results,
    "evolkv.profile/1": Profile,
    "evolkv.curve/1": Curve,
}


@dataclass
class Sources:
    """Everything that a report is made of.

    Args:
        searches: of all files, also those within curves.
        rows: of all results.
        profiles: also those that curves name.
        curves: without their searches' profiles.
        names: where it all came from.
    """

    searches: list[Search] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, found: Search | Results | Profile | Curve, origin: str) -> None:
        """Put a file's content where it belongs."""
        if isinstance(found, Search):
            self._add_search(found.model_copy(update={"origin": origin}))
        elif isinstance(found, Results):
            self.rows += found.rows
        elif isinstance(found, Profile):
            self.profiles.append(found)
        else:
            self.curves.append(found)
            for search in found.searches:
                self._add_search(search.model_copy(update={"origin": origin}))

    def add_study(self, storage: str, name: str | None) -> None:
        """Take the searches of a study."""
        label, searches = study_searches(storage, name)
        self.names.append(label)
        for search in searches:
            self._add_search(search)

    def _add_search(self, found: Search) -> None:
        """Take a search once, though it may be recorded in a study, a result and a curve; what was chosen wins."""
        for i, known in enumerate(self.searches):
            if found.history and found.history == known.history:
                self.searches[i] = known if known.validation else found
                return
        self.searches.append(found)


def read_sources(inputs: Iterable[str | os.PathLike[str]], study: str | None = None) -> Sources:
    """Read result files, folders of result files, and studies.

    Args:
        inputs: paths of search results, results, profiles and curves (JSON); folders that hold such files; SQLite or
            journal files, or storage URLs, that hold a study. What a file is, its content says.
        study: name of the study, where a storage holds several.

    Raises:
        UsageError: something that cannot be used, named with what is wrong about it; or a `study` without a storage.
    """
    sources = Sources()
    storages = 0
    seen = set()
    for path in inputs:
        text = os.fspath(path)
        if "://" in text:
            storages += 1
            sources.add_study(text, study)
            continue
        for file in _json_files(Path(text)) if Path(text).is_dir() else [Path(text)]:
            if (real := os.path.realpath(file)) in seen:
                continue
            seen.add(real)
            if _is_study(file):
                storages += 1
                sources.add_study(str(file), study)
            else:
                data = _read_json(file)
                if Path(text).is_dir() and _format(data) not in _KINDS:
                    continue
                found = _checked(file, data)
                sources.add(found, str(file))
                sources.names.append(str(file))
                if isinstance(found, Curve):
                    _add_profiles(sources, file, found, seen)
        if Path(text).is_dir() and not any(Path(name).parent == Path(text) for name in sources.names):
            raise UsageError(f"{text}: no results in this folder; expected files made by evolkv, such as search.json")
    if study is not None and not storages:
        raise UsageError(f"--study is {study!r}, but none of the inputs is a study; give its file or storage URL, too")
    return sources


def _json_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".json" and path.is_file())


def _is_study(path: Path) -> bool:
    """Whether a file is an SQLite database, or a journal: one JSON operation per line."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{path}: not a regular file; expected results made by evolkv")
        with path.open("rb") as file:
            start = file.read(4096)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; expected results, a profile or a study made by evolkv") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    first = start.split(b"\n")[0]
    return start.startswith(_SQLITE) or (first.startswith(b"{") and b'"op_code"' in first)


def _add_profiles(sources: Sources, curve: Path, found: Curve, seen: set[str]) -> None:
    """Read the profiles that a curve names, of those that lie beside it or below; a file may name any path."""
    folder = Path(os.path.realpath(curve.parent))
    for name in {point.profile: None for point in found.points if point.profile}:
        for path in (folder / name, folder / Path(name).name):
            real = Path(os.path.realpath(path))
            if real.is_relative_to(folder) and real.is_file() and str(real) not in seen:
                seen.add(str(real))
                profile = _checked(real, _read_json(real))
                if not isinstance(profile, Profile):
                    raise UsageError(f"{real}: not a profile, but {curve} names it as one")
                sources.add(profile, str(real))
                break


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB; expected results made by evolkv")
        return json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_reject_constant)
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not text; expected JSON, or an SQLite file with a study") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: not JSON that can be read: {error}") from None


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _format(data: Any) -> str | None:
    found = data.get("format") if isinstance(data, dict) else None
    return found if isinstance(found, str) else None


def _checked(path: Path, data: Any) -> Search | Results | Profile | Curve:
    found = _format(data)
    if found is None:
        raise UsageError(f'{path}: not made by evolkv: expected a JSON object with "format", such as "evolkv.search/1"')
    if found not in _KINDS:
        raise UsageError(f"{path}: {unknown_name('format', found[:80], _KINDS)}")
    return checked(_KINDS[found], path, data)
