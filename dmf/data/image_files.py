"""Image files and their labels, as they lie in a folder or an archive.

A source is a folder, an uncompressed .tar or a .zip. Its labels are the folders at its top, one for
each class; or they stand in a labels file, `dataset.json` or `labels.csv` unless another is named;
or, where all images lie at the top, there are none. What is hidden or no image is passed over.

Archives are often packed with folders around it all: those that all images and labels files of an
archive share are taken off their names. (One class alone in an archive is therefore none.)
"""

import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import json
import os
import posixpath
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int64
from PIL import Image

from dmf.data.crop import decode
from dmf.typing import InputError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
LABELS_FILES = ("dataset.json", "labels.csv")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_TAR_BLOCK = 512


class UnreadableImage(ValueError):
    """An image file that cannot be decoded: its name, and why."""

    def __init__(self, name: str, why: str):
        super().__init__(name, why)
        self.name, self.why = name, why

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImageFiles:
    """Images by their index; any number of threads may read at once.

    Attributes:
      names: paths below the source, with slashes, in order of code points.
      labels: [n] indices into class_names; None without labels.
      class_names: what each label is called; empty without labels.
      read: the bytes of a file by its name; a ValueError says that they are damaged.
      others: files that are no images, but for those with labels.
    """

    names: tuple[str, ...]
    labels: Int64[np.ndarray, "n"] | None
    class_names: tuple[str, ...]
    read: Callable[[str], bytes]
    others: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """One image, decoded; of an animation the first frame. It is as stored: not yet upright.

        Raises:
          UnreadableImage: the file is cut short, damaged, or no image, or has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`.
          OSError: the file cannot be read at all.
        """
        name = self.names[index]
        try:
            return decode(self.read(name))
        except ValueError as error:
            raise UnreadableImage(name, str(error)) from error


def open_images(source: str, *, labels: str = "") -> ImageFiles:
    """The images of a folder or an archive.

    Args:
      source: the folder (`gs://` too), the .tar or the .zip.
      labels: a file with their labels, by its path below the source, or else on disk: a .json as
        {"labels": [["cats/1.png", 3], ...]}, perhaps with "class_names", or a .csv with lines
        "cats/1.png,3". Labels are whole numbers from 0, and images go by their path below the
        source. By default, what the source has of LABELS_FILES.

    Raises:
      InputError: there is no such source or labels file, it cannot be read, has no images, or its
        images and labels do not fit together.
    """
    place = _place(source, labels)
    listing = place.listing()
    names = tuple(sorted(filter(_is_image, listing)))
    if not names:
        raise InputError(f"source={source}: no images in it; it takes {' '.join(SUFFIXES)}")
    found = _labels_file(place, listing, labels)
    if found is None:
        numbers, class_names = _by_folder(source, names, listing)
    else:
        file, read = found
        with _one_line(f"labels={file}"):
            numbers, class_names = _by_file(file, read(), names, place.top)
    return ImageFiles(
        names=names,
        labels=None if numbers is None else np.array(numbers, np.int64),
        class_names=class_names,
        read=place.read,
        others=tuple(sorted(f for f in listing - {*names, *LABELS_FILES, labels} if f[-1] != "/")),
    )


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _is_hidden(name: str) -> bool:
    """Also what macOS puts beside the files of an archive."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _plain(name: str) -> str:
    """A path without "./", "//" and the like."""
    return posixpath.normpath(name).lstrip("/")


@contextlib.contextmanager
def _one_line(subject: str) -> Iterator[None]:
    """Says what is wrong with a file that somebody made."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what tarfile, zipfile and csv raise is not all documented
        told = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{subject}: {told}") from error


# Where files are: each place lists them, folders with a slash at their end, and reads one.


class _Folder(NamedTuple):
    path: epath.Path
    top: str = ""

    def listing(self) -> set[str]:
        found, folders = set(), [""]
        for folder in folders:  # which grows
            for path in (self.path / folder).iterdir():
                name = folder + path.name
                if _is_hidden(path.name):
                    continue
                # An image's suffix says enough: asking for each takes a request on gs://.
                if not _is_image(name) and path.is_dir():
                    name += "/"
                    folders.append(name)
                found.add(name)
        return found

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class _Archive(NamedTuple):
    """Opened anew for every read, so that threads need not take turns and nothing stays open."""

    path: epath.Path
    members: Mapping[str, "_Tarred | _Zipped | None"]
    top: str

    def listing(self) -> set[str]:
        below = {name.removeprefix(self.top) for name in self.members if name.startswith(self.top)}
        return {name for name in below if name and not _is_hidden(name)}

    def read(self, name: str) -> bytes:
        with self.path.open("rb") as file:
            return self.members[self.top + name].read(file)


class _Tarred(NamedTuple):
    start: int
    size: int

    def read(self, file: BinaryIO) -> bytes:
        file.seek(self.start)
        return file.read(self.size)


class _Zipped(NamedTuple):
    header: int
    stored: int
    size: int
    deflated: bool
    checksum: int

    def read(self, file: BinaryIO) -> bytes:
        try:
            file.seek(self.header)
            # Behind the header are two fields of variable length, then the bytes.
            file.seek(sum(struct.unpack("<26x2H", file.read(30))), os.SEEK_CUR)
            data = file.read(self.stored)
            if self.deflated:
                # No more than promised, whatever the stream unfolds to.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.size + 1)
        except (struct.error, zlib.error):
            data = b""
        if zlib.crc32(data) != self.checksum:
            raise ValueError("is damaged in the archive")
        return data


def _place(source: str, labels: str) -> _Folder | _Archive:
    path = epath.Path(source)
    if not source or not path.exists():
        raise InputError(f"source={source}: there is no such folder or archive")
    if path.is_dir():
        return _Folder(path)
    listed = {".tar": _tarred, ".zip": _zipped}.get(path.suffix.lower())
    with path.open("rb") as file:
        if file.read(6).startswith(_COMPRESSED):
            raise InputError(f"source={source}: is compressed as a whole, so that no image can be "
                             "read by itself: uncompress it to a .tar, or unpack it to a folder")
        if listed is None:
            raise InputError(f"source={source}: give a folder, a .zip or an uncompressed .tar")
        file.seek(0)
        with _one_line(f"source={source}: cannot be read"):
            members = dict(listed(file))
    return _Archive(path, members, _top(members, labels))


def _tarred(file: BinaryIO) -> Iterator[tuple[str, _Tarred | None]]:
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for entry in iter(archive.next, None):
            archive.members.clear()  # Else it keeps them all.
            if entry.islnk() or entry.issym():
                raise ValueError(f"{entry.name} in it is a link: pack it again with tar "
                                 "--dereference --hard-dereference")
            if entry.isfile():
                yield _plain(entry.name), _Tarred(entry.offset_data, entry.size)
            elif entry.isdir():
                yield _plain(entry.name) + "/", None
            end = entry.offset_data + (entry.size if entry.isfile() else 0)
    # tarfile takes a header that is missing or broken for the end, which a block of zeros marks.
    file.seek(-(-end // _TAR_BLOCK) * _TAR_BLOCK)
    if file.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
        raise ValueError(f"it is damaged or cut short after {end} bytes")


def _zipped(file: BinaryIO) -> Iterator[tuple[str, _Zipped | None]]:
    for entry in zipfile.ZipFile(file).infolist():
        deflated = entry.compress_type == zipfile.ZIP_DEFLATED
        if entry.flag_bits & 1 or not (deflated or entry.compress_type == zipfile.ZIP_STORED):
            raise ValueError(f"{entry.filename} in it is encrypted, or neither stored nor "
                             "deflated: pack it again with zip -0")
        sizes = entry.compress_size, entry.file_size
        if entry.is_dir():
            yield _plain(entry.filename) + "/", None
        else:
            yield _plain(entry.filename), _Zipped(entry.header_offset, *sizes, deflated, entry.CRC)


def _top(members: Iterable[str], labels: str) -> str:
    """The folders, with a slash, that all images and labels files of an archive share."""
    counted = {*LABELS_FILES, posixpath.basename(labels)} - {""}
    folders = {posixpath.dirname(name) for name in members if not _is_hidden(name)
               and (_is_image(name) or posixpath.basename(name) in counted)}
    shared = posixpath.commonpath(folders) if folders else ""
    return f"{shared}/" if shared else ""


# Labels.


def _by_folder(
    source: str, names: Sequence[str], listing: Collection[str]
) -> tuple[list[int] | None, tuple[str, ...]]:
    """Labels from the folders at the top; none where there are only images."""
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    classes = sorted(set(tops))
    if classes == [""]:
        return None, ()
    if classes[0] == "":
        raise InputError(
            f"source={source}: {names[tops.index('')]} lies beside folders of images, which would "
            "be classes: move it into one, or name a labels file"
        )
    empty = {name.partition("/")[0] for name in listing if "/" in name} - set(classes)
    if empty:
        raise InputError(f"source={source}: the class folder {min(empty)} has no images: add "
                         "some, or remove it")
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[top] for top in tops], tuple(classes)


def _labels_file(
    place: _Folder | _Archive, listing: Collection[str], labels: str
) -> tuple[str, Callable[[], bytes]] | None:
    """The labels file, if there is one, and what reads it."""
    for name in (labels,) if labels else LABELS_FILES:
        inner = name.removeprefix(place.top)
        if inner in listing:
            return name, functools.partial(place.read, inner)
    if not labels:
        return None
    path = epath.Path(labels)
    if not path.exists() or path.is_dir():
        raise InputError(f"labels={labels}: no such file, neither in the source nor elsewhere")
    return labels, path.read_bytes


def _by_file(
    file: str, data: bytes, names: Sequence[str], top: str
) -> tuple[list[int] | None, tuple[str, ...]]:
    """Labels from a labels file; none if it says that there are none."""
    reads = {".json": _json_pairs, ".csv": _csv_pairs}
    suffix = posixpath.splitext(file)[1].lower()
    if suffix not in reads:
        raise ValueError("give a .json or a .csv")
    pairs, class_names = reads[suffix](data.decode("utf-8-sig"))
    if pairs is None:
        return None, ()
    by_name = _by_name(pairs, set(names), top)
    unnamed = [name for name in names if name not in by_name]
    if unnamed:
        raise ValueError(f"it has no label for {unnamed[0]} ({len(unnamed)} such images): add it, "
                         "or take the image out of the source")
    numbers = [by_name[name] for name in names]
    return numbers, _named(numbers, class_names)


def _json_pairs(text: str) -> tuple[list[list[Any]] | None, list[str] | None]:
    table = json.loads(text)
    if not isinstance(table, dict) or "labels" not in table:
        raise ValueError('it must hold {"labels": [["file", 3], ...]}')
    pairs, class_names = table["labels"], table.get("class_names")
    if not isinstance(pairs, list | None) or not isinstance(class_names, list | None):
        raise ValueError('"labels" and "class_names" in it must be lists')
    for pair in pairs or []:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(f'{pair!r:.80} in it is not ["file", label]')
    for name in class_names or []:
        if not isinstance(name, str):
            raise ValueError(f'{name!r:.80} in its "class_names" is no string')
    return pairs, class_names


def _csv_pairs(text: str) -> tuple[list[list[Any]], None]:
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    pairs = []
    for i, row in enumerate(rows):
        if len(row) != 2:
            raise ValueError(f"{','.join(row)!r:.80} in it is not file,label")
        name, label = row[0].strip(), row[1].strip()
        if re.fullmatch("-?[0-9]{1,18}", label):
            pairs.append([name, int(label)])
        elif i or _is_image(name):  # else it is the header
            pairs.append([name, label])
    return pairs, None


def _by_name(pairs: Iterable[list[Any]], names: Collection[str], top: str) -> dict[str, int]:
    by_name = {}
    for file, label in pairs:
        name = _plain(file)
        name = name if name in names else name.removeprefix(top)
        if name not in names:
            raise ValueError(f"{file} in it is no image of the source: take it out, or correct it")
        if type(label) is not int or label < 0:
            raise ValueError(f"{file} has the label {label!r:.80}: give a whole number from 0")
        if by_name.setdefault(name, label) != label:
            raise ValueError(f"{file} has two labels, {by_name[name]} and {label}: keep one")
    return by_name


def _named(numbers: Sequence[int], class_names: list[str] | None) -> tuple[str, ...]:
    """Those that are given, or else the numbers, none of which may be left out."""
    last = max(numbers)
    if class_names is None:
        present = set(numbers)
        absent = next(number for number in itertools.count() if number not in present)
        if absent < last:
            raise ValueError(f"no image has the label {absent}, but one has {last}: number the "
                             'classes without gaps, or give "class_names" in a .json')
        return tuple(str(number) for number in range(last + 1))
    if last >= len(class_names):
        raise ValueError(f'an image has the label {last}, but "class_names" has '
                         f"{len(class_names)} names, from 0")
    return tuple(class_names)
