"""Files by name, in a folder or in an archive that is read without being unpacked.

A name is a path below the folder, or below the top of the archive, with slashes; the name of a
folder ends in a slash. What is hidden, or is neither a file nor a folder, is left out. Archives are
uncompressed .tar files, and .zip files whose members are stored or deflated. Nothing stays open
between two reads, so that any number of threads may read at once.
"""

import contextlib
import dataclasses
import os
import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

from etils import epath

from dmf.errors import InputError
from dmf.runtime.files import is_regular_file

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_TAR_BLOCK = 512
# What operating systems and network disks add to folders: thumbnails, bins, snapshots.
_OF_SYSTEMS = ("__MACOSX", "@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN",
               "System Volume Information")
# Why an entry is left out.
HIDDEN = "hidden files or folders"
SPECIAL = "devices, pipes or sockets"
LOOP = "links to a folder above"
OUTSIDE = "files beside the folder of the images"
# Larger files are not read whole: they are no images, labels or latents of an image.
MAX_FILE_BYTES = 2**30
# Deflated bytes may be longer than what they expand to.
_DEFLATE_OVERHEAD = 1000


@runtime_checkable
class Files(Protocol):
    """Files by name.

    Attributes:
      top: folders, with a slash, in which all files lie and which are left off their names.
    """

    top: str

    def entries(self) -> Iterator[tuple[str, str]]:
        """The name of each file and folder, and why it is left out, in no particular order.

        The reason is "" for what is not left out. Of folders that are left out, what is in them is
        not listed, except in archives.
        """

    def size(self, name: str) -> int:
        """Number of bytes of a file; 0 where to ask for it takes a request.

        Raises:
          OSError: the file cannot be read.
        """

    def read(self, name: str, size: int = -1) -> bytes:
        """The first `size` bytes of a file, or all of them if `size` is negative.

        Raises:
          InputError: the archive is damaged there, or the file has more than `MAX_FILE_BYTES`; the
            field of the error is empty.
          OSError: the file cannot be read.
        """


def taken_names(files: Files) -> set[str]:
    """The names of the files and folders that are not left out."""
    return {name for name, reason in files.entries() if not reason}


def normalized(name: str) -> str:
    """A path without "./", "//" and the like.

    >>> normalized("./set//cow/1.png")
    'set/cow/1.png'
    """
    return posixpath.normpath(name).lstrip("/")


def is_hidden(name: str) -> bool:
    """Whether a part of a path starts with a dot, or is a folder of an operating system or a disk.

    >>> [is_hidden(name) for name in ("cow/.1.png", "cow/@eaDir/1.png", "cow/1.png")]
    [True, True, False]
    """
    return any(part.startswith(".") or part in _OF_SYSTEMS for part in name.split("/"))


def _check_size(size: int) -> None:
    """Raises InputError where a file is too large to be read whole."""
    if size > MAX_FILE_BYTES:
        raise InputError("", remedy=f"has {size:,} bytes, and the most are {MAX_FILE_BYTES:,}")


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

    def entries(self) -> Iterator[tuple[str, str]]:
        """See `Files`."""
        waiting: list[tuple[str, tuple[Any, ...]]] = [("", ())]
        for folder, above in waiting:  # The list grows.
            identity = self._identity(folder)
            if identity in above:
                yield folder, LOOP
                continue
            if folder:
                yield folder, ""
            for name, is_folder, is_special in self._entries(folder):
                if is_hidden(name):
                    yield folder + name, HIDDEN
                elif is_folder:
                    waiting.append((f"{folder}{name}/", (*above, identity)))
                else:
                    yield folder + name, SPECIAL if is_special else ""

    def _identity(self, folder: str) -> Any:
        """What tells whether two names, perhaps of links, are the same folder."""
        if not _is_local(os.fspath(self.path)):
            return folder
        status = os.stat(os.path.join(self.path, folder))
        return status.st_dev, status.st_ino

    def _entries(self, folder: str) -> Iterator[tuple[str, bool, bool]]:
        """The name of each entry, whether it is a folder, and whether it is neither that nor a
        file. A link to nothing is a file, which cannot be read."""
        if _is_local(os.fspath(self.path)):
            with os.scandir(os.path.join(self.path, folder)) as entries:
                for entry in entries:
                    is_other = not entry.is_file() and os.path.exists(entry.path)
                    yield entry.name, entry.is_dir(), is_other
        else:
            for path in (self.path / folder).iterdir():
                is_file = path.name.lower().endswith(self.suffixes)
                yield path.name, not is_file and path.is_dir(), False

    def size(self, name: str) -> int:
        """See `Files`."""
        path = os.path.join(self.path, name)
        return os.stat(path).st_size if _is_local(path) else 0

    def read(self, name: str, size: int = -1) -> bytes:
        """See `Files`."""
        if size < 0:
            _check_size(self.size(name))
        with _open(os.path.join(self.path, name)) as file:
            data = file.read(size)
        _check_size(len(data))
        return data


@dataclasses.dataclass(frozen=True)
class Archive:
    """The members of an archive.

    Attributes:
      path: the archive.
      members: where each member is; None for a folder, and the reason for what is left out.
      top: folders, with a slash; the names are those of the members below.
    """

    path: epath.Path
    members: Mapping[str, "TarMember | ZipMember | str | None"]
    top: str = ""

    def entries(self) -> Iterator[tuple[str, str]]:
        """See `Files`."""
        for name, member in self.members.items():
            if is_hidden(name):
                yield name, HIDDEN
            elif name.startswith(self.top) and name != self.top:
                yield name.removeprefix(self.top), member if isinstance(member, str) else ""
            elif not name.endswith("/"):
                yield name, OUTSIDE

    def size(self, name: str) -> int:
        """See `Files`."""
        return self.members[self.top + name].size

    def read(self, name: str, size: int = -1) -> bytes:
        """See `Files`."""
        if size < 0:
            _check_size(self.size(name))
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


@contextlib.contextmanager
def member_reader(path: epath.Path) -> Iterator[Callable[[TarMember | ZipMember], bytes]]:
    """A function that reads members of an archive, which is open in the context.

    Args:
      path: the archive.

    Yields:
      member -> its bytes. It raises InputError, with an empty field, where the member is damaged or
      has more than `MAX_FILE_BYTES`.

    Raises:
      OSError: the archive cannot be read.
    """
    with _open(os.fspath(path)) as file:

        def read(member: TarMember | ZipMember) -> bytes:
            _check_size(member.size)
            return member.read(file)

        yield read


def open_archive(path: epath.Path) -> Archive:
    """Lists the members of an archive.

    Args:
      path: an uncompressed .tar, or a .zip.

    Raises:
      InputError: the file is compressed as a whole, is of another kind, cannot be read, or has
        members that cannot be read on their own; the field of the error is empty.
    """
    list_members = {".tar": _tar_members, ".zip": _zip_members}.get(path.suffix.lower())
    if not is_regular_file(path):
        raise InputError("", remedy="is no file; give a folder, a .zip or an uncompressed .tar")
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
        except tarfile.ReadError as error:
            raise InputError("", remedy="cannot be read: it is damaged or cut short "
                             f"({error})") from error
        except Exception as error:  # Python does not document all that tarfile and zipfile raise.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError("", remedy=f"cannot be read: {reason}") from error


def _tar_member(entry: tarfile.TarInfo) -> tuple[str, TarMember | str | None]:
    """The name of an entry, and where it is; see `Archive`."""
    if entry.islnk() or entry.issym():
        raise ValueError(f"{entry.name} in it is a link: pack it again with tar "
                         "--dereference --hard-dereference")
    if entry.issparse():
        raise ValueError(f"{entry.name} in it is sparse: pack it again without --sparse")
    if entry.isfile():
        return normalized(entry.name), TarMember(entry.offset_data, entry.size)
    return (f"{normalized(entry.name)}/", None) if entry.isdir() else (
        normalized(entry.name), SPECIAL)


def _tar_members(file: BinaryIO) -> Iterator[tuple[str, TarMember | str | None]]:
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for entry in iter(archive.next, None):
            archive.members.clear()  # Otherwise tarfile keeps all entries in memory.
            yield _tar_member(entry)
            end = entry.offset_data + (entry.size if entry.isfile() else 0)
    # tarfile takes a header that is missing or broken for the end, which a block of zeros marks.
    file.seek(-(-end // _TAR_BLOCK) * _TAR_BLOCK)
    if file.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
        raise ValueError(f"it is damaged or cut short after {end} bytes")


def _zip_members(file: BinaryIO) -> Iterator[tuple[str, ZipMember | None]]:
    total, names = file.seek(0, os.SEEK_END), set()
    for entry in zipfile.ZipFile(file).infolist():
        # Windows writes names with backslashes, which the format forbids.
        name = normalized(entry.filename.replace("\\", "/"))
        if entry.header_offset + entry.compress_size > total:
            raise ValueError(f"{entry.filename} in it ends behind its end: it is damaged")
        is_deflated = entry.compress_type == zipfile.ZIP_DEFLATED
        if entry.flag_bits & 1 or not (is_deflated or entry.compress_type == zipfile.ZIP_STORED):
            raise ValueError(f"{entry.filename} in it is encrypted, or neither stored nor "
                             "deflated: pack it again with zip -0")
        if entry.filename.endswith(("/", "\\")):
            yield f"{name}/", None
        elif name in names:
            raise ValueError(f"{entry.filename} is in it twice: pack it again")
        else:
            names.add(name)
            yield name, ZipMember(
                entry.header_offset, entry.compress_size, entry.file_size, is_deflated, entry.CRC
            )


def _is_local(path: str) -> bool:
    return "://" not in path


def _open(path: str) -> BinaryIO:
    """A file to read a few spans of, without a buffer."""
    return open(path, "rb", buffering=0) if _is_local(path) else epath.Path(path).open("rb")
