"""Find and read LongBench's files: in a folder, a file, the published archive, or the Hugging Face Hub."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from evolkv.errors import TaskError
from evolkv.tasks.base import decode_text, read_text
from evolkv.tasks.hub import hub_file

REPOSITORY = "THUDM/LongBench"
ARCHIVE = "data.zip"
#: Files that a message lists.
_MOST_NAMES = 8


def read_subset(name: str, path: str | None) -> tuple[str, str]:
    """Return the text of a subset's file, and where it is from, for messages.

    Args:
        name: the subset; its file is `NAME.jsonl`.
        path: a folder with that file, the file itself, or an archive (.zip) with that file in any of its folders.
            None: the archive that LongBench publishes on the Hugging Face Hub (114 MB), fetched once.

    Raises:
        TaskError: the file is missing, cannot be read or is not UTF-8, or the Hub has no answer.
    """
    if path is None:
        instead = f"give path= a folder with {name}.jsonl, or a copy of {ARCHIVE}"
        return _read_member(hub_file(REPOSITORY, ARCHIVE, "longbench", instead), name)
    if not path:
        raise TaskError("longbench: path is empty; give a folder or file, or leave it out")
    place = Path(os.path.expanduser(path))
    if place.is_dir():
        return _read_from_folder(place, name)
    if place.suffix.lower() == ".zip":
        return _read_member(path, name)
    return read_text(path), path


def _read_from_folder(folder: Path, name: str) -> tuple[str, str]:
    file = folder / f"{name}.jsonl"
    if not file.exists():
        names = sorted(other.name for other in folder.glob("*.jsonl"))
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        listing = ", ".join(names[:_MOST_NAMES]) + more or "no .jsonl files"
        raise TaskError(f"folder {folder} has no {file.name}; it has {listing}; give the folder of LongBench's files")
    return read_text(str(file)), str(file)


def _read_member(archive: str, name: str) -> tuple[str, str]:
    wanted = f"{name}.jsonl"
    try:
        with zipfile.ZipFile(Path(os.path.expanduser(archive))) as members:
            member = next((path for path in members.namelist() if PurePosixPath(path).name == wanted), None)
            if member is None:
                raise TaskError(f"{archive} has no {wanted}; give LongBench's {ARCHIVE} or a folder with {wanted}")
            data = members.read(member)
    except FileNotFoundError:
        raise TaskError(f"file {archive} does not exist; check the path") from None
    # What a damaged archive raises depends on where the damage is.
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise TaskError(f"{archive} cannot be read as an archive: {error}; fetch it again") from None
    source = f"{archive}:{member}"
    return decode_text(data, source), source
