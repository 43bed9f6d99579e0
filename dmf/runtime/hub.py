"""Files of the Hugging Face hub, of which `huggingface_hub` keeps copies on the local disk."""

import importlib
from collections.abc import Collection
from typing import Any

from etils import epath

from dmf.errors import InputError, brief

# What the address of a file or a repository of the hub begins with.
HUB = "hf:"


def download(source: str, repository: str, file: str, *, needed: bool = True) -> epath.Path | None:
    """The local copy of a file of a repository of models.

    Args:
      source: the address, as the user gave it.
      repository: OWNER/REPO.
      file: path of the file in the repository.
      needed: whether it is an error where the repository has no such file.

    Returns:
      The path of the copy; None for a file that is not there, and not needed.

    Raises:
      InputError: huggingface_hub is not installed, or the file cannot be downloaded.
    """
    hub = _library(source)
    try:
        return epath.Path(hub.hf_hub_download(repository, file))
    except Exception as error:
        if not needed and isinstance(error, hub.utils.EntryNotFoundError):
            return None
        raise _unreachable(source, error, "a file") from None


def list_dataset(source: str, repository: str) -> list[str]:
    """The paths of all files of a repository of a dataset.

    Args:
      source: the address, as the user gave it.
      repository: OWNER/DATASET.

    Raises:
      InputError: huggingface_hub is not installed, or there is no such dataset.
    """
    hub = _library(source)
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
    hub = _library(source)
    try:
        return epath.Path(hub.snapshot_download(
            repository, repo_type="dataset", allow_patterns=sorted(files)
        ))
    except Exception as error:
        raise _unreachable(source, error, "a folder") from None


def _library(source: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise InputError(source, remedy="it needs huggingface_hub (pip install it)") from None


def _unreachable(source: str, error: Exception, kind: str) -> InputError:
    return InputError(
        source,
        remedy=f"it cannot be downloaded ({type(error).__name__}: {brief(error)}); without a "
               f"network, give {kind} that was downloaded elsewhere",
    )
