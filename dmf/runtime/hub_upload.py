"""Uploads of a folder to a repository of models on the Hugging Face hub.

All files are one commit: whoever downloads the repository gets those of before or all new ones.
"""

import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dmf.errors import InputError, RunError, brief
from dmf.runtime import hub

_FIELD = "push"


class Repository(NamedTuple):
    """A repository that the token may write to.

    Attributes:
      name: OWNER/REPO.
      commit: the newest commit of the branch `main`.
      files: paths of the files of that commit.
    """

    name: str
    commit: str
    files: tuple[str, ...]


def check_ready(name: str) -> None:
    """Checks, without a network, that uploads are possible.

    Args:
      name: OWNER/REPO, for the message.

    Raises:
      InputError: huggingface_hub is not installed, or there is no token.
    """
    try:
        library = hub.library(name)
    except InputError as error:
        raise InputError(_FIELD, name, error.remedy) from None
    with _explained(name):
        token = library.get_token()
    if not token:
        raise InputError(_FIELD, name, "there is no token; log in with hf auth login, or set "
                         "HF_TOKEN")


def open_repository(name: str, *, private: bool) -> Repository:
    """The repository, which is made if there is none.

    Args:
      name: OWNER/REPO.
      private: whether it must be private; otherwise it is as the hub has it or makes it.

    Raises:
      InputError: the token gives no access to it, or it is public and must be private.
      RunError: the hub cannot be reached.
    """
    api = hub.library(name).HfApi()
    with _explained(name):
        api.create_repo(name, private=private or None, exist_ok=True)
        found = api.model_info(name)
    if private and not found.private:
        raise InputError("private", True, f"{name} is public; make it private in its settings on "
                         "the hub first")
    return Repository(name, found.sha, tuple(file.rfilename for file in found.siblings or ()))


def upload(
    folder: pathlib.Path, repository: Repository, *, message: str, replaces: Callable[[str], bool]
) -> str:
    """Uploads the files of a folder as one commit; returns its address on the web.

    Args:
      folder: a local folder.
      repository: as `open_repository` returned it.
      message: message of the commit.
      replaces: whether a file of the repository, by its path, is deleted if the folder lacks it.

    Raises:
      InputError: the hub refuses the files.
      RunError: the hub cannot be reached, or somebody else pushed meanwhile; nothing is changed.
    """
    library = hub.library(repository.name)
    paths = {path.relative_to(folder).as_posix(): path
             for path in sorted(folder.rglob("*")) if path.is_file()}
    added = [library.CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
             for name, path in paths.items()]
    deleted = [library.CommitOperationDelete(path_in_repo=name) for name in repository.files
               if name not in paths and replaces(name)]
    with _explained(repository.name):
        return str(library.HfApi().create_commit(
            repository.name, [*added, *deleted], commit_message=message,
            parent_commit=repository.commit,
        ).commit_url)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns errors of the library into one line.

    Raises:
      InputError: the hub refuses what it is asked for.
      RunError: it cannot be reached.
    """
    try:
        yield
    except Exception as error:
        if remedy := hub.explanation(error):
            raise InputError(_FIELD, name, remedy) from None
        reason = f"{type(error).__name__}: {brief(error)}"
        if isinstance(error, ValueError):
            raise InputError(_FIELD, name, f"the hub refuses it ({reason})") from None
        raise RunError(f"{_FIELD}={name}: the hub cannot be reached, or failed ({reason}); nothing "
                       "was changed there, run the same command again") from None
