"""Image files and their labels, in a folder or an archive.

A source is a folder, an uncompressed .tar or a .zip. The folders at its top are the classes; or a
labels file, by default `dataset.json` or `labels.csv`, holds the labels; or all images lie at the
top and have no labels. Hidden files, and files that are no images, are left out, and counted.

All folders that the images and labels files of an archive have in common are left off their names,
since archives often contain a folder around everything. (An archive of a single class folder is
therefore one without labels.)
"""

import csv
import dataclasses
import functools
import io
import itertools
import json
import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64
from PIL import Image

from dmf.data.archives import (
    LOOP,
    Files,
    Folder,
    is_hidden,
    normalized,
    open_archive,
)
from dmf.data.image_transforms import load_pixels, open_image
from dmf.errors import InputError
from dmf.runtime.files import is_regular_file
from dmf.runtime.paths import user_path

SUFFIXES = (".bmp", ".gif", ".jfif", ".jif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
LABELS_FILES = ("dataset.json", "labels.csv")
# Why a file is left out; the suffix follows.
NO_IMAGES = "files that are no images"
_UNUSED = "labels files that are not used"

# The label of each image, if there are labels, and the names of the classes.
Labels = tuple[list[int] | None, tuple[str, ...]]


class UnreadableImage(ValueError):
    """An image file that cannot be decoded.

    Attributes:
      name: name of the file.
      reason: why it cannot be decoded.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImageFiles:
    """Images by their index. Any number of threads may read at once.

    Attributes:
      names: paths below the source, with slashes, in the order of their code points.
      labels: [n] indices into class_names; None for images without labels.
      class_names: name of each class; empty for images without labels.
      files: the files by name.
      source: the folder or archive, as the user gave it.
      left_out: the sorted names of the files that are left out, by the reason.
    """

    names: tuple[str, ...]
    labels: Int64[np.ndarray, "n"] | None
    class_names: tuple[str, ...]
    files: Files
    source: str
    left_out: Mapping[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.names)

    def file_size(self, index: int) -> int:
        """Number of bytes of the file of an image."""
        return self.files.size(self.names[index])

    def open(self, index: int) -> Image.Image:
        """One image, of which only the header is decoded yet.

        Raises:
          UnreadableImage: the file is damaged, no image, or has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` or more bytes than `dmf.data.archives.MAX_FILE_BYTES`.
          OSError: the file cannot be read at all.
        """
        name = self.names[index]
        try:
            return open_image(self.files.read(name))
        except ValueError as error:
            raise UnreadableImage(name, str(error)) from error

    def image(self, index: int) -> Image.Image:
        """One image, decoded; of an animation the first frame. It is not turned upright yet.

        Raises:
          UnreadableImage: as `open`; or the file is cut short.
          OSError: the file cannot be read at all.
        """
        try:
            return load_pixels(self.open(index))
        except UnreadableImage:
            raise
        except ValueError as error:
            raise UnreadableImage(self.names[index], str(error)) from error


def open_images(source: str, *, labels: str = "") -> ImageFiles:
    """Lists the images of a folder or an archive.

    Args:
      source: the folder (also on `gs://`), the uncompressed .tar or the .zip.
      labels: the labels file, by its path below the source or by its path on disk: a .json as
        {"labels": [["cats/1.png", 3], ...]}, with "class_names" if known; or a .csv of lines
        "cats/1.png,3". Labels are whole numbers from 0, and images are named by their paths below
        the source. By default the first of `LABELS_FILES` that the source holds, if any.

    Raises:
      InputError: there is no such source or labels file, it cannot be read or holds no images, or
        images and labels do not fit together. The field is "source" or "labels".
    """
    files = _open_files(source, labels)
    entries = list(files.entries())
    names = {name for name, reason in entries if not reason}
    images = tuple(sorted(filter(_is_image, names)))
    if not images:
        raise InputError("source", source, f"no images in it; it takes {' '.join(SUFFIXES)}")
    opened = _open_labels_file(files, names, labels)
    if opened is None:
        numbers, class_names = _labels_by_folder(source, images, names)
    else:
        file, read = opened
        numbers, class_names = _labels_by_file(file, read, images, files.top)
    used = opened[0].removeprefix(files.top) if opened else None
    return ImageFiles(
        names=images,
        labels=None if numbers is None else np.array(numbers, np.int64),
        class_names=class_names,
        files=files,
        source=source,
        left_out=_left_out(entries, used),
    )


def _left_out(entries: Iterable[tuple[str, str]], labels: str | None) -> dict[str, tuple[str, ...]]:
    """The names of what is neither an image nor the labels file that is used, by the reason."""
    left_out: dict[str, list[str]] = {}
    for name, reason in sorted(entries):
        if not reason and name in LABELS_FILES:
            reason = _UNUSED
        elif not reason:
            reason = f"{NO_IMAGES} ({posixpath.splitext(name)[1].lower() or 'no suffix'})"
        is_counted = reason == LOOP or not name.endswith("/")
        if is_counted and name != labels and not (reason.startswith(NO_IMAGES) and _is_image(name)):
            left_out.setdefault(reason, []).append(name)
    return {reason: tuple(names) for reason, names in left_out.items()}


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _open_files(source: str, labels: str) -> Files:
    if not source or not user_path(source).exists():
        raise InputError("source", source, "there is no such folder or archive")
    path = user_path(source)
    if path.is_dir():
        return Folder(path, SUFFIXES)
    try:
        archive = open_archive(path)
    except InputError as error:
        raise InputError("source", source, error.remedy) from error
    return dataclasses.replace(archive, top=_common_folder(archive.members, labels))


def _common_folder(members: Iterable[str], labels: str) -> str:
    """The folders, with a slash, that all images and labels files of an archive share."""
    labels_files = {*LABELS_FILES, posixpath.basename(labels)} - {""}
    folders = {posixpath.dirname(name) for name in members if not is_hidden(name)
               and (_is_image(name) or posixpath.basename(name) in labels_files)}
    shared = posixpath.commonpath(folders) if folders else ""
    return f"{shared}/" if shared else ""


def _labels_by_folder(source: str, images: Sequence[str], names: Collection[str]) -> Labels:
    """Labels from the folders at the top; no labels where only images lie there."""
    folders = [name.partition("/")[0] if "/" in name else "" for name in images]
    classes = sorted(set(folders))
    if classes == [""]:
        return None, ()
    if classes[0] == "":
        raise InputError(
            "source", source,
            f"{images[folders.index('')]} lies next to folders of images, which would be classes: "
            "move it into one, or name a labels file",
        )
    empty = {name.partition("/")[0] for name in names if "/" in name} - set(classes)
    if empty:
        raise InputError(
            "source", source,
            f"the class folder {min(empty)} has no images: add some, or remove it",
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[folder] for folder in folders], tuple(classes)


def _open_labels_file(
    files: Files, names: Collection[str], labels: str
) -> tuple[str, Callable[[], bytes]] | None:
    """The labels file and a function that reads it; None if there is none."""
    for name in (labels,) if labels else LABELS_FILES:
        below = name.removeprefix(files.top)
        if below in names:
            return name, functools.partial(files.read, below)
    if not labels:
        return None
    path = user_path(labels)
    if not is_regular_file(path):
        raise InputError("labels", labels, "no such file, neither in the source nor elsewhere")
    return labels, path.read_bytes


def _labels_by_file(
    file: str, read: Callable[[], bytes], images: Sequence[str], top: str
) -> Labels:
    """Labels from a labels file; no labels if the file says so."""
    try:
        return _parse_labels(file, read(), images, top)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # Python does not document all that json and csv raise.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError("labels", file, reason) from error


def _parse_labels(file: str, data: bytes, images: Sequence[str], top: str) -> Labels:
    parsers = {".json": _parse_json, ".csv": _parse_csv}
    suffix = posixpath.splitext(file)[1].lower()
    if suffix not in parsers:
        raise ValueError("give a .json or a .csv")
    pairs, class_names = parsers[suffix](data.decode("utf-8-sig"))
    if pairs is None:
        return None, ()
    labels = _labels_by_name(pairs, set(images), top)
    unlabelled = [name for name in images if name not in labels]
    if unlabelled:
        raise ValueError(f"it has no label for {unlabelled[0]} ({len(unlabelled)} such images): "
                         "add it, or take the image out of the source")
    numbers = [labels[name] for name in images]
    return numbers, _class_names(numbers, class_names)


def _parse_json(text: str) -> tuple[list[list[Any]] | None, list[str] | None]:
    """Pairs of file and label, and the class names; None for what the file does not give."""
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


def _parse_csv(text: str) -> tuple[list[list[Any]], None]:
    """Pairs of file and label; a .csv gives no class names."""
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    pairs = []
    for i, row in enumerate(rows):
        if len(row) != 2:
            raise ValueError(f"{','.join(row)!r:.80} in it is not file,label")
        name, label = row[0].strip(), row[1].strip()
        if re.fullmatch("-?[0-9]{1,18}", label):
            pairs.append([name, int(label)])
        elif i or _is_image(name):  # Otherwise it is the header.
            pairs.append([name, label])
    return pairs, None


def _labels_by_name(
    pairs: Iterable[list[Any]], images: Collection[str], top: str
) -> dict[str, int]:
    labels: dict[str, int] = {}
    for file, label in pairs:
        name = normalized(file)
        name = name if name in images else name.removeprefix(top)
        if name not in images:
            raise ValueError(f"{file} in it is no image of the source: take it out, or correct it")
        if type(label) is not int or label < 0:
            raise ValueError(f"{file} has the label {label!r:.80}: give a whole number from 0")
        if labels.setdefault(name, label) != label:
            raise ValueError(f"{file} has two labels, {labels[name]} and {label}: keep one")
    return labels


def _class_names(numbers: Sequence[int], class_names: list[str] | None) -> tuple[str, ...]:
    """The class names that the labels file gives, or else the labels, which must have no gaps."""
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
