"""Sets of images of one size, by index: image files, arrays, or the samples of a dataset."""

import dataclasses
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Int, Int64, UInt8

from dmf.data.datasets import Dataset, open_dataset
from dmf.data.image_files import NO_IMAGES, UnreadableImage, open_images
from dmf.data.image_transforms import center_crop, upright_rgb
from dmf.data.pixels import IMAGE_CHANNELS
from dmf.data.raw_images import RawImages, decoded, open_raw_images
from dmf.data.tfds_records import is_dataset
from dmf.data.webdataset import find_shards
from dmf.errors import InputError
from dmf.runtime.files import is_regular_file
from dmf.runtime.paths import user_path
from dmf.runtime.thread_pool import ThreadPool

ARRAY = "arr_0"
_GREY_MODES = ("1", "L")
_GIVE_ARRAY = f"give an .npz with {ARRAY}, uint8 [n, h, w, c] of 1 or 3 channels"


@runtime_checkable
class ImageSet(Protocol):
    """Images of one size.

    Attributes:
      name: name of the set.
      shape: (h, w, c) of an image; c is 1 or 3.
      notes: what a reader of measurements of the set should know; empty if nothing.
    """

    name: str
    shape: tuple[int, ...]
    notes: str

    def __len__(self) -> int:
        """Number of images."""

    def read(self, indices: Int[np.ndarray, "m"]) -> UInt8[np.ndarray, "m h w c"]:
        """Several images.

        Raises:
          InputError: an image cannot be read or is of another size.
        """

    def labels(self) -> Int64[np.ndarray, "n"] | None:
        """The label of each image; None without labels."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ArrayImages:
    """Images of an `.npz`, which stay on disk if they are not compressed.

    Attributes:
      name: name of the set.
      array: all images.
      all_labels: the label of each image; None without labels.
      notes: see `ImageSet`.
    """

    name: str
    array: UInt8[np.ndarray, "n h w c"]
    all_labels: Int64[np.ndarray, "n"] | None
    notes: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """(h, w, c) of an image."""
        return self.array.shape[1:]

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: Int[np.ndarray, "m"]) -> UInt8[np.ndarray, "m h w c"]:
        """Several images."""
        return np.asarray(self.array[indices])

    def labels(self) -> Int64[np.ndarray, "n"] | None:
        """The label of each image; None without labels."""
        return self.all_labels


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DatasetImages:
    """The images of a dataset.

    Attributes:
      dataset: the dataset.
      field: the field of its rows that holds the images: "x" for its samples, or "images" for those
        that its latents were encoded from.
      notes: see `ImageSet`.
    """

    dataset: Dataset
    field: str = "x"
    notes: str = ""

    @property
    def name(self) -> str:
        """Name of the dataset."""
        return self.dataset.name

    @property
    def shape(self) -> tuple[int, ...]:
        """(h, w, c) of an image."""
        return self.dataset.shape if self.field == "x" else self.read(np.zeros(1, int)).shape[1:]

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: Int[np.ndarray, "m"]) -> UInt8[np.ndarray, "m h w c"]:
        """Several images."""
        return self.dataset.read(indices.tolist())[self.field]

    def labels(self) -> Int64[np.ndarray, "n"] | None:
        """The label of each image; None without labels."""
        return self.dataset.labels() if self.dataset.num_classes else None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FileImages:
    """Image files, or images that a TFDS dataset stores: all of one size, or cropped to one.

    Attributes:
      name: name of the set.
      images: the images as they are stored.
      shape: (h, w, c) of an image; c is 1 if all images are grey.
      source: the source of the images, as the user gave it.
      field: name of the field or flag that gave the source, for messages.
      side: side of the centre crop; 0 for no crop.
      notes: see `ImageSet`.
    """

    name: str
    images: RawImages
    shape: tuple[int, ...]
    source: str
    field: str
    side: int = 0
    notes: str = ""
    _threads: ThreadPool = dataclasses.field(
        init=False, default_factory=lambda: ThreadPool(os.cpu_count(), "decode")
    )

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Int[np.ndarray, "m"]) -> UInt8[np.ndarray, "m h w c"]:
        """Several images, decoded in threads, see `ImageSet`."""
        try:
            return np.stack(self._threads.map(self._read_one, indices.tolist()))
        except InputError as error:
            raise InputError(self.field, self.source, str(error)) from None

    def _read_one(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        pixels = _decode(self.images, index, self.side, keep_grey=self.shape[2] == 1)
        if pixels.shape != self.shape:
            raise InputError(
                "", remedy=f"{self.images.names[index]} has the shape {pixels.shape}, and "
                f"{self.images.names[0]} has {self.shape}; give images of one size, or "
                "--resolution=SIDE, which crops squares",
            )
        return pixels

    def labels(self) -> Int64[np.ndarray, "n"] | None:
        """The label of each image; None without labels."""
        return self.images.labels


def _decode(
    images: RawImages, index: int, side: int, *, keep_grey: bool
) -> UInt8[np.ndarray, "h w c"]:
    """An image as an array; grey images have one channel if `keep_grey` is set."""
    try:
        with decoded(images, index) as image:
            if side:
                return center_crop(image, side)
            pixels = np.asarray(upright_rgb(image))
            return pixels[..., :1] if keep_grey and image.mode in _GREY_MODES else pixels
    except UnreadableImage as error:
        raise InputError("", remedy=f"{error}; take it out, or make it anew") from None
    except InputError as error:
        raise error.within(images.names[index]) from None


def open_image_set(source: str, *, side: int = 0, field: str = "images") -> ImageSet:
    """Opens a set of images.

    Args:
      source: an `.npz` with `arr_0`, uint8 [n, h, w, c], and perhaps `labels` [n]; a dataset of
        crops that `dmf prepare` wrote; or what `dmf.data.raw_images.open_raw_images` opens. Files
        that are no images are left out, which the notes of the set say.
      side: side of the centre crop; 0 for no crop. Without a crop, if the first file is grey, all
        files must be, and have one channel; otherwise all images have three.
      field: name of the field or flag that gave the source, for messages.

    Raises:
      InputError: there is no such set, or it has no images.
    """
    path = user_path(source)
    if side and (path.suffix == ".npz" or is_dataset(source)):
        raise InputError(
            "resolution", side, f"the images of {source} are taken as they are; leave it out"
        )
    try:
        if path.suffix == ".npz":
            return _open_array(path)
        if is_dataset(source):
            return _open_dataset(path)
        return _open_files(source, side, field)
    except InputError as error:
        is_about_source = error.field in ("", "source", "name")
        reason = error.remedy if is_about_source else str(error)
        raise InputError(field, source, reason) from None


def _open_dataset(path: epath.Path) -> DatasetImages:
    dataset = open_dataset(path.name, directory=str(path))
    if len(dataset.shape) == 3:
        return DatasetImages(dataset=dataset)
    try:
        with_images = open_dataset(path.name, directory=str(path), extra="images")
    except InputError:
        raise InputError("", remedy="its samples are latents; give images, or latents that dmf "
                         "prepare --keep-images made") from None
    return DatasetImages(dataset=with_images, field="images")


def _open_files(source: str, side: int, field: str) -> FileImages:
    path = user_path(source)
    is_path = path.exists() or source.startswith(("/", ".", "~"))
    # A path that is not there is no TFDS name; a pattern of shards is no path.
    is_missing = is_path and not path.exists() and not find_shards(source)
    images = open_images(source) if is_missing else open_raw_images(source)
    name = path.name if is_path else source
    shape = _decode(images, 0, side, keep_grey=True).shape
    return FileImages(
        name=name, images=images, shape=shape, source=source, field=field, side=side,
        notes=_notes(images.left_out),
    )  # fmt: skip


def _notes(left_out: Mapping[str, Sequence[str]]) -> str:
    """What a set says about the files that are left out because they are no images."""
    other_files = sorted(name for reason, names in left_out.items()
                         if reason.startswith(NO_IMAGES) for name in names)
    if not other_files:
        return ""
    some = ", ".join(other_files[:3]) + ", ..." * (len(other_files) > 3)
    return f"left out {len(other_files)} files that are no images: {some}"


def _open_array(path: epath.Path) -> ArrayImages:
    if not is_regular_file(path):
        raise InputError("", remedy=f"there is no such file; {_GIVE_ARRAY}")
    try:
        with np.load(os.fspath(path), allow_pickle=False) as file:
            names = file.files
            labels = file["labels"] if "labels" in names else None
        array = _memory_map(path) if ARRAY in names else None
    except Exception as error:  # Python does not document all that zipfile, zlib and NumPy raise.
        raise InputError("", remedy=f"no .npz, or a damaged one ({error})") from None
    if array is None:
        raise InputError("", remedy=f"it has {', '.join(names) or 'nothing'}; {_GIVE_ARRAY}")
    is_valid = array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] in IMAGE_CHANNELS
    if not is_valid or not len(array):
        raise InputError("", remedy=f"{ARRAY} is {array.dtype} {array.shape}; {_GIVE_ARRAY}")
    if labels is not None and (labels.shape != (len(array),) or labels.dtype.kind not in "iu"):
        raise InputError("", remedy=f"labels are {labels.dtype} {labels.shape}; give {len(array)} "
                         "whole numbers, or none")
    return ArrayImages(
        name=path.name, array=array,
        all_labels=None if labels is None else labels.astype(np.int64),
    )  # fmt: skip


def _memory_map(path: epath.Path) -> np.ndarray:
    """The array of an .npz as it lies in the file; in memory if it is compressed."""
    with zipfile.ZipFile(os.fspath(path)) as archive:
        entry = archive.getinfo(f"{ARRAY}.npy")
        with archive.open(entry) as member:
            version = np.lib.format.read_magic(member)
            read_header = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                           else np.lib.format.read_array_header_2_0)
            shape, fortran, dtype = read_header(member)
            header_size = member.tell()
    if entry.compress_type != zipfile.ZIP_STORED or dtype.hasobject:
        with np.load(os.fspath(path), allow_pickle=False) as file:
            return file[ARRAY]
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
    start = entry.header_offset + 30 + int(lengths.sum()) + header_size
    order = "F" if fortran else "C"
    return np.memmap(os.fspath(path), dtype, "r", offset=start, shape=shape, order=order)
