"""Files that appear under their name only when they are complete."""

import errno
import fcntl
import glob
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
from etils import epath

from dmf.errors import InputError, RunError
from dmf.runtime.paths import user_path


def absolute(directory: epath.PathLike) -> epath.Path:
    """The absolute path of a directory, as Orbax needs it; buckets (gs://...) are absolute."""
    path = user_path(directory)
    return path if "://" in os.fspath(path) else path.resolve()


@contextmanager
def disk_errors(path: epath.Path) -> Iterator[None]:
    """Turns errors of a full or broken disk, from any library, into one line.

    Args:
      path: the file or directory that is written.

    Raises:
      RunError: the disk is full, or a file cannot be written or read.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (InputError, RunError, jax.errors.JaxRuntimeError)):
            raise
        if _is_full(error):
            raise RunError(f"no space left to write {path}; all files that were finished before "
                           "are complete; free some space and run the same command again"
                           ) from error
        if isinstance(error, OSError):
            filename = os.fspath(error.filename or path)
            if filename.startswith(os.fspath(path)):
                raise RunError(f"cannot write {path}: {error}") from error
            raise RunError(f"{filename}: {error.strerror}") from error
        raise


def _is_full(error: Exception) -> bool:
    """Whether an error says that the disk is full, rather than the memory."""
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    words = ("No space left", "RESOURCE_EXHAUSTED", "File too large")
    return "memory" not in text.lower() and any(word in text for word in words)


def refuse_link(path: epath.PathLike) -> None:
    """Refuses a symbolic link where something is to be written or removed by a default name.

    Raises:
      InputError: the path is a symbolic link.
    """
    if os.path.islink(path):
        raise InputError("output", path, f"it is a symbolic link to {os.readlink(path)}, and dmf "
                         "writes through no link there; remove it")


def partial_path(path: epath.Path) -> epath.Path:
    """A new hidden name beside a path, for what is to be renamed to it once it is complete.

    No two calls give the same name, and nobody can foretell it: processes that write one file at
    once do not disturb each other (the last one stays), and no link waits under the name.
    """
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.partial"


def sync(path: epath.Path) -> None:
    """Waits until a file or the list of a directory is on the disk; buckets (gs://...) pass.

    Without it, a file that was renamed may be empty after a power failure. File systems that do not
    know the operation pass too.
    """
    if "://" in os.fspath(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def is_regular_file(path: epath.Path) -> bool:
    """Whether there is a file at a path, and no directory, device, pipe or socket."""
    if "://" in os.fspath(path):
        return path.exists() and not path.is_dir()
    return os.path.isfile(path)


def check_no_device(path: epath.Path) -> None:
    """Checks that a file can be replaced: that no device, pipe or socket is at its path.

    Raises:
      InputError: one is; root would replace `/dev/null` by a file.
    """
    if path.exists() and not path.is_dir() and not is_regular_file(path):
        raise InputError(str(path), remedy="it is a device, a pipe or a socket, and not a file; "
                         "give the path of a file")


def check_output_file(field: str, path: epath.PathLike) -> None:
    """Checks, before the work that it is the output of, that a file can be written at a path.

    Raises:
      InputError: a folder, a device, a pipe or a socket is there.
    """
    path = user_path(path)
    if path.is_dir():
        raise InputError(field, path, "it is a folder; give the path of a file")
    check_no_device(path)


@contextmanager
def new_file(path: epath.Path) -> Iterator[epath.Path]:
    """A context that writes a file, which appears under its name at the end. Until then, and if the
    context raises, the old file stays complete. A symbolic link of that name is replaced; the file
    that it leads to stays as it is.

    Args:
      path: the file; its directory is created.

    Yields:
      A temporary path, of which nothing exists.

    Raises:
      InputError: a device, a pipe or a socket is at its path.
      RunError: the disk is full or cannot be written.
    """
    check_no_device(path)
    partial = partial_path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_text(path: epath.Path, text: str) -> None:
    """Writes a text file; after a crash or a power failure, the old file or the new one is there.

    Args:
      path: the file; its directory is created.
      text: the content.

    Raises:
      InputError: a device, a pipe or a socket is at the path.
      RunError: the disk is full or cannot be written.
    """
    with new_file(path) as partial:
        partial.write_text(text)


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a value as a JSON file, see `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON file that holds a dictionary, as `write_json` wrote it.

    Raises:
      RunError: the file is damaged.
    """
    if path.exists() and not is_regular_file(path):  # A pipe would be waited for.
        raise RunError(f"{path}: it is damaged (it is no file)")
    try:
        value = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: it is damaged ({error})") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: it is damaged (it holds no dictionary)")
    return value


def check_new_directory(directory: epath.PathLike) -> None:
    """Checks that a directory can be created at a path.

    Raises:
      InputError: something is there, and no empty directory.
    """
    directory = absolute(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise InputError("output", directory, "it exists and is not empty; choose another")


@contextmanager
def new_directory(directory: epath.PathLike) -> Iterator[epath.Path]:
    """A context that creates a directory, which appears under its name at the end.

    Args:
      directory: the directory, which must not exist or be empty.

    Yields:
      A temporary directory to write into; it is deleted if the context raises.

    Raises:
      InputError: the directory exists and is not empty.
      RunError: the disk is full or cannot be written.
    """
    check_new_directory(directory)
    directory = absolute(directory)
    with disk_errors(directory):
        _clear_leftovers(directory)
        partial = partial_path(directory)
        partial.mkdir(parents=True)
        with _locked(partial, required=False):
            try:
                yield partial
                if directory.exists():
                    directory.rmdir()
                partial.rename(directory)
            except BaseException:
                partial.rmtree()
                raise


def _clear_leftovers(directory: epath.Path) -> None:
    """Removes what killed processes left of a new directory. Living ones hold a lock on theirs;
    what cannot be locked or removed stays."""
    for left in directory.parent.glob(f".{glob.escape(directory.name)}.*.partial"):
        if left.is_dir() and not os.path.islink(left):
            with suppress(OSError), _locked(left, required=True):
                left.rmtree()


@contextmanager
def _locked(directory: epath.Path, *, required: bool) -> Iterator[None]:
    """Locks a directory while the context or the process lives; buckets have no locks.

    Args:
      directory: an existing directory.
      required: whether a disk without locks is an error; otherwise the directory stays unlocked.

    Raises:
      OSError: the disk has no locks, as some shared disks, and one is required.
      BlockingIOError: another process holds the lock.
    """
    if "://" in os.fspath(directory):
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        _lock(descriptor, required=required)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, required: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        if required:
            raise
