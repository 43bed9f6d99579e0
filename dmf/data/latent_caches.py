"""Latents that another project has encoded, as samples that are read by their index.

A sample is the mean and the standard deviation that an autoencoder gave for an image. It is a file
of its own, in a folder or in a .zip (stored or deflated), in one of two layouts:

- EDM2's (T. Karras et al., 2024, arXiv:2312.02696) and REPA's (S. Yu et al., 2024,
  arXiv:2410.06940): files [2c, h, w] named `00000/img-mean-std-00000000.npy` and so on, and the
  labels in `dataset.json` next to these folders: {"labels": [[file, label], ...]}, or null for the
  list.
- Any .npy or .npz, [2c, h, w] or [h, w, 2c]. They lie in one folder for each class, whose label is
  its place among the sorted folders, or all in one folder. An .npz holds `moments`, or `mean` and
  `std`; perhaps those of the mirror image, as `moments_flip`, or `mean_flip` and `std_flip`; and
  perhaps a `label`.

There may be a million files: opening a cache lists them and reads the headers of a few, and the
error about any other file is raised when that file is read. Nothing is ever unpickled.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int64

from dmf.data.archives import Files, Folder, open_archive, taken_names
from dmf.data.npy_files import header_size, npz_arrays, parse_array, parse_header
from dmf.errors import InputError
from dmf.runtime.paths import user_path
from dmf.runtime.thread_pool import ThreadPool

LABELS_FILE = "dataset.json"
# Folders that may hold the labels file, and the files that it lists.
LABELS_FOLDERS = ("", "vae-sd/")
SUFFIXES = (".npy", ".npz")
# Number of files whose headers are compared when a cache is opened.
CHECKED_FILES = 8
MAX_CLASSES = 2**31
# Threads of a cache that read files, because a file on a network disk takes milliseconds.
READ_THREADS = 16
_EDM2_NAME = re.compile(r"(?:.*/)?(\d{5})/img-mean-std-\1\d{3}\.npy")
_MOMENTS, _MEAN_STD = ("moments", "moments_flip"), ("mean", "std", "mean_flip", "std_flip")
# The sets of arrays that a file may hold, apart from a label.
_ARRAYS = (_MOMENTS[:1], _MOMENTS, _MEAN_STD[:2], _MEAN_STD)
_NAMES = (*_MOMENTS, *_MEAN_STD, "label")
_EXPECTED = "a sample is [2c, h, w] or [h, w, 2c], mean then std, in float16 or float32"
_GIVE = "give the folder or .zip of the latents, on a local disk"


class FileLayout(NamedTuple):
    """What all files of a cache have in common.

    Attributes:
      arrays: names of the arrays, apart from the label.
      shape: shape of each array.
      dtype: dtype of each array.
      has_label: whether the file holds a label too.
    """

    arrays: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    has_label: bool

    def __str__(self) -> str:
        names = [*self.arrays, "label"] if self.has_label else self.arrays
        return f"{'+'.join(names)} {self.shape} {self.dtype}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LatentCache:
    """A dataset of moments and labels. Any number of threads may read at once.

    Attributes:
      name: name of the dataset.
      directory: the folder or .zip, as the user gave it.
      names: name of the file of each sample, in the order of code points.
      files: files by name.
      layout: layout of each file.
      axes: axes of the stored arrays in the order h, w, channels.
      shape: (f, h, w, 2c) of a sample; f is 2 if the moments of the mirror image are stored too.
      known_labels: [n] labels from `LABELS_FILE` or from the folders; None without these.
      has_labels: whether samples have labels.
      class_limit: number of classes that the user gave; None to take the largest label + 1.
    """

    name: str
    directory: str
    names: Sequence[str]
    files: Files
    layout: FileLayout
    axes: tuple[int, int, int]
    shape: tuple[int, int, int, int]
    known_labels: Int64[np.ndarray, "n"] | None
    has_labels: bool
    class_limit: int | None
    _threads: ThreadPool = dataclasses.field(
        init=False, default_factory=lambda: ThreadPool(READ_THREADS, "read")
    )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def views(self) -> int:
        """2 if the moments of the mirror images are stored too, otherwise 1."""
        return self.shape[0]

    @functools.cached_property
    def num_classes(self) -> int:
        """Number of classes: the one that the user gave, or the largest label + 1; 0 without."""
        return (self.class_limit or int(self.labels().max()) + 1) if self.has_labels else 0

    def labels(self) -> Int64[np.ndarray, "n"]:
        """The label of every sample, 0 without labels. Where only the files of the samples hold
        labels, all of them are read."""
        if self.known_labels is not None:
            return self.known_labels
        if not self.has_labels:
            return np.zeros(len(self), np.int64)
        spans = (range(i, min(i + 256, len(self))) for i in range(0, len(self), 256))
        return np.concatenate([self.read(span)["y"] for span in spans]).astype(np.int64)

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Several samples, see `dmf.data.datasets.Dataset`.

        Args:
          indices: n indices in [0, len(cache)).

        Returns:
          "x": moments [n, f, h, w, 2c] as they are stored, mean then standard deviation.
          "y": labels [n] int32, 0 without labels.

        Raises:
          InputError: a file is gone, damaged, unlike the other files, or holds values that cannot
            be moments or a label. Its field is "directory", and the text names the file.
        """
        moments = np.empty((len(indices), *self.shape), self.layout.dtype.newbyteorder("="))
        y = np.zeros(len(indices), np.int32)

        def fill(span: range) -> None:
            for i in span:
                with _errors_of_file(self.names[indices[i]]):
                    y[i] = self._read_into(moments[i], indices[i])

        size = max(1, -(-len(indices) // READ_THREADS))
        spans = [range(i, min(i + size, len(y))) for i in range(0, len(y), size)]
        with _errors_of_directory(self.directory):
            self._threads.map(fill, spans)
            self._check_values(moments, indices)
        return {"x": moments, "y": y}

    def _read_into(self, row: np.ndarray, index: int) -> int:
        """Fills a row with the moments of a sample; returns its label."""
        arrays = _arrays(self.names[index], self.files.read(self.names[index]))
        _check_same(_file_layout(arrays), self.layout, repr(self.names[0]))
        parts = len(self.layout.arrays) // self.views
        places = row.reshape(*row.shape[:3], parts, -1)
        for i, name in enumerate(self.layout.arrays):
            places[i // parts, :, :, i % parts] = parse_array(arrays[name]).transpose(self.axes)
        if not self.has_labels:
            return 0
        known = None if self.known_labels is None else int(self.known_labels[index])
        if not self.layout.has_label:
            return known
        stored = _checked_label(np.squeeze(parse_array(arrays["label"])).tolist(), self.class_limit)
        if known not in (None, stored):
            raise InputError("", remedy=f"it holds the label {stored}, but {LABELS_FILE} or its "
                             f"folder says {known}: make them agree, or put all files in one "
                             "folder")
        return stored

    def _check_values(self, moments: np.ndarray, indices: Sequence[int]) -> None:
        """Raises InputError where moments are not finite or a deviation is not positive."""
        axes = (1, 2, 3, 4)
        std = moments[..., moments.shape[-1] // 2 :].min(axes)
        for i in np.flatnonzero(~(np.isfinite(moments).all(axes) & (std > 0)))[:1]:
            raise InputError(
                repr(self.names[indices[i]]),
                remedy=f"it is not all finite, or std is not above 0 but {std[i]:.4g}: store "
                       "exp(v / 2) of log-variances v",
            )


def open_cache(directory: epath.PathLike, *, num_classes: int | None = None) -> LatentCache:
    """Opens cached latents.

    Args:
      directory: the folder or .zip on a local disk; the folder that holds `LABELS_FILE`, or the
        one above if that is called vae-sd.
      num_classes: number of classes, which labels must be below; 0 ignores the labels; by default
        the largest label + 1.

    Raises:
      InputError: there are no latents, their labels are wrong or name other files, or the files
        that are compared differ. Its field is "directory", and the text names the file.
    """
    directory = directory and os.fspath(user_path(directory))
    with _errors_of_directory(directory):
        files = _open_files(directory)
        names, labels, is_edm2 = _list_samples(files)
        if num_classes == 0:
            labels = None
        elif labels is not None:
            labels = _checked_labels(names, labels, num_classes)
        layout = _common_layout(files, names)
        with _errors_of_file(names[0]):
            axes, shape = _axes_and_shape(layout, is_edm2)
    return LatentCache(
        name=epath.Path(directory).name, directory=directory, names=names, files=files,
        layout=layout, axes=axes, shape=shape, known_labels=labels, class_limit=num_classes,
        has_labels=num_classes != 0 and (labels is not None or layout.has_label),
    )  # fmt: skip


def _open_files(directory: str) -> Files:
    if os.path.isdir(directory):
        return Folder(epath.Path(directory))
    if not os.path.isfile(directory):
        raise InputError("", remedy=f"there is no such folder or .zip: {_GIVE}")
    return open_archive(epath.Path(directory))


@contextlib.contextmanager
def _errors_of_directory(directory: str) -> Iterator[None]:
    """Adds the field "directory" to errors about the cache."""
    try:
        yield
    except InputError as error:
        raise InputError("directory", directory, str(error)) from None


@contextlib.contextmanager
def _errors_of_file(name: str) -> Iterator[None]:
    """Adds the name of a file to errors about it."""
    try:
        yield
    except InputError as error:
        raise error.within(repr(name)) from None
    except OSError as error:
        raise InputError(
            repr(name), remedy=f"cannot be read ({error.strerror}): restore it"
        ) from error


def _list_samples(files: Files) -> tuple[list[str], list | None, bool]:
    """The files of the samples, their labels where no file of a sample is read for them, and
    whether the layout is EDM2's."""
    names = taken_names(files)
    base = next((base for base in LABELS_FOLDERS if base + LABELS_FILE in names), None)
    samples = sorted(
        name for name in names if name.startswith(base or "") and name[-4:] in SUFFIXES
    )
    if not samples:
        raise InputError("", remedy=f"no .npy or .npz is there: {_GIVE}")
    if mixed := [name for name in samples if name[-4:] != samples[0][-4:]]:
        raise InputError("", remedy=f"{mixed[0]!r} is next to {samples[0]!r}: keep .npy and .npz "
                         "apart")
    if base is not None:
        with _errors_of_file(base + LABELS_FILE):
            text = files.read(base + LABELS_FILE)
        return samples, _labels_by_list(text, base, samples), True
    if nested := [name for name in names if name.endswith("/" + LABELS_FILE)]:
        raise InputError("", remedy=f"{min(nested)!r} is not next to all the folders: give its "
                         "folder")
    if all(map(_EDM2_NAME.fullmatch, samples)):
        return samples, None, True
    return samples, _labels_by_folder(names, samples), False


def _labels_by_list(text: bytes, base: str, samples: Sequence[str]) -> list | None:
    """The labels that `LABELS_FILE` lists; None if it lists none."""
    file = repr(base + LABELS_FILE)
    try:
        pairs = json.loads(text)["labels"]
        if pairs is None:
            return None
        labels = {base + name.replace("\\", "/"): label for name, label in pairs}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError("", remedy=f'{file} is not {{"labels": [["0/a.npy", 3], ...]}}, or null '
                         "for the list: write it so") from None
    if different := labels.keys() ^ set(samples):
        name = min(different)
        where = (f"is in {LABELS_FILE}, but not there" if name in labels
                 else f"is there, but not in {LABELS_FILE}")
        raise InputError("", remedy=f"{name!r} {where}: make them agree")
    if len(labels) < len(pairs):
        raise InputError("", remedy=f"{file} lists a file twice: list each once")
    return [labels[name] for name in samples]


def _labels_by_folder(names: Iterable[str], samples: Sequence[str]) -> list | None:
    """The place of each sample's folder among the folders; None where no sample is in one."""
    if all("/" not in name for name in samples):
        return None
    if wrong := [name for name in samples if name.count("/") != 1]:
        raise InputError("", remedy=f"{wrong[0]!r} is not in a folder of its class: give a folder "
                         "of those")
    by_sample = [name.partition("/")[0] for name in samples]
    folders = {name.partition("/")[0] for name in names if "/" in name}
    if empty := folders - set(by_sample):
        raise InputError("", remedy=f"the class folder {min(empty)!r} has no .npy or .npz: fill or "
                         "remove it")
    number = {folder: i for i, folder in enumerate(sorted(folders))}
    return [number[folder] for folder in by_sample]


def _checked_labels(
    names: Sequence[str], labels: Sequence[Any], class_limit: int | None
) -> Int64[np.ndarray, "n"]:
    checked = np.empty(len(names), np.int64)
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        with _errors_of_file(name):
            checked[i] = _checked_label(label, class_limit)
    return checked


def _checked_label(label: Any, class_limit: int | None) -> int:
    classes = class_limit or MAX_CLASSES
    is_number = isinstance(label, (int, float)) and not isinstance(label, bool)
    if not is_number or not 0 <= label < classes or label != int(label):
        raise InputError("", remedy=f"its label {str(label)[:40]} is not a whole number from 0 to "
                         f"{classes - 1}: correct it, or the number of classes")
    return int(label)


def _arrays(name: str, data: bytes) -> dict[str, bytes]:
    """The bytes of each array of a file, as those of an .npy, by the name of the array."""
    return {"moments": data} if name.endswith(".npy") else npz_arrays(data, _NAMES)


def _file_layout(arrays: Mapping[str, bytes]) -> FileLayout:
    """The layout of a file, from the headers of its arrays."""
    names = tuple(name for name in (*_MOMENTS, *_MEAN_STD) if name in arrays)
    if names not in _ARRAYS:
        raise InputError("", remedy=f"it holds {'+'.join(names) or 'no moments'}: give one of "
                         + ", ".join(map("+".join, _ARRAYS)))
    headers = [parse_header(arrays[name][: header_size(arrays[name])]) for name in names]
    layouts = [FileLayout(names, shape, dtype, "label" in arrays) for shape, _, dtype in headers]
    for layout in layouts:
        _check_same(layout, layouts[0], "its first array")
    return layouts[0]


def _check_same(layout: FileLayout, other: FileLayout, whose: str) -> None:
    """Raises InputError where two layouts differ."""
    if layout != other:
        raise InputError("", remedy=f"it holds {layout}, but {whose} {other}: keep mixed "
                         "resolutions, types and contents apart")


def _common_layout(files: Files, names: Sequence[str]) -> FileLayout:
    """The layout of the first file, compared with that of a few others."""
    layouts = []
    for i in np.linspace(0, len(names) - 1, min(CHECKED_FILES, len(names))).astype(int):
        with _errors_of_file(names[i]):
            size = header_size(files.read(names[i], 10)) if names[i].endswith(".npy") else -1
            layouts.append(_file_layout(_arrays(names[i], files.read(names[i], size))))
            _check_same(layouts[-1], layouts[0], repr(names[0]))
    return layouts[0]


def _axes_and_shape(
    layout: FileLayout, is_edm2: bool
) -> tuple[tuple[int, int, int], tuple[int, int, int, int]]:
    """The axes of the arrays in the order h, w, channels, and the shape of a sample.

    The channels are the smallest axis; in EDM2's layout they are the first one.
    """
    sizes, parts = layout.shape, 1 if layout.arrays[0] == "moments" else 2
    if len(sizes) != 3 or layout.dtype.newbyteorder("=") not in (np.float16, np.float32):
        raise InputError("", remedy=f"it holds {layout}: {_EXPECTED}")
    is_known = is_edm2 and sizes[1] == sizes[2]
    axis = 0 if is_known else sizes.index(min(sizes))
    is_clear = is_known or (axis != 1 and sizes.count(min(sizes)) == 1)
    if not is_clear or sizes[axis] * parts % 2 or min(sizes) < 1:
        raise InputError("", remedy=f"which axis of {sizes} is that of the channels is not clear: "
                         f"{_EXPECTED}, and 2c is even and below h and w")
    axes = (1, 2, 0) if axis == 0 else (0, 1, 2)
    height, width, channels = (sizes[axis] for axis in axes)
    return axes, (len(layout.arrays) // parts, height, width, channels * parts)
