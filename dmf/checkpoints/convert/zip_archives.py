"""Zip archives of checkpoints, which are unpacked into a temporary folder while they are read.

Nothing is written outside of this folder, and no more than an archive of its size can hold of
parameters.
"""

import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

from dmf.errors import InputError, brief

SUFFIX = ".zip"
# The files of an archive may be this many times as large as the archive, beyond the first bytes.
MAX_COMPRESSION = 100
FREE_BYTES = 2**26
MAX_ENTRIES = 100_000
_MAX_SHOWN = 80
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@contextmanager
def unpacked(path: epath.Path) -> Iterator[epath.Path]:
    """A temporary folder with the files of an archive, which is removed at the end.

    Args:
      path: the archive.

    Raises:
      InputError: the archive is damaged, claims absurd sizes, or has names that lead elsewhere; or
        the disk has no room.
    """
    with tempfile.TemporaryDirectory(prefix="dmf_convert_") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                _check(archive.infolist(), os.stat(path).st_size, folder)
                for entry in archive.infolist():
                    _extract(archive, entry, folder)
        except InputError:
            raise
        except Exception as error:  # what zipfile raises is not documented
            raise InputError("", remedy="it cannot be unpacked; it is no whole zip archive, or "
                             f"there is no room ({type(error).__name__}: {brief(error)})") from None
        yield epath.Path(folder)


def _check(entries: list[zipfile.ZipInfo], size: int, folder: str) -> None:
    """Raises InputError where entries cannot be unpacked, before anything is written."""
    total = sum(entry.file_size for entry in entries)
    if len(entries) > MAX_ENTRIES:
        raise InputError("", remedy=f"it has {len(entries)} files; at most {MAX_ENTRIES} are read")
    if total > FREE_BYTES + MAX_COMPRESSION * size:
        raise InputError("", remedy=f"its files claim {total} bytes, and it has {size}")
    for entry in entries:
        if problem := _problem(entry):
            raise InputError("", remedy=f"its file {entry.filename[:_MAX_SHOWN]!r} {problem}")
    if len({entry.filename.rstrip("/") for entry in entries}) < len(entries):
        raise InputError("", remedy="it has two files of one name")
    free = shutil.disk_usage(folder).free
    if total > free:
        raise InputError("", remedy=f"its files have {total} bytes, and {os.path.dirname(folder)} "
                         f"has room for {free}; set TMPDIR to a folder on a larger disk")


def _problem(entry: zipfile.ZipInfo) -> str:
    """Why an entry is not unpacked; empty if it is."""
    name, mode = entry.filename, entry.external_attr >> 16
    if name.startswith("/") or "\\" in name or {"..", ".", ""} & set(name.rstrip("/").split("/")):
        return "leads out of the archive"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is no regular file"
    if entry.flag_bits & 1:
        return "is encrypted"
    return "" if entry.compress_type in _METHODS else "has a compression that is not known"


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: str) -> None:
    """Writes an entry, whose checksum `zipfile` compares at its end."""
    target = os.path.join(folder, entry.filename)
    if entry.is_dir():
        os.makedirs(target, exist_ok=True)
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with archive.open(entry) as source, open(target, "xb") as file:
        shutil.copyfileobj(source, file, 2**20)
        if file.tell() != entry.file_size:
            raise InputError("", remedy=f"its file {entry.filename[:_MAX_SHOWN]!r} is cut short")
