"""Files of the Hugging Face hub, of which `huggingface_hub` keeps copies on the local disk.

The library is an extra: it is imported when it is used. Its errors are told apart by the names of
their classes, which have moved between its modules.
"""

import importlib
import os
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from etils import epath

from dmf.errors import InputError, brief

# What the address of a file or a repository of the hub begins with.
HUB = "hf:"
_ADDRESS = re.compile(r"hf:([^/@\s]+/[^/@\s]+)(?:@([^/@\s]+))?(?:/([^/].*))?")


class Address(NamedTuple):
    """A repository of models, or one of its files.

    Attributes:
      repository: OWNER/REPO.
      revision: a branch, a tag or a commit; None for the branch `main`.
      file: path of the file in the repository; empty for the whole repository.
    """

    repository: str
    revision: str | None
    file: str


def is_address(source: epath.PathLike) -> bool:
    """Whether a path is an address of the hub, beside which nothing can be written.

    >>> is_address("hf:someone/maps"), is_address("./hf:someone/maps")
    (True, False)
    """
    return os.fspath(source).startswith(HUB)


def address(source: str) -> Address | None:
    """What an address of the hub says; None for another text, or an incomplete address.

    >>> address("hf:someone/maps@v1/dmf.pt")
    Address(repository='someone/maps', revision='v1', file='dmf.pt')
    >>> address("hf:someone/maps").file, address("hf:someone"), address("runs/maps")
    ('', None, None)

    Args:
      source: hf:OWNER/REPO or hf:OWNER/REPO/FILE, with @REVISION behind REPO or without.
    """
    found = _ADDRESS.fullmatch(source)
    return Address(found[1], found[2], found[3] or "") if found else None


def download(
    source: str, repository: str, file: str, *, revision: str | None = None, needed: bool = True
) -> epath.Path | None:
    """The local copy of a file of a repository of models.

    Args:
      source: the address, as the user gave it.
      repository: OWNER/REPO.
      file: path of the file in the repository.
      revision: a branch, a tag or a commit; None for the branch `main`.
      needed: whether it is an error where the repository has no such file.

    Returns:
      The path of the copy; None for a file that is not there, and not needed.

    Raises:
      InputError: huggingface_hub is not installed, or the file cannot be downloaded.
    """
    hub = library(source)
    try:
        return epath.Path(hub.hf_hub_download(repository, file, revision=revision))
    except Exception as error:
        if not needed and is_kind(error, "EntryNotFoundError"):
            return None
        raise _unreachable(source, error, "a file") from None


def download_folder(
    source: str, wanted: Address, file: str, patterns: Collection[str]
) -> epath.Path | None:
    """The local copy of some files of one commit of a repository of models.

    A download that was interrupted is resumed. Without a network the copy of an earlier download is
    returned.

    Args:
      source: the address, as the user gave it.
      wanted: the same address; its file is ignored.
      file: a file at the top of the repository, which is downloaded first.
      patterns: patterns of the paths to download.

    Returns:
      The folder, whose name is the commit; None where the repository has no such file.

    Raises:
      InputError: huggingface_hub is not installed, or the files cannot be downloaded.
    """
    hub, repository = library(source), wanted.repository
    try:
        first = epath.Path(hub.hf_hub_download(repository, file, revision=wanted.revision))
        # One commit, even if somebody pushes another one meanwhile.
        return epath.Path(hub.snapshot_download(
            repository, revision=first.parent.name, allow_patterns=sorted(patterns)
        ))
    except Exception as error:
        if is_kind(error, "EntryNotFoundError") and not is_kind(error, "LocalEntryNotFoundError"):
            return None
        raise _unreachable(source, error, "a folder") from None


def list_files(source: str, wanted: Address) -> list[str]:
    """The paths of all files of a repository of models.

    Args:
      source: the address, as the user gave it.
      wanted: the same address; its file is ignored.

    Raises:
      InputError: huggingface_hub is not installed, or the list cannot be downloaded.
    """
    hub = library(source)
    try:
        return list(hub.HfApi().list_repo_files(wanted.repository, revision=wanted.revision))
    except Exception as error:
        raise _unreachable(source, error, "a folder") from None


def list_dataset(source: str, repository: str) -> list[str]:
    """The paths of all files of a repository of a dataset.

    Args:
      source: the address, as the user gave it.
      repository: OWNER/DATASET.

    Raises:
      InputError: huggingface_hub is not installed, or there is no such dataset.
    """
    hub = library(source)
    try:
        return list(hub.HfApi().list_repo_files(repository, repo_type="dataset"))
    except Exception as error:
        raise _unreachable(source, error, "a folder") from None


def download_dataset(source: str, repository: str, files: Collection[str]) -> epath.Path:
    """The local folder of a dataset, with copies of some of its files; what is there stays.

    Args:
      source: the address, as the user gave it.
      repository: OWNER/DATASET.
      files: paths of the files in the repository.

    Raises:
      InputError: huggingface_hub is not installed, or a file cannot be downloaded.
    """
    hub = library(source)
    try:
        return epath.Path(hub.snapshot_download(
            repository, repo_type="dataset", allow_patterns=sorted(files)
        ))
    except Exception as error:
        raise _unreachable(source, error, "a folder") from None


def library(source: str) -> Any:
    """The module huggingface_hub.

    Raises:
      InputError: it is not installed; its field is `source`.
    """
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise InputError(source, remedy="it needs huggingface_hub (pip install it)") from None


def is_kind(error: BaseException, name: str) -> bool:
    """Whether an error is of a class of huggingface_hub, or of one that derives from it.

    >>> is_kind(FileNotFoundError(), "OSError")
    True
    """
    return any(kind.__name__ == name for kind in type(error).__mro__)


def explanation(error: BaseException) -> str:
    """What the hub refuses, and what to do; empty for errors of the network and others."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if is_kind(error, "GatedRepoError"):
        return ("its owner grants access on request: ask for it on the page of the repository, and "
                "log in with hf auth login")
    if is_kind(error, "RepositoryNotFoundError"):
        return ("there is no such repository, or it is private; check the name, or log in with hf "
                "auth login")
    if is_kind(error, "RevisionNotFoundError"):
        return "the repository has no such revision; give a branch, a tag or a commit"
    if status == 401:
        return "the token is not valid; log in with hf auth login, or set HF_TOKEN"
    if status == 403:
        return "the token gives no access to it; use a token of its owner with that permission"
    return ""


def _unreachable(source: str, error: Exception, kind: str) -> InputError:
    return InputError(source, remedy=explanation(error) or (
        f"it cannot be downloaded ({type(error).__name__}: {brief(error)}); without a network, "
        f"give {kind} that was downloaded elsewhere"
    ))
