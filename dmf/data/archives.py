"""Files by name, in a folder or in an archive that is read without being unpacked.

A name is a path below the folder, or below the top of the archive, with slashes; the name of a
folder ends in a slash. Hidden files and folders are left out. Archives are uncompressed .tar files,
and .zip files whose members are stored or deflated. Nothing stays open between two reads, so that
any number of threads may read at once.
"""

import dataclasses
import os
import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable

from etils import epath

from dmf.errors import InputError

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_TAR_BLOCK = 512
# Deflated bytes may be longer than what they expand to.
_DEFLATE_OVERHEAD = 1000


@runtime_checkable
class Files(Protocol):
    """Files by name.

    Attributes:
      top: folders, with a slash, in which all files lie and which are left off their names.
    """

    top: str

    def names(self) -> Iterator[str]:
        """The names of all files and folders that are not hidden, in no particular order."""

    def read(self, name: str, size: int = -1) -> bytes:
        """The first `size` bytes of a file, or all of them if `size` is negative.

        Raises:
          InputError: the archive is damaged there; the field of the error is empty.
          OSError: the file cannot be read.
        """


def normalized(name: str) -> str:
    """A path without "./", "//" and the like.

    >>> normalized("./set//cow/1.png")
    'set/cow/1.png'
    """
    return posixpath.normpath(name).lstrip("/")


def is_hidden(name: str) -> bool:
    """Whether a part of a path starts with a dot, or is the folder that macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


@dataclasses.dataclass(frozen=True)
class Folder:
    """The files below a folder.

    Attributes:
      path: the folder, on a local disk or not (`gs://`).
      suffixes: suffixes, in lower case, that only files have. Asking whether a name is that of a
        folder takes a request each where the folder is not on a local disk.
    """

    path: epath.Path
    suffixes: tuple[str, ...] = ()
    top = ""

    def names(self) -> Iterator[str]:
        """See `Files`."""
        folders = [""]
        for folder in folders:  # The list grows.
            for name, is_folder in self._entries(folder):
                if not is_hidden(name):
                    name = folder + name + "/" * is_folder
                    if is_folder:
                        folders.append(name)
                    yield name

    def _entries(self, folder: str) -> Iterator[tuple[str, bool]]:
        """The name of each entry of a folder, and whether it is a folder."""
        if _is_local(os.fspath(self.path)):
            with os.scandir(os.path.join(self.path, folder)) as entries:
                yield from ((entry.name, entry.is_dir()) for entry in entries)
        else:
            for path in (self.path / folder).iterdir():
                is_file = path.name.lower().endswith(self.suffixes)
                yield path.name, not is_file and path.is_dir()

    def read(self, name: str, size: int = -1) -> bytes:
        """See `Files`."""
        with _open(os.path.join(self.path, name)) as file:
            return file.read(size)


@dataclasses.dataclass(frozen=True)
class Archive:
    """The members of an archive.

    Attributes:
      path: the archive.
      members: where each member is; None for a folder.
      top: folders, with a slash; the names are those of the members below.
    """

    path: epath.Path
    members: Mapping[str, "TarMember | ZipMember | None"]
    top: str = ""

    def names(self) -> Iterator[str]:
        """See `Files`."""
        for name in self.members:
            below = name.removeprefix(self.top)
            if name.startswith(self.top) and below and not is_hidden(below):
                yield below

    def read(self, name: str, size: int = -1) -> bytes:
        """See `Files`."""
        with _open(os.fspath(self.path)) as file:
            return self.members[self.top + name].read(file, size)


class TarMember(NamedTuple):
    """A file in a .tar, by its offset and size in bytes."""

    offset: int
    size: int

    def read(self, file: BinaryIO, size: int = -1) -> bytes:
        """The first bytes of the member, or all."""
        file.seek(self.offset)
        return file.read(self.size if size < 0 else min(size, self.size))


class ZipMember(NamedTuple):
    """A file in a .zip.

    Attributes:
      offset: offset of the local header in bytes.
      stored_size: number of bytes in the archive.
      size: number of bytes of the file.
      is_deflated: whether the file is deflated rather than stored as it is.
      checksum: CRC-32 of the file.
    """

    offset: int
    stored_size: int
    size: int
    is_deflated: bool
    checksum: int

    def read(self, file: BinaryIO, size: int = -1) -> bytes:
        """The first bytes of the member, or all, whose checksum is then verified."""
        wanted = self.size if size < 0 else min(size, self.size)
        limit = self.stored_size if size < 0 else min(self.stored_size, size + _DEFLATE_OVERHEAD)
        try:
            file.seek(self.offset)
            # Two fields of variable length lie between the header and the contents.
            file.seek(sum(struct.unpack("<26x2H", file.read(30))), os.SEEK_CUR)
            data = file.read(limit)
            if self.is_deflated:
                # At most one byte more than the archive promises, whatever the data expands to.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, wanted + 1)
        except (struct.error, zlib.error):
            data = b""
        is_whole = wanted == self.size
        if len(data) < wanted or (is_whole and zlib.crc32(data) != self.checksum):
            raise InputError("", remedy="is damaged in the archive")
        return data[:wanted]


def open_archive(path: epath.Path) -> Archive:
    """Lists the members of an archive.

    Args:
      path: an uncompressed .tar, or a .zip.

    Raises:
      InputError: the file is compressed as a whole, is of another kind, cannot be read, or has
        members that cannot be read on their own; the field of the error is empty.
    """
    list_members = {".tar": _tar_members, ".zip": _zip_members}.get(path.suffix.lower())
    with path.open("rb") as file:
        if file.read(6).startswith(_COMPRESSED):
            raise InputError("", remedy="is compressed as a whole, so that no file can be read on "
                             "its own: uncompress it to a .tar, or unpack it to a folder")
        if list_members is None:
            raise InputError("", remedy="give a folder, a .zip or an uncompressed .tar")
        file.seek(0)
        try:
            return Archive(path, dict(list_members(file)))
        except (OSError, MemoryError):
            raise
        except Exception as error:  # Python does not document all that tarfile and zipfile raise.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError("", remedy=f"cannot be read: {reason}") from error


def _tar_members(file: BinaryIO) -> Iterator[tuple[str, TarMember | None]]:
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for entry in iter(archive.next, None):
            archive.members.clear()  # Otherwise tarfile keeps all entries in memory.
            if entry.islnk() or entry.issym():
                raise ValueError(f"{entry.name} in it is a link: pack it again with tar "
                                 "--dereference --hard-dereference")
            if entry.isfile():
                yield normalized(entry.name), TarMember(entry.offset_data, entry.size)
            elif entry.isdir():
                yield normalized(entry.name) + "/", None
            end = entry.offset_data + (entry.size if entry.isfile() else 0)
    # tarfile takes a header that is missing or broken for the end, which a block of zeros marks.
    file.seek(-(-end // _TAR_BLOCK) * _TAR_BLOCK)
    if file.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
        raise ValueError(f"it is damaged or cut short after {end} bytes")


def _zip_members(file: BinaryIO) -> Iterator[tuple[str, ZipMember | None]]:
    for entry in zipfile.ZipFile(file).infolist():
        is_deflated = entry.compress_type == zipfile.ZIP_DEFLATED
        if entry.flag_bits & 1 or not (is_deflated or entry.compress_type == zipfile.ZIP_STORED):
            raise ValueError(f"{entry.filename} in it is encrypted, or neither stored nor "
                             "deflated: pack it again with zip -0")
        if entry.is_dir():
            yield normalized(entry.filename) + "/", None
        else:
            yield normalized(entry.filename), ZipMember(
                entry.header_offset, entry.compress_size, entry.file_size, is_deflated, entry.CRC
            )


def _is_local(path: str) -> bool:
    return "://" not in path


def _open(path: str) -> BinaryIO:
    """A file to read a few spans of, without a buffer."""
    return open(path, "rb", buffering=0) if _is_local(path) else epath.Path(path).open("rb")
