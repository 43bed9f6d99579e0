"""Sets of images of one size, by index: files, arrays, or the rows of a dataset."""

import concurrent.futures
import dataclasses
import os
import zipfile
from typing import Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Int, Int64, UInt8

from dmf.data.crop import center_crop, upright_rgb
from dmf.data.image_files import ImageFiles, UnreadableImage, open_images
from dmf.data.originals import TfdsImages, open_originals
from dmf.data.sources import Source, is_dataset, open_source
from dmf.typing import InputError

ARRAY = "arr_0"
_GREY = ("1", "L")


@runtime_checkable
class ImageSet(Protocol):
    """Images of one size.

    Attributes:
      name: what to call it.
      shape: (h, w, c) of an image; c is 1 or 3.
      notes: what a reader of numbers about it should know, empty if nothing.
    """

    name: str
    shape: tuple[int, ...]
    notes: str

    def __len__(self) -> int:
        """How many there are."""

    def read(self, indices: Int[np.ndarray, "m"]) -> UInt8[np.ndarray, "m h w c"]:
        """Some of them; raises InputError where one cannot be read, or is of another size."""

    def labels(self) -> Int64[np.ndarray, "n"] | None:
        """The label of each, None without labels."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ArrayImages:
    """Images of an `.npz`, which stays on disk if it is not compressed."""

    name: str
    array: UInt8[np.ndarray, "n h w c"]
    classes: Int64[np.ndarray, "n"] | None
    notes: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image."""
        return self.array.shape[1:]

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: Int[np.ndarray, "m"]) -> UInt8[np.ndarray, "m h w c"]:
        """Some of the images."""
        return np.asarray(self.array[indices])

    def labels(self) -> Int64[np.ndarray, "n"] | None:
        """The label of each."""
        return self.classes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DatasetImages:
    """The rows of a dataset of images."""

    source: Source
    notes: str = ""

    @property
    def name(self) -> str:
        """That of the dataset."""
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image."""
        return self.source.shape

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Int[np.ndarray, "m"]) -> UInt8[np.ndarray, "m h w c"]:
        """Some of the images."""
        return self.source.read(indices.tolist())[0]

    def labels(self) -> Int64[np.ndarray, "n"] | None:
        """The label of each."""
        return self.source.labels() if self.source.num_classes else None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FileImages:
    """Image files, or images that a TFDS dataset stores; all of one size, or cut to it.

    Attributes:
      name, shape, notes: as of every set.
      images: that are decoded.
      about: what messages begin with.
      side: of the centre crop; 0 where images are taken as they are.
    """

    name: str
    images: ImageFiles | TfdsImages
    shape: tuple[int, ...]
    about: str
    side: int = 0
    notes: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Int[np.ndarray, "m"]) -> UInt8[np.ndarray, "m h w c"]:
        """Some of the images, decoded in threads."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "decode") as pool:
            return np.stack(list(pool.map(self._one, indices.tolist())))

    def _one(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        pixels = _pixels(self.images, index, self.side, self.about, grey=self.shape[2] == 1)
        if pixels.shape != self.shape:
            first, this = self.images.names[0], self.images.names[index]
            raise InputError(f"{self.about}: {this} has the shape {pixels.shape}, and {first} has "
                             f"{self.shape}; give images of one size, or --resolution=SIDE, which "
                             "cuts squares")
        return pixels

    def labels(self) -> Int64[np.ndarray, "n"] | None:
        """The label of each."""
        return self.images.labels


def _pixels(
    images: ImageFiles | TfdsImages, index: int, side: int, about: str, *, grey: bool
) -> UInt8[np.ndarray, "h w c"]:
    """An image as an array; a grey one has one channel only where all are meant to."""
    file = images.names[index]
    try:
        image = images.image(index)
        if side:
            return center_crop(image, side)
    except UnreadableImage as error:
        raise InputError(f"{about}: {error}; take it out, or make it anew") from None
    except InputError as error:
        raise InputError(f"{about}: {file}: {error}") from None
    pixels = np.asarray(upright_rgb(image))
    return pixels[..., :1] if grey and image.mode in _GREY else pixels


def open_image_set(source: str, *, side: int = 0, field: str = "images") -> ImageSet:
    """Opens a set of images.

    Args:
      source: an `.npz` with `arr_0`, uint8 [n, h, w, c] (and `labels`); a folder, .zip or .tar of
        image files; a dataset of crops that `dmf prepare` wrote; or a TFDS name. Files that are no
        images are passed over, and noted.
      side: of the centre crop that images are cut to; 0 takes them as they are. Where the first
        file is grey and is not cut, so are all, and have one channel; else all have three.
      field: what messages call the source.

    Raises:
      InputError: there is no such set, or it has no images.
    """
    path, about = epath.Path(source), f"{field}={source}"
    if path.suffix == ".npz":
        if side:
            raise InputError(f"resolution={side}: the images of {source} are taken as they are; "
                             "leave it out")
        return _open_array(path, about)
    if is_dataset(source):
        rows = open_source(path.name, directory=source)
        if len(rows.shape) != 3:
            raise InputError(f"{about}: its rows are latents; give images")
        return DatasetImages(source=rows)
    try:
        if path.exists() or source.startswith(("/", ".", "~")):
            images, name = open_images(source), path.name
        else:
            images, name = open_originals(source), source
    except InputError as error:
        told = str(error).removeprefix(f"source={source}: ")
        raise InputError(f"{about}: {told}") from None
    others = images.others if isinstance(images, ImageFiles) else ()
    notes = ""
    if others:
        some = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        notes = f"passed over {len(others)} that are no images: {some}"
    shape = _pixels(images, 0, side, about, grey=True).shape
    return FileImages(name=name, images=images, shape=shape, about=about, side=side, notes=notes)


def _open_array(path: epath.Path, about: str) -> ArrayImages:
    remedy = f"give an .npz with {ARRAY}, uint8 [n, h, w, c] of 1 or 3 channels"
    if not path.is_file():
        raise InputError(f"{about}: there is no such file; {remedy}")
    try:
        with np.load(os.fspath(path), allow_pickle=False) as file:
            names = file.files
            labels = file["labels"] if "labels" in names else None
        array = _mapped(path) if ARRAY in names else None
    except Exception as error:  # what zipfile, zlib and numpy raise is not all documented
        raise InputError(f"{about}: no .npz, or a damaged one ({error})") from None
    if array is None:
        raise InputError(f"{about}: it has {', '.join(names) or 'nothing'}; {remedy}")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or not len(array):
        raise InputError(f"{about}: {ARRAY} is {array.dtype} {array.shape}; {remedy}")
    if labels is not None and (labels.shape != (len(array),) or labels.dtype.kind not in "iu"):
        raise InputError(f"{about}: labels are {labels.dtype} {labels.shape}; give {len(array)} "
                         "whole numbers, or none")
    classes = None if labels is None else labels.astype(np.int64)
    return ArrayImages(name=path.name, array=array, classes=classes)


def _mapped(path: epath.Path) -> np.ndarray:
    """The array as it lies in the file, or in memory if it is compressed there."""
    name = f"{ARRAY}.npy"
    with zipfile.ZipFile(os.fspath(path)) as archive:
        entry = archive.getinfo(name)
        with archive.open(name) as member:
            version = np.lib.format.read_magic(member)
            read = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                    else np.lib.format.read_array_header_2_0)
            shape, fortran, dtype = read(member)
            start = member.tell()
    if entry.compress_type != zipfile.ZIP_STORED or dtype.hasobject:
        with np.load(os.fspath(path), allow_pickle=False) as file:
            return file[ARRAY]
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
    start += entry.header_offset + 30 + int(lengths.sum())
    order = "F" if fortran else "C"
    return np.memmap(os.fspath(path), dtype, "r", offset=start, shape=shape, order=order)
