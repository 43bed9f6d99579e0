"""Files that appear under their name when they are whole, or not at all."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath

from dmf.typing import InputError, RunError


def absolute(directory: epath.PathLike) -> epath.Path:
    """The directory as Orbax wants it; buckets (gs://...) are absolute already."""
    path = epath.Path(directory)
    return path if "://" in os.fspath(path) else path.expanduser().resolve()


@contextmanager
def disk_errors(path: epath.Path) -> Iterator[None]:
    """Turns what a full or broken disk raises, in whatever library, into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (InputError, RunError, jax.errors.JaxRuntimeError)):
            raise
        if _is_full(error):
            raise RunError(f"no space left to write {path}: what was finished before is whole; "
                           "free some space and run the same command again") from error
        if isinstance(error, OSError):
            named = os.fspath(error.filename or path)
            if named.startswith(os.fspath(path)):
                raise RunError(f"cannot write {path}: {error}") from error
            raise RunError(f"{named}: {error.strerror}") from error
        raise


def _is_full(error: Exception) -> bool:
    """Whether a disk has no room; memory, of which libraries speak alike, is another matter."""
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    words = ("No space left", "RESOURCE_EXHAUSTED", "File too large")
    return "memory" not in text.lower() and any(word in text for word in words)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file so that it is either the old one or the whole new one.

    Raises:
      RunError: the disk is full or cannot be written.
    """
    partial = path.parent / f".{path.name}.partial"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)


def write_json(path: epath.Path, value: Any) -> None:
    """Writes JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: epath.Path) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
      RunError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path}: it is damaged ({error})") from None


@contextmanager
def new_directory(directory: epath.PathLike) -> Iterator[epath.Path]:
    """A directory to write into that appears under its name when it is whole, or not at all.

    Raises:
      InputError: the directory exists and is not empty.
      RunError: the disk is full or cannot be written.
    """
    directory = absolute(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise InputError(f"output={directory}: it exists and is not empty; choose another")
    partial = directory.parent / f".{directory.name}.partial"
    with disk_errors(directory):
        if partial.exists():
            partial.rmtree()
        partial.mkdir(parents=True)
        try:
            yield partial
            if directory.exists():
                directory.rmdir()
            partial.rename(directory)
        except BaseException:
            partial.rmtree()
            raise
