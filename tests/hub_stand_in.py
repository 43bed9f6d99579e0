"""A stand-in for the Hugging Face hub and for the functions of its library that `dmf` calls."""

import contextlib
import dataclasses
import fnmatch
import hashlib
import pathlib
import types
from typing import Any

from huggingface_hub.repocard_data import EvalResult, ModelCardData


class EntryNotFoundError(Exception):
    """The repository has no such file."""


class LocalEntryNotFoundError(EntryNotFoundError, FileNotFoundError):
    """The file is not on the disk, and the network is away."""


class RepositoryNotFoundError(Exception):
    """There is no such repository, or the token may not see it."""


class GatedRepoError(RepositoryNotFoundError):
    """The owner has not granted access."""


class RevisionNotFoundError(Exception):
    """The repository has no such branch, tag or commit."""


class HfHubHTTPError(Exception):
    """The server answers with another status."""

    def __init__(self, status: int):
        super().__init__(f"status {status}")
        self.response = types.SimpleNamespace(status_code=status)


@dataclasses.dataclass
class CommitOperationAdd:
    path_in_repo: str
    path_or_fileobj: str


@dataclasses.dataclass
class CommitOperationDelete:
    path_in_repo: str


@dataclasses.dataclass
class Repository:
    """Commits, from the first to the newest: the files by path, and the message."""

    private: bool = False
    commits: list[tuple[dict[str, bytes], str]] = dataclasses.field(
        default_factory=lambda: [({".gitattributes": b""}, "initial commit")])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][0]

    @property
    def newest(self) -> str:
        return f"{len(self.commits):040x}"

    def commit(self, files: dict[str, bytes], message: str = "") -> str:
        self.commits.append((dict(files), message))
        return self.newest


class Hub:
    """The repositories, and the local cache of their files.

    Attributes:
      repositories: by name.
      token: of the user; None where nobody is logged in.
      failure: raised by every request; None where requests succeed.
      downloaded: paths of the files that were downloaded.
    """

    def __init__(self, cache: pathlib.Path):
        self.cache, self.token = cache, "hf_secret"
        self.repositories: dict[str, Repository] = {}
        self.failure: Exception | None = None
        self.downloaded: list[str] = []

    def module(self) -> types.SimpleNamespace:
        """What `import huggingface_hub` gives."""
        return types.SimpleNamespace(
            CommitOperationAdd=CommitOperationAdd, CommitOperationDelete=CommitOperationDelete,
            EvalResult=EvalResult, HfApi=lambda: self, ModelCardData=ModelCardData,
            get_token=lambda: self.token, hf_hub_download=self.hf_hub_download,
            snapshot_download=self.snapshot_download,
        )

    def _commit(self, name: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        if self.failure:
            raise self.failure
        if name not in self.repositories:
            raise RepositoryNotFoundError(name)
        repository = self.repositories[name]
        revision = repository.newest if revision in (None, "main") else revision
        with contextlib.suppress(ValueError):
            if 0 < int(revision, 16) <= len(repository.commits):
                return revision, repository.commits[int(revision, 16) - 1][0]
        raise RevisionNotFoundError(revision)

    def _cached(self, name: str, commit: str, path: str, content: bytes) -> pathlib.Path:
        """The file in the cache: a link to its content, as the library lays them out."""
        folder = self.cache / f"models--{name.replace('/', '--')}"
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        link = folder / "snapshots" / commit / path
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            blob.write_bytes(content)
            link.symlink_to(blob)
            self.downloaded.append(path)
        return link

    def hf_hub_download(self, name: str, path: str, *, revision: str | None = None) -> str:
        commit, files = self._commit(name, revision)
        if path not in files:
            raise EntryNotFoundError(path)
        return str(self._cached(name, commit, path, files[path]))

    def snapshot_download(
        self, name: str, *, revision: str | None = None, allow_patterns: list[str]
    ) -> str:
        commit, files = self._commit(name, revision)
        for path, content in files.items():
            if any(fnmatch.fnmatch(path, pattern) for pattern in allow_patterns):
                self._cached(name, commit, path, content)
        return str(self.cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit)

    def list_repo_files(self, name: str, *, revision: str | None = None) -> list[str]:
        return list(self._commit(name, revision)[1])

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> None:
        if self.failure:
            raise self.failure
        assert exist_ok
        self.repositories.setdefault(name, Repository(private=bool(private)))

    def model_info(self, name: str) -> types.SimpleNamespace:
        commit, files = self._commit(name, None)
        siblings = [types.SimpleNamespace(rfilename=path) for path in files]
        return types.SimpleNamespace(sha=commit, private=self.repositories[name].private,
                                     siblings=siblings)

    def create_commit(
        self, name: str, operations: list[Any], *, commit_message: str, parent_commit: str
    ) -> types.SimpleNamespace:
        if self.failure:
            raise self.failure
        repository = self.repositories[name]
        assert parent_commit == repository.newest
        files = dict(repository.files)
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                del files[operation.path_in_repo]
            else:
                content = pathlib.Path(operation.path_or_fileobj).read_bytes()
                files[operation.path_in_repo] = content
        commit = repository.commit(files, commit_message)
        return types.SimpleNamespace(commit_url=f"https://hub/{name}/commit/{commit}")
