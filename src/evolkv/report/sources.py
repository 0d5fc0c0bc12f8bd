"""Input of a report: result files and studies, recognised by their content and checked."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolkv.errors import UsageError
from evolkv.json_files import read_json
from evolkv.profile_file import ProfileFile
from evolkv.registry import unknown_name
from evolkv.report.schemas import Curve, Results, Row, Search
from evolkv.report.studies import study_searches
from evolkv.report.words import counted
from evolkv.schemas import RESULTS_FORMAT, checked

if TYPE_CHECKING:
    from evolkv.evaluation.records import Records

#: A search of ten thousand candidates on a large model stays below it: a larger file is something else.
MAX_FILE_BYTES = 512 * 2**20
_SQLITE = b"SQLite format 3\0"
_SELECTORS = resources.files("evolkv").joinpath("selectors")
_RECORDS = b'{"format": "evolkv.records/'

_KINDS: dict[str, type[Search | Results | ProfileFile | Curve]] = {
    "evolkv.search/1": Search,
    RESULTS_FORMAT: Results,
    "evolkv.profile/1": ProfileFile,
    "evolkv.curve/1": Curve,
}


@dataclass
class Sources:
    """Everything that a report is made of.

    Args:
        searches: of all files, also those within curves.
        rows: of all results, also those that follow from records.
        profiles: also those that curves name.
        profile_paths: where these lie, in the same order.
        curves: without their searches' profiles.
        records: of every example, as read.
        names: where it all came from.
        files: what was read, by its real path.
        studies: number of studies among it.
    """

    searches: list[Search] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    profiles: list[ProfileFile] = field(default_factory=list)
    profile_paths: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    records: list[Records] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    studies: int = 0
    #: Rows of evaluations that were interrupted, with the file that they are from.
    _partial: list[tuple[str, Sequence[Row]]] = field(default_factory=list)

    def add(self, found: Search | Results | ProfileFile | Curve, origin: str) -> None:
        """Put a file's content where it belongs."""
        if isinstance(found, Search):
            self._add_search(found.model_copy(update={"origin": origin}))
        elif isinstance(found, Results):
            if found.interrupted:
                self._partial.append((origin, found.rows))
            else:
                self._add_rows(found.rows)
        elif isinstance(found, ProfileFile):
            self.profiles.append(found)
            self.profile_paths.append(origin)
        else:
            self.curves.append(found)
            for search in found.searches:
                self._add_search(search.model_copy(update={"origin": origin}))

    def add_study(self, storage: str, name: str | None) -> None:
        """Take the searches of a study."""
        label, file, searches = study_searches(storage, name)
        self.names.append(label)
        if file is not None:
            self.files.add(os.path.realpath(file))
        self.studies += 1
        for search in searches:
            self._add_search(search)

    def add_records(self, path: Path) -> None:
        """Take a file of records, and the rows that follow from it."""
        # Takes seconds to import, and no other input needs it.
        from evolkv.evaluation.records import read_records
        from evolkv.evaluation.summary import summarise

        found = read_records(path)
        rows = summarise(found)
        if not rows:
            raise UsageError(f"{path}: no example is finished yet; try again when one is")
        self.records.append(found)
        self._add_rows(checked(Results, path, {"rows": rows}).rows)
        self.names.append(str(path))

    def _add_rows(self, rows: Iterable[Row]) -> None:
        """Take rows once, though they may be in results and follow from records, too."""
        self.rows += [row for row in rows if row not in self.rows]

    def finish(self) -> None:
        """Take the rows of interrupted evaluations that have not gone on since, by what else was read."""
        whole = {_without_numbers(row): row.n for row in self.rows}
        for origin, rows in self._partial:
            left = [row for row in rows if whole.get(_without_numbers(row), 0) < row.n]
            self._add_rows(left)
            if left:
                self.names[self.names.index(origin)] = f"{origin} (interrupted after {counted(left[0].n, 'example')})"
        self._partial = []

    def _add_search(self, found: Search) -> None:
        """Take a search once, though it may be recorded in a study, a result and a curve; what was chosen wins."""
        for i, known in enumerate(self.searches):
            if found.history and found.history == known.history:
                # A study does not know the time.
                seconds = known.seconds or found.seconds
                self.searches[i] = (known if known.validation else found).model_copy(update={"seconds": seconds})
                return
        self.searches.append(found)


def read_sources(inputs: Iterable[str | os.PathLike[str]], study: str | None = None) -> Sources:
    """Read result files, folders of result files, and studies.

    Args:
        inputs: paths of search results, results, profiles and curves (JSON), and of records (JSON Lines); folders that
            hold such files; SQLite or journal files, or storage URLs, that hold a study. What a file is, its content
            says.
        study: name of the study, where a storage holds several.

    Raises:
        UsageError: something that cannot be used, named with what is wrong about it; or a `study` without a storage.
    """
    sources = Sources()
    for given in inputs:
        path = os.fspath(given)
        if "://" in path:
            sources.add_study(path, study)
        elif not os.path.isdir(path):
            _add_file(sources, Path(path), study)
        else:
            # Others' files may lie there, too.
            files = [file for file in sorted(Path(path).iterdir()) if file.is_file() and _is_ours(file)]
            if not files:
                raise UsageError(f"{path}: no results in this folder; expected files of evolkv, such as search.json")
            for file in files:
                _add_file(sources, file, study)
    if study is not None and not sources.studies:
        raise UsageError(f"--study is {study!r}, but none of the inputs is a study; give its file or storage URL, too")
    sources.finish()
    return sources


def _add_file(sources: Sources, path: Path, study: str | None) -> None:
    real = os.path.realpath(path)
    if real in sources.files:
        return
    sources.files.add(real)
    start = _start(path)
    if start.startswith(_SQLITE) or (start.startswith(b"{") and b'"op_code"' in start.split(b"\n")[0]):
        sources.add_study(str(path), study)
        return
    if start.startswith(_RECORDS):
        sources.add_records(path)
        return
    found = _checked(path, _read_json(path))
    sources.add(found, str(path))
    sources.names.append(str(path))
    if isinstance(found, Curve):
        _add_profiles(sources, path, found)


def _without_numbers(row: Row) -> str:
    """Return what tells rows apart: all of a row but its numbers."""
    sizes = {"kv_bytes", "read_bytes", "resident_bytes", "companion_bytes", "mean_budget"}
    return row.model_dump_json(exclude={"n", "score", "ci95", *sizes})


def _is_ours(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix == ".json":
        try:
            return (_format(_read_json(path)) or "").startswith("evolkv.")
        except UsageError:
            # Of others' files only those count that can be read; of ours none may be left out for being damaged.
            if b'"evolkv.' in _start(path):
                raise
            return False
    return suffix == ".jsonl" and _start(path).startswith(_RECORDS)


def _start(path: Path) -> bytes:
    """The first bytes of a file: an SQLite database has its own, a journal has an operation on each line."""
    try:
        # Others may have no end, or wait for a writer.
        regular = stat.S_ISREG(path.stat().st_mode)
        if regular:
            with path.open("rb") as file:
                start = file.read(4096)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; expected results, a profile or a study made by evolkv") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not regular:
        raise UsageError(f"{path}: not a regular file; expected results made by evolkv")
    return start


def _add_profiles(sources: Sources, curve: Path, found: Curve) -> None:
    """Read the profiles that a curve names, of those that lie beside it or below; a file may name any path."""
    folder = Path(os.path.realpath(curve.parent))
    for name in {point.profile: None for point in found.points if point.profile}:
        for path in (folder / name, folder / Path(name).name):
            real = Path(os.path.realpath(path))
            if real.is_relative_to(folder) and real.is_file() and str(real) not in sources.files:
                sources.files.add(str(real))
                profile = _checked(real, _read_json(real))
                if not isinstance(profile, ProfileFile):
                    raise UsageError(f"{real}: not a profile, but {curve} names it as one")
                # As the user's shell finds it.
                sources.add(profile, os.path.relpath(real))
                break


def _read_json(path: Path) -> Any:
    try:
        return read_json(path, MAX_FILE_BYTES, "results made by evolkv")
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _format(data: Any) -> str | None:
    found = data.get("format") if isinstance(data, dict) else None
    return found if isinstance(found, str) else None


def _checked(path: Path, data: Any) -> Search | Results | ProfileFile | Curve:
    found = _format(data)
    if found is None:
        raise UsageError(f'{path}: not made by evolkv: expected a JSON object with "format", such as "evolkv.search/1"')
    if found not in _KINDS:
        raise UsageError(f"{path}: {unknown_name('format', found[:80], _KINDS)}")
    content = checked(_KINDS[found], path, data)
    profile = content if isinstance(content, ProfileFile) else getattr(content, "profile", None)
    if profile is not None:
        _check_selector(path, profile.selector)
    return content


def _check_selector(path: Path, selector: Mapping[str, Any]) -> None:
    name = selector.get("name")
    # To ask the selectors takes seconds. EvolKV's own are files of their names.
    if isinstance(name, str) and name.isidentifier() and _SELECTORS.joinpath(f"{name}.py").is_file():
        return
    from evolkv.selectors import get_selector

    try:
        get_selector(selector)
    except UsageError as error:
        raise UsageError(f"{path}: selector: {error}") from None
