"""Profiles on the Hugging Face Hub: one JSON file in a repository."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
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
        parts = re.fullmatch(rf"hf://?([^/@]+/[^/@]+)(?:@({_REFERENCE}|[^/]+))?(?:/(.+))?", text)
        if parts is None:
            raise ProfileError(f"{text!r} is no address; expected hf://org/name or hf://org/name@revision/{FILE_NAME}")
        revision = None if parts[2] is None else re.sub("%2F", "/", parts[2], flags=re.IGNORECASE)
        return cls(parts[1], parts[3] or FILE_NAME, revision)


def is_address(path: str | os.PathLike[str]) -> bool:
    """Return True if a path is the address of a file on the Hub."""
    # A Path makes one slash of two.
    return os.fspath(path).startswith(PREFIX[:-1])


def download(address: HubAddress, max_bytes: int, token: str | bool | None = None) -> Path:
    """Return the local path of a file of the Hub, downloaded or from the Hub's own cache, of at most so many bytes.

    The other arguments and the errors are those of `BudgetProfile.from_hub`.
    """
    from huggingface_hub import hf_hub_download

    at, name = address.revision, address.filename
    with _clear_errors(str(address)):
        facts = hf_hub_download(address.repo_id, name, revision=at, token=token, dry_run=True)
        if (facts.file_size or 0) > max_bytes:
            raise ProfileError(f"larger than {max_bytes >> 20} MiB; expected a profile, or the page of one")
        return Path(hf_hub_download(address.repo_id, name, revision=at, token=token))


def upload(
    address: HubAddress,
    files: Mapping[str, bytes],
    message: str,
    token: str | bool | None = None,
    private: bool | None = None,
    create_pr: bool = False,
) -> str:
    """Put files on the Hub in one commit; a repository that is missing is made. See `BudgetProfile.push_to_hub`.

    Args:
        address: the repository and the revision; its file name is only for messages.
        files: contents by path in the repository.
        message: of the commit.
        token: to write with.
        private: whether a repository that is made is private.
        create_pr: propose the files in a pull request.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    with _clear_errors(str(address)):
        api.create_repo(address.repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            address.repo_id,
            [CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message=message,
            revision=address.revision,
            create_pr=create_pr,
        )
    return str(commit.pr_url or commit.commit_url)


def read_text(address: HubAddress, max_bytes: int, token: str | bool | None = None) -> str | None:
    """Return the text of a file of the Hub, or None if the repository, the revision or the file is not there."""
    try:
        return download(address, max_bytes, token).read_text(encoding="utf-8", errors="replace")
    except _NotThereError:
        return None


class _NotThereError(ProfileError):
    pass


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
        raise _NotThereError(
            f"{place}: no such repository, or a private one; check the name, or log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise _NotThereError(f"{place}: the repository has no such revision; name a branch, tag or commit") from None
    except errors.LocalEntryNotFoundError:
        # Its message speaks of caches; what it means is that there is no connection.
        raise RunError(f"{place}: the Hub cannot be reached, and no copy of the file is at hand; try again") from None
    except errors.EntryNotFoundError:
        raise _NotThereError(
            f"{place}: the repository has no such file; add its name, as in hf://org/name/file.json"
        ) from None
    except ValueError as error:
        # Names that are none, of repositories and of files.
        raise ProfileError(f"{place}: {' '.join(str(error).split())}") from None
    except (errors.HTTPError, OSError) as error:
        raise RunError(f"{place}: the Hub says: {' '.join(str(error).split())}") from None
