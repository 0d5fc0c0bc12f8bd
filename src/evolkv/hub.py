"""Profiles on the Hugging Face Hub: one JSON file in a repository."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from evolkv.errors import EvolKVError, ProfileError, RunError

PREFIX = "hf://"
FILE_NAME = "profile.json"
# Revisions that the Hub makes, for a pull request among others.
_REFERENCE = r"refs/(?:pr|convert)/[^/]+"


@dataclass(frozen=True)
class HubAddress:
    """The address of a file on the Hub, written ``hf://org/name@revision/folder/file``.

    Args:
        repo_id: ``org/name`` of a model repository.
        filename: the file's path in it.
        revision: branch, tag or commit, or ``refs/pr/1`` for a pull request; None for the main branch. In a text the
            slashes of other names are written ``%2F``.
    """

    repo_id: str
    filename: str = FILE_NAME
    revision: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        if self.revision is not None and not re.fullmatch(_REFERENCE, self.revision):
            revision = revision.replace("/", "%2F")
        return f"{PREFIX}{self.repo_id}{revision}/{self.filename}"

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """Parse an address; without a file name it is that of `FILE_NAME`.

        Raises:
            ProfileError: for a text that is no address.
        """
        found = re.fullmatch(rf"hf://?([^/@]+/[^/@]+)(?:@({_REFERENCE}|[^/]+))?(?:/(.+))?", text)
        if found is None:
            raise ProfileError(f"{text!r} is no address; expected hf://org/name or hf://org/name@revision/{FILE_NAME}")
        revision = None if found[2] is None else re.sub("%2F", "/", found[2], flags=re.IGNORECASE)
        return cls(found[1], found[3] or FILE_NAME, revision)


def is_address(path: str | os.PathLike[str]) -> bool:
    """Return True if a path is the address of a file on the Hub."""
    # A Path makes one slash of two.
    return os.fspath(path).startswith(PREFIX[:-1])


def download(address: HubAddress, max_bytes: int, token: str | bool | None = None) -> Path:
    """Download a file of the Hub, or find it in the Hub's own cache, and return its local path.

    Args:
        address: which file.
        max_bytes: a larger file is refused before any of it is read.
        token: what `huggingface_hub` takes; None for that of the login.

    Raises:
        ProfileError: if there is no such repository, revision or file, or it is too large.
        RunError: if the Hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    at, name = address.revision, address.filename
    with _clear_errors(str(address)):
        found = hf_hub_download(address.repo_id, name, revision=at, token=token, dry_run=True)
        if (found.file_size or 0) > max_bytes:
            raise ProfileError(f"not a profile: larger than {max_bytes >> 20} MiB")
        return Path(hf_hub_download(address.repo_id, name, revision=at, token=token))


def upload(
    address: HubAddress,
    content: bytes,
    message: str,
    token: str | bool | None = None,
    private: bool | None = None,
    create_pr: bool = False,
) -> str:
    """Put a file on the Hub; a repository that is missing is made.

    Args:
        address: where to.
        content: the file.
        message: of the commit.
        token: as for `download`; it must allow writing.
        private: whether a repository that is made is private; None for the owner's default.
        create_pr: propose the file in a pull request rather than commit it.

    Returns:
        The commit's address on the web, or that of the pull request.

    Raises:
        ProfileError: if the repository's name is not valid, or its revision does not exist.
        RunError: if the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _clear_errors(str(address)):
        api.create_repo(address.repo_id, private=private, exist_ok=True)
        commit = api.upload_file(
            path_or_fileobj=content,
            path_in_repo=address.filename,
            repo_id=address.repo_id,
            revision=address.revision,
            commit_message=message,
            create_pr=create_pr,
        )
    return str(commit.pr_url or commit.commit_url)


@contextmanager
def _clear_errors(place: str) -> Iterator[None]:
    """Report in one line what went wrong with the Hub."""
    from huggingface_hub import errors

    try:
        yield
    except EvolKVError as error:
        raise type(error)(f"{place}: {error}") from None
    except errors.GatedRepoError:
        raise ProfileError(f"{place}: access must be asked for on the repository's page; then log in with it") from None
    except errors.RepositoryNotFoundError:
        raise ProfileError(
            f"{place}: no such repository, or a private one; check the name, or log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise ProfileError(f"{place}: the repository has no such revision; name a branch, tag or commit") from None
    except errors.LocalEntryNotFoundError:
        # Its message speaks of caches; what it means is that there is no connection.
        raise RunError(f"{place}: the Hub cannot be reached, and no copy of the file is at hand; try again") from None
    except errors.EntryNotFoundError:
        raise ProfileError(
            f"{place}: the repository has no such file; add its name, as in hf://org/name/file.json"
        ) from None
    except ValueError as error:
        # Names that are none, of repositories and of files.
        raise ProfileError(f"{place}: {' '.join(str(error).split())}") from None
    except (errors.HTTPError, OSError) as error:
        raise RunError(f"{place}: the Hub says: {' '.join(str(error).split())}") from None
