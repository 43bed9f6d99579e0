"""Images and labels in parquet files, as the Hugging Face hub stores datasets.

A column holds the files of images, as bytes or as a struct with a field `bytes`, and another one
labels as whole numbers. `datasets` writes what its columns are, and the names of classes, into the
metadata of the files. pyarrow reads the files; it is an extra of this package.

The order is that of the names of the files, and in a file that of its rows. Of images, a few row
groups are in memory.
"""

import dataclasses
import importlib
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int64
from PIL import Image

from dmf.data.image_files import UnreadableImage
from dmf.data.image_transforms import open_image
from dmf.data.parquet_files import find_files
from dmf.data.stored_labels import (
    NO_LABELS,
    check_no_classes,
    checked_labels,
    numbered_classes,
)
from dmf.data.tfds_records import damage_named
from dmf.errors import InputError, brief

_IMAGE_NAMES, _LABEL_NAMES = ("image", "img"), ("label", "labels")
_IMAGE_TYPE = re.compile(r"(large_)?binary$|struct<(.*, )?bytes: (large_)?binary\b")
_LABEL_TYPE = re.compile(r"u?int\d+")
_CONTENTS = {"image-column": "files of images", "label-column": "whole numbers"}
_GROUPS_IN_MEMORY = 4
MAX_GROUP_BYTES = 2**30


class RowGroup(NamedTuple):
    """Some rows of a file, which are read at once.

    Attributes:
      path: the file.
      number: number of the row group in the file.
      count: number of rows.
    """

    path: epath.Path
    number: int
    count: int


class Columns(NamedTuple):
    """The columns of a dataset.

    Attributes:
      image: name of the column of images.
      label: name of the column of labels; empty without labels.
      class_names: the names of classes that the files state; empty if they state none.
    """

    image: str
    label: str
    class_names: tuple[str, ...]


class RowGroups:
    """The images of row groups, of which the last ones stay in memory. Any number of threads may
    read at once."""

    def __init__(self, groups: Sequence[RowGroup], column: str):
        """Reads nothing yet.

        Args:
          groups: row groups.
          column: name of the column of images.
        """
        self._groups, self._column = groups, column
        self._starts = np.cumsum([0, *(group.count for group in groups)])
        self._loaded: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> bytes:
        """The file of an image; empty for a row without one.

        Raises:
          RunError: a file is missing or damaged.
        """
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        with self._lock:
            if number not in self._loaded:
                self._loaded[number] = self._read(self._groups[number])
                for far in sorted(self._loaded, key=lambda n: abs(n - number))[_GROUPS_IN_MEMORY:]:
                    del self._loaded[far]
            rows = self._loaded[number]
        value = rows[index - int(self._starts[number])].as_py()
        return (value["bytes"] if isinstance(value, dict) else value) or b""

    def _read(self, group: RowGroup) -> Any:
        path = os.fspath(group.path)
        with damage_named(path), _parquet(path).ParquetFile(path) as file:
            return file.read_row_group(group.number, columns=[self._column]).column(self._column)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ParquetImages:
    """Images by their index. Any number of threads may read at once.

    Attributes:
      names: name of each image: its file, and its row in the file.
      labels: [n] indices into class_names; None for images without labels.
      class_names: the names of the classes, or their numbers; empty for images without labels.
      files: the files of images by their index.
      source: the dataset, as the user gave it.
      left_out: empty: other files and columns are not looked at.
    """

    names: Sequence[str]
    labels: Int64[np.ndarray, "n"] | None
    class_names: tuple[str, ...]
    files: RowGroups | Sequence[bytes]
    source: str
    left_out: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def file_size(self, index: int) -> int:
        """0: images are read in row groups."""
        return 0

    def open(self, index: int) -> Image.Image:
        """One image, of which only the header is decoded yet.

        Raises:
          UnreadableImage: the file of the image is damaged.
          RunError: a parquet file is missing or damaged.
        """
        try:
            return open_image(self.files[index])
        except ValueError as error:
            raise UnreadableImage(self.names[index], str(error)) from error


def open_parquet(
    source: str, *, split: str = "train", image_column: str = "", label_column: str = "",
    class_count: int = 0,
) -> ParquetImages:
    """Lists the rows of a dataset, and reads their labels.

    Args:
      source: `hf:OWNER/DATASET`, or `hf:OWNER/DATASET/FOLDER` for the files in a folder of it; or a
        local folder or file.
      split: the split; of a single file, which has none, "train".
      image_column: name of the column of images; by default the one that the files state, or the
        only one that holds bytes, or one of `_IMAGE_NAMES`.
      label_column: name of the column of labels, or `NO_LABELS`; by default the one that the files
        state, or one of `_LABEL_NAMES`, which they need not have.
      class_count: number of classes, which labels must be below; 0 for those that are stated, or
        else for the largest label + 1, if no smaller label is absent.

    Raises:
      InputError: pyarrow is not installed, or the files, the split, the columns or the labels are
        not there, or not such; its field is "source", "split", "image-column", "label-column" or
        "num-classes".
    """
    parquet = _parquet(source)
    files = find_files(source, split)
    try:
        with _open_file(parquet, files[0]) as file:
            first = file.schema_arrow
        columns = choose_columns(first, image_column, label_column)
        groups, names, labels = [], [], []
        for path in files:
            with _open_file(parquet, path) as file:
                groups += _row_groups(path, file, columns, first)
                names += [f"{path.name}/{row}" for row in range(file.metadata.num_rows)]
                labels += _labels(path, file, columns)
        return _images(source, columns, groups, names, labels, class_count)
    except InputError as error:
        if error.field:
            raise
        raise InputError("source", source, error.remedy) from None


def _images(
    source: str, columns: Columns, groups: Sequence[RowGroup], names: Sequence[str],
    labels: Sequence[int], class_count: int,
) -> ParquetImages:
    """The images of a dataset, whose labels are checked."""
    stated = len(columns.class_names)
    if class_count and stated and class_count != stated:
        raise InputError("num-classes", class_count, f"the files name {stated} classes; leave it "
                         "out")
    if not names:
        raise InputError("", remedy="it has no rows")
    numbers, classes = None, columns.class_names
    if columns.label:
        numbers = checked_labels(labels, names, stated or class_count)
        classes = classes or numbered_classes(numbers, class_count)
    else:
        check_no_classes(class_count)
    return ParquetImages(
        names=names, labels=numbers, class_names=classes, source=source,
        files=RowGroups(groups, columns.image),
    )  # fmt: skip


def _parquet(source: str) -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            "source", source, "it needs pyarrow; pip install pyarrow"
        ) from None


def _open_file(parquet: Any, path: epath.Path) -> Any:
    """A parquet file, of which the footer is read."""
    try:
        return parquet.ParquetFile(os.fspath(path))
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None):  # Of the system, which says nothing about the content.
            raise InputError("", remedy=f"{path}: it cannot be read ({os.strerror(error.errno)})"
                             ) from None
        raise InputError("", remedy=f"{path}: it is no whole parquet file ({brief(error)}); copy "
                         "it again") from None


def choose_columns(schema: Any, image: str, label: str) -> Columns:
    """The columns of images and of labels.

    Args:
      schema: the pyarrow.Schema of a file.
      image: name of the column of images; empty to find it.
      label: name of the column of labels, or `NO_LABELS`; empty to find it.

    Raises:
      InputError: there is no such column, or it is unclear which one is meant; its field is
        "source", "image-column" or "label-column".
    """
    stated = _stated_features(schema)
    types = {field.name: str(field.type) for field in schema}
    images = [name for name, type_ in types.items() if _IMAGE_TYPE.match(type_)]
    numbers = [name for name, type_ in types.items() if _LABEL_TYPE.fullmatch(type_)]
    columns = ", ".join(f"{name} ({type_})" for name, type_ in types.items())[:400]
    pictures = _of_kind(stated, "Image")
    chosen = _choose("image-column", image, images, pictures, _IMAGE_NAMES, columns)
    if not chosen and len(images) != 1:
        raise InputError("image-column", image, "give the column that holds the files of images"
                         f"{'' if images else ', of which there is none'}; the columns are "
                         f"{columns}")
    chosen = chosen or images[0]
    if label == NO_LABELS:
        return Columns(chosen, "", ())
    classes = _of_kind(stated, "ClassLabel")
    labels = _choose("label-column", label, numbers, classes, _LABEL_NAMES, columns)
    names = stated.get(labels, {}).get("names", ()) if labels in classes else ()
    return Columns(chosen, labels, tuple(map(str, names)))


def _choose(
    flag: str, given: str, possible: Sequence[str], stated: Sequence[str], usual: Sequence[str],
    columns: str,
) -> str:
    """The column that is given, stated, or called as usual; "" if there is none."""
    if given:
        if given not in possible:
            raise InputError(flag, given, f"the files have no such column of "
                             f"{_CONTENTS[flag]}; the columns are {columns}")
        return given
    candidates = [name for name in stated if name in possible]
    if len(candidates) > 1:
        raise InputError(flag, given, f"give one of {', '.join(candidates)}")
    return next((name for name in (*candidates, *usual) if name in possible), "")


def _stated_features(schema: Any) -> dict[str, dict[str, Any]]:
    """What `datasets` says of the columns, by name; {} where it says nothing."""
    try:
        stated = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in stated.items() if isinstance(kind, dict)}
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _of_kind(stated: Mapping[str, Mapping[str, Any]], kind: str) -> list[str]:
    return [name for name, feature in stated.items() if feature.get("_type") == kind]


def _row_groups(path: epath.Path, file: Any, columns: Columns, schema: Any) -> list[RowGroup]:
    """The row groups of a file, whose columns are those of the first file."""
    for name in filter(None, columns[:2]):
        theirs, ours = (s.field(name).type if name in s.names else None
                        for s in (file.schema_arrow, schema))
        if theirs != ours:
            raise InputError("", remedy=f"{path}: its column {name} is {theirs}, and {ours} in the "
                             "first file: give files of one dataset")
    groups = []
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        parts = (group.column(i) for i in range(group.num_columns))
        size = sum(part.total_uncompressed_size for part in parts
                   if part.path_in_schema.split(".")[0] == columns.image)
        if size > MAX_GROUP_BYTES:
            raise InputError("", remedy=f"{path}: a row group of its images has {size:,} bytes, "
                             f"and the most are {MAX_GROUP_BYTES:,}: write it again with smaller "
                             "row groups")
        groups.append(RowGroup(path, number, group.num_rows))
    return groups


def _labels(path: epath.Path, file: Any, columns: Columns) -> list[int]:
    """The labels of a file; none where there is no such column."""
    if not columns.label:
        return []
    with damage_named(path):
        column = file.read(columns=[columns.label]).column(columns.label)
    if column.null_count:
        row = column.to_pylist().index(None)
        raise InputError("", remedy=f"{path.name}/{row} has no label: give each row one, or "
                         f"--label-column={NO_LABELS}")
    return column.to_pylist()
