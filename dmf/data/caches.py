"""Latents that another project has encoded, read where they lie as random-access rows.

A row is the mean and the standard deviation that an autoencoder gave for an image. It is a file of
its own, in a folder or in a .zip (stored or deflated), in one of two layouts:

- EDM2's (T. Karras et al., 2024, arXiv:2312.02696) and REPA's (S. Yu et al., 2024,
  arXiv:2410.06940): `00000/img-mean-std-00000000.npy` and so on, [2c, h, w], and the labels in
  `dataset.json` beside these folders: {"labels": [[file, label], ...]}, or null for the list.
- Any .npy or .npz, [2c, h, w] or [h, w, 2c], in a folder a class, whose label is its place among
  the sorted folders, or all in one folder. An .npz holds `moments`, or `mean` and `std`; perhaps
  the mirror image's, as `moments_flip`, or `mean_flip` and `std_flip`; and perhaps a `label`.

There may be a million files: opening lists them and looks into a few, and what is wrong with
another is found when it is read. Nothing is ever unpickled.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int32, Int64

from dmf.typing import InputError

Moments = Float[np.ndarray, "n f h w c"]
LABELS_FILE = "dataset.json"
SUFFIXES = (".npy", ".npz")
LABELS_FOLDERS = ("", "vae-sd/")
LOOKED_INTO = 8
MOST_LABELS = 2**31
_OF_EDM2 = re.compile(r"(?:.*/)?(\d{5})/img-mean-std-\1\d{3}\.npy")
_MOMENTS, _HALVES = ("moments", "moments_flip"), ("mean", "std", "mean_flip", "std_flip")
_ROWS = (_MOMENTS[:1], _MOMENTS, _HALVES[:2], _HALVES)
_ENTRIES = [(array, f"{array}.npy") for array in (*_MOMENTS, *_HALVES, "label")]
_REMEDY = "a row is [2c, h, w] or [h, w, 2c], mean then std, in float16 or float32"
_GIVE = "give the folder or .zip of the latents, on a local disk"
_DAMAGED = "is no .npy file, or a damaged one: write it again with numpy.save"


class Form(NamedTuple):
    """What is the same in all files: which arrays, their shape and dtype, whether with a label."""

    arrays: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    labelled: bool

    def __str__(self) -> str:
        names = [*self.arrays, "label"] if self.labelled else self.arrays
        return f"{'+'.join(names)} {self.shape} {self.dtype}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LatentCache:
    """Rows of moments and labels; any number of threads may read at once.

    Attributes:
      name: what to call it.
      directory: where it lies, as it was given.
      names: of the file of each row, in order of code points.
      files: what reads them.
      form: of each of them.
      axes: of the arrays in them, as h, w, channels.
      shape: (f, h, w, 2c) of a row, of f sides.
      listed: [n] labels from LABELS_FILE or the folders; None where there are none of these.
      labelled: whether rows have labels.
      limit: labels are below it; None stands for what is found.
    """

    name: str
    directory: str
    names: Sequence[str]
    files: "_Folder | _Archive"
    form: Form
    axes: tuple[int, int, int]
    shape: tuple[int, int, int, int]
    listed: Int64[np.ndarray, "n"] | None
    labelled: bool
    limit: int | None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sides(self) -> int:
        """2 where the moments of the mirror images are there too, else 1."""
        return self.shape[0]

    @functools.cached_property
    def num_classes(self) -> int:
        """Number of labels, 0 where there are none; without a limit, as many as `labels` needs."""
        return (self.limit or int(self.labels().max()) + 1) if self.labelled else 0

    def labels(self) -> Int64[np.ndarray, "n"]:
        """The label of every row, 0 where there are none. Those that only the files of the rows
        hold take a pass over all of them."""
        if self.listed is not None or not self.labelled:
            return np.zeros(len(self), np.int64) if self.listed is None else self.listed
        spans = (range(i, min(i + 256, len(self))) for i in range(0, len(self), 256))
        return np.concatenate([self.read(span)[1] for span in spans]).astype(np.int64)

    def read(self, indices: Sequence[int]) -> tuple[Moments, Int32[np.ndarray, "n"]]:
        """Moments [n, f, h, w, 2c] of several rows as they are stored, mean then std; and their
        labels, 0 where there are none.

        Raises:
          InputError: a file is not there any more, is damaged, is not like the others, or holds
            what cannot be moments or a label; the message names it.
        """
        moments = np.empty((len(indices), *self.shape), self.form.dtype.newbyteorder("="))
        y = np.zeros(len(indices), np.int32)
        with _about(f"data.directory={self.directory}"):
            for i, index in enumerate(indices):
                with _about(repr(self.names[index])):
                    y[i] = self._read(index, moments[i])
            axes = (1, 2, 3, 4)
            std = moments[..., moments.shape[-1] // 2 :].min(axes)
            for i in np.flatnonzero(~(np.isfinite(moments).all(axes) & (std > 0)))[:1]:
                raise InputError(f"{self.names[indices[i]]!r}: it is not all finite, or std is not "
                                 f"above 0 but {std[i]:.4g}: store exp(v / 2) of log-variances v")
        return moments, y

    def _read(self, index: int, row: np.ndarray) -> int:
        """Fills a row; returns its label."""
        arrays = _arrays(self.names[index], self.files.read(self.names[index]))
        _check_same(_form(arrays), self.form, repr(self.names[0]))
        parts = len(self.form.arrays) // self.sides
        places = row.reshape(*row.shape[:3], parts, -1)
        for i, name in enumerate(self.form.arrays):
            places[i // parts, :, :, i % parts] = _array(arrays[name]).transpose(self.axes)
        if not self.labelled:
            return 0
        listed = None if self.listed is None else int(self.listed[index])
        if not self.form.labelled:
            return listed
        stored = _label(np.squeeze(_array(arrays["label"])).tolist(), self.limit)
        if listed not in (None, stored):
            raise InputError(f"it holds the label {stored}, but {LABELS_FILE} or its folder says "
                             f"{listed}: make them agree, or put all files in one folder")
        return stored


def open_cache(directory: epath.PathLike, *, num_classes: int | None = None) -> LatentCache:
    """Opens cached latents.

    Args:
      directory: the folder or .zip on a local disk; where there is a LABELS_FILE, the folder that
        has it, or the one above if that is called vae-sd.
      num_classes: labels must be below it; 0 leaves labels alone. By default as many as are found.

    Raises:
      InputError: there is nothing, its labels are wrong or are not those of its files, or the rows
        that were looked into are not alike; the message names the file.
    """
    directory = os.fspath(directory)
    with _about(f"data.directory={directory}"):
        files = (_Folder if os.path.isdir(directory) else _Archive)(directory)
        names, labels, of_edm2 = _catalogue(files)
        if num_classes == 0:
            labels = None
        elif labels is not None:
            pairs = zip(names, labels, strict=True)
            labels = np.array([_label(label, num_classes, f"{name!r}: ") for name, label in pairs])
        form = _common_form(files, names)
        with _about(repr(names[0])):
            axes, shape = _layout(form, of_edm2)
    return LatentCache(
        name=epath.Path(directory).name, directory=directory, names=names, files=files, form=form,
        axes=axes, shape=shape, listed=labels, limit=num_classes,
        labelled=num_classes != 0 and (labels is not None or form.labelled),
    )  # fmt: skip


@contextlib.contextmanager
def _about(subject: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{subject}: {error}") from None
    except OSError as error:
        raise InputError(f"{subject}: cannot be read ({error.strerror}): restore it") from error


def _catalogue(files: "_Folder | _Archive") -> tuple[list[str], list | None, bool]:
    """Names of rows, their labels if files need not be read for them, and whether it is EDM2's."""
    there = set(files.names())
    base = next((base for base in LABELS_FOLDERS if base + LABELS_FILE in there), None)
    rows = sorted(name for name in there if name.startswith(base or "") and name[-4:] in SUFFIXES)
    if not rows:
        raise InputError(f"no .npy or .npz is there: {_GIVE}")
    if other := [name for name in rows if name[-4:] != rows[0][-4:]]:
        raise InputError(f"{other[0]!r} is beside {rows[0]!r}: keep .npy and .npz apart")
    if base is not None:
        return rows, _labels_by_list(files.read(base + LABELS_FILE), base, rows), True
    if stray := [name for name in there if name.endswith("/" + LABELS_FILE)]:
        raise InputError(f"{min(stray)!r} is not beside all the folders: give its folder")
    if all(map(_OF_EDM2.fullmatch, rows)):
        return rows, None, True
    return rows, _labels_by_folder(there, rows), False


def _labels_by_list(text: bytes, base: str, rows: Sequence[str]) -> list | None:
    """What LABELS_FILE gives each row; None without labels."""
    try:
        pairs = json.loads(text)["labels"]
        if pairs is None:
            return None
        labels = {base + name.replace("\\", "/"): label for name, label in pairs}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f'{base + LABELS_FILE!r} is not {{"labels": [["0/a.npy", 3], ...]}}, or '
                         "null for the list: write it so") from None
    if wrong := labels.keys() ^ set(rows):
        has, lacks = ("there", f"in {LABELS_FILE}")[:: -1 if min(wrong) in labels else 1]
        raise InputError(f"{min(wrong)!r} is {has}, but not {lacks}: make them agree")
    if len(labels) < len(pairs):
        raise InputError(f"{base + LABELS_FILE!r} lists a file twice: list each once")
    return [labels[name] for name in rows]


def _labels_by_folder(there: Iterable[str], rows: Sequence[str]) -> list | None:
    """The place of each row's folder among the folders; None where no row is in one."""
    if all("/" not in name for name in rows):
        return None
    if wrong := [name for name in rows if name.count("/") != 1]:
        raise InputError(f"{wrong[0]!r} is not in a folder of its class: give a folder of those")
    filled = [name.partition("/")[0] for name in rows]
    folders = {name.partition("/")[0] for name in there if "/" in name}
    if empty := folders - set(filled):
        raise InputError(f"the class folder {min(empty)!r} has no .npy or .npz: fill or remove it")
    number = {folder: i for i, folder in enumerate(sorted(folders))}
    return [number[folder] for folder in filled]


def _label(label: Any, limit: int | None, of: str = "") -> int:
    most = limit or MOST_LABELS
    is_number = isinstance(label, (int, float)) and not isinstance(label, bool)
    if not is_number or not 0 <= label < most or label != int(label):
        raise InputError(f"{of}its label {str(label)[:40]} is not a whole number from 0 to "
                         f"{most - 1}: correct it, or the number of classes")
    return int(label)


def _arrays(name: str, data: bytes) -> dict[str, bytes]:
    """The bytes of each array of a file, by its name in an .npz."""
    if name.endswith(".npy"):
        return {"moments": data}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            there = archive.namelist()
            return {array: archive.read(file) for array, file in _ENTRIES if file in there}
    except Exception as error:  # what zipfile raises is not documented
        raise InputError(f"is no .npz, or damaged ({type(error).__name__}): save it anew") from None


def _header_size(data: bytes) -> int:
    """How many bytes of an .npy file come before its values. Numbers have headers of version 1."""
    if data[:8] != b"\x93NUMPY\1\0":
        raise InputError(_DAMAGED)
    return 10 + int.from_bytes(data[8:10], "little")


@functools.lru_cache
def _header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype. Headers are alike, and parsing one takes longer than reading it."""
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header[8:]))
    except Exception:  # what it raises is not documented
        raise InputError(_DAMAGED) from None
    if dtype.kind not in "iuf":  # above all no objects, for bytes must not become pointers
        raise InputError(f"it holds {dtype}: {_REMEDY}")
    return shape, fortran, dtype


def _array(data: bytes) -> np.ndarray:
    """The array in the bytes of an .npy file."""
    start = _header_size(data)
    shape, fortran, dtype = _header(data[:start])
    try:
        values = np.frombuffer(data, dtype, offset=start)
        return values.reshape(shape, order="F" if fortran else "C")
    except ValueError:  # of the sizes
        raise InputError(_DAMAGED) from None


def _form(arrays: Mapping[str, bytes]) -> Form:
    """Of a file, of which the headers of its arrays are enough."""
    names = tuple(name for name in (*_MOMENTS, *_HALVES) if name in arrays)
    if names not in _ROWS:
        raise InputError(f"it holds {'+'.join(names) or 'no moments'}: give one of "
                         + ", ".join(map("+".join, _ROWS)))
    headers = [_header(arrays[name][: _header_size(arrays[name])]) for name in names]
    forms = [Form(names, shape, dtype, "label" in arrays) for shape, _, dtype in headers]
    for form in forms:
        _check_same(form, forms[0], "its first array")
    return forms[0]


def _check_same(form: Form, other: Form, whose: str) -> None:
    if form != other:
        raise InputError(f"it holds {form}, but {whose} {other}: keep mixed resolutions, types and "
                         "contents apart")


def _common_form(files: "_Folder | _Archive", names: Sequence[str]) -> Form:
    """That of the first row, and of a few others."""
    forms = []
    for i in np.linspace(0, len(names) - 1, min(LOOKED_INTO, len(names))).astype(int):
        with _about(repr(names[i])):
            size = _header_size(files.read(names[i], 10)) if names[i].endswith(".npy") else -1
            forms.append(_form(_arrays(names[i], files.read(names[i], size))))
            _check_same(forms[-1], forms[0], repr(names[0]))
    return forms[0]


def _layout(form: Form, of_edm2: bool) -> tuple[tuple[int, int, int], tuple[int, int, int, int]]:
    """Axes and shape of a row. Channels are the smallest axis, or the first in EDM2's layout."""
    sizes, parts = form.shape, 1 if form.arrays[0] == "moments" else 2
    if len(sizes) != 3 or form.dtype.newbyteorder("=") not in (np.float16, np.float32):
        raise InputError(f"it holds {form}: {_REMEDY}")
    known = of_edm2 and sizes[1] == sizes[2]
    axis = 0 if known else sizes.index(min(sizes))
    clear = known or (axis != 1 and sizes.count(min(sizes)) == 1)
    if not clear or sizes[axis] * parts % 2 or min(sizes) < 1:
        raise InputError(f"which axis of {sizes} is that of the channels is not clear: {_REMEDY}, "
                         "and 2c is even and below h and w")
    axes = (1, 2, 0) if axis == 0 else (0, 1, 2)
    height, width, channels = (sizes[axis] for axis in axes)
    return axes, (len(form.arrays) // parts, height, width, channels * parts)


class _Folder:
    """Files by their names below a folder, with slashes."""

    def __init__(self, path: str):
        self._path = os.path.join(path, "")

    def names(self, below: str = "") -> Iterator[str]:
        """Of all that is not hidden; those of folders end in a slash."""
        with os.scandir(self._path + below) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    name = below + entry.name + "/" * entry.is_dir()
                    yield name
                    if name.endswith("/"):
                        yield from self.names(name)

    def read(self, name: str, size: int = -1) -> bytes:
        """The first bytes of a file, or all."""
        with open(self._path + name, "rb", buffering=0) as file:
            return file.read(size)


class _Archive:
    """The same of a .zip, opened anew for every read so that threads need not take turns."""

    def __init__(self, path: str):
        self._path, self._entries = path, {}
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except Exception as error:  # what zipfile raises is not documented
            raise InputError("is no folder, and no .zip, or a damaged one "
                             f"({type(error).__name__}): {_GIVE}") from None
        for entry in entries:
            if entry.flag_bits & 1 or entry.compress_type not in (0, zipfile.ZIP_DEFLATED):
                raise InputError(f"{entry.filename!r} is encrypted or strangely packed: use zip -0")
            at, sizes = entry.header_offset, (entry.compress_size, entry.file_size)
            self._entries[entry.filename] = at, *sizes, entry.compress_type

    def names(self) -> list[str]:
        return [name for name in self._entries if "/." not in f"/{name}"]

    def read(self, name: str, size: int = -1) -> bytes:
        start, packed, whole, deflated = self._entries[name]
        wanted = whole if size < 0 else min(size, whole)
        with open(self._path, "rb", buffering=0) as file:
            file.seek(start)
            # These end with the lengths of the two fields before the contents.
            lengths = np.frombuffer(file.read(30)[26:].ljust(4), "<u2")
            file.seek(int(lengths.sum()), os.SEEK_CUR)
            # The start of what is deflated may be longer than what it unfolds to.
            data = file.read(packed if size < 0 else min(packed, size + 1000))
        try:
            if deflated:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, wanted + 1)
        except zlib.error:
            data = b""
        if len(data) < wanted:
            raise InputError("is damaged in the archive: pack it again")
        return data[:wanted]
