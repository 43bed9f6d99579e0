"""Images of any size, which `dmf prepare` crops: files, archives, shards, parquet files, or a TFDS
dataset."""

import contextlib
import dataclasses
import functools
import importlib.util
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from dmf.data.image_files import UnreadableImage, open_images
from dmf.data.image_transforms import load_pixels, open_image
from dmf.data.parquet_files import is_parquet
from dmf.data.parquet_images import open_parquet
from dmf.data.tfds_records import damage_named, open_builder, open_records
from dmf.data.webdataset import find_shards, open_shards
from dmf.errors import InputError
from dmf.runtime.memory_budget import MemoryBudget
from dmf.runtime.paths import user_path

Record = Mapping[str, Any]
BLOCK = 256
# Of all threads together: for the bytes of files, and for pixels, of which a decoded image and its
# copies (turned, with and without transparency) take up to four times four bytes.
_FILE_MEMORY = MemoryBudget(2**30)
_PIXEL_MEMORY = MemoryBudget(3 * 2**30)
_BYTES_PER_PIXEL = 16


@runtime_checkable
class RawImages(Protocol):
    """Images of any size, with labels, by their index.

    `dmf.data.image_files.ImageFiles`, `dmf.data.webdataset.ShardedImages`,
    `dmf.data.parquet_images.ParquetImages` and `TfdsImages` are such.

    Attributes:
      names: name of each image in reports.
      labels: [n] indices into class_names; None for images without labels.
      class_names: names of the labels; empty for images without labels.
      source: the folder or archive, or the name of the dataset, of the images.
      left_out: names of files that are left out, by the reason.
    """

    names: Sequence[str]
    labels: np.ndarray | None
    class_names: Sequence[str]
    source: str
    left_out: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        """Number of images."""

    def file_size(self, index: int) -> int:
        """Number of bytes that `open` reads for an image; 0 if it reads none anew."""

    def open(self, index: int) -> PIL.Image.Image:
        """One image, of which only the header needs to be decoded. Any number of threads may call
        it at once.

        Raises:
          UnreadableImage: the file of the image is damaged.
        """


@contextlib.contextmanager
def decoded(images: RawImages, index: int) -> Iterator[PIL.Image.Image]:
    """An image, decoded, in a context that bounds the memory of all threads together.

    Args:
      images: the images.
      index: index of an image.

    Yields:
      The image as it is stored; it is not turned upright yet.

    Raises:
      UnreadableImage: the file of the image is damaged.
    """
    with _FILE_MEMORY.hold(images.file_size(index)):
        image = images.open(index)
        with _PIXEL_MEMORY.hold(_BYTES_PER_PIXEL * image.width * image.height):
            try:
                load_pixels(image)
            except ValueError as error:
                raise UnreadableImage(images.names[index], str(error)) from error
            yield image


class SequentialRecords:
    """Records by index, which TFDS and TensorFlow can only read one after the other.

    Records are read in blocks of `BLOCK`, and two blocks stay in memory. Any number of threads may
    read at once.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, decoders: Any):
        """Opens a split.

        Args:
          builder: builder of a prepared dataset.
          split: a split, not a slice of one.
          decoders: TFDS decoders by feature.
        """
        self._builder, self._split, self._decoders = builder, split, decoders
        self._blocks: dict[int, list[Record]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._builder.info.splits[self._split].num_examples

    def __getitem__(self, index: int) -> Record:
        number, offset = divmod(index, BLOCK)
        with self._lock:
            if number not in self._blocks:
                first = number * BLOCK
                self._blocks[number] = list(self._read(first, min(first + BLOCK, len(self))))
                for far in sorted(self._blocks, key=lambda n: abs(n - number))[2:]:
                    del self._blocks[far]
            return self._blocks[number][offset]

    def __iter__(self) -> Iterator[Record]:
        return self._read(0, len(self))

    def _read(self, start: int, stop: int) -> Iterator[Record]:
        """Records start to stop - 1, in their order on disk."""
        span = tfds.core.ReadInstruction(self._split, from_=start, to=stop, unit="abs")
        return iter(tfds.as_numpy(self._builder.as_dataset(
            split=span, decoders=self._decoders, read_config=tfds.ReadConfig(
                interleave_cycle_length=1, try_autocache=False
            ),
        )))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsImages:
    """The images of a split of a TFDS dataset.

    Attributes:
      records: records by index; "image" is the bytes of an image file, or pixels.
      name: name of the dataset and the split, as "NAME/SPLIT".
      class_names: names of the labels; empty for a dataset without labels.
    """

    records: SequentialRecords | Sequence[Record]
    name: str
    class_names: Sequence[str]
    left_out: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    @property
    def source(self) -> str:
        """Name of the dataset and the split."""
        return self.name

    def __len__(self) -> int:
        return len(self.records)

    @functools.cached_property
    def names(self) -> list[str]:
        """Name of each image in reports: that of the split, and the index of the image."""
        return [f"{self.name}/{i}" for i in range(len(self))]

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """Label of each image, [n] int64, which takes a pass over the dataset; None without."""
        if not self.class_names:
            return None
        with damage_named(self.name):
            return np.array([record["label"] for record in self.records], np.int64)

    def file_size(self, index: int) -> int:
        """0: records are read in blocks."""
        return 0

    def open(self, index: int) -> PIL.Image.Image:
        """One image, of which only the header is decoded if it is a file.

        Raises:
          UnreadableImage: the file of the image is damaged.
          RunError: the files of the dataset are damaged.
        """
        with damage_named(self.name):
            image = self.records[index]["image"]
        if isinstance(image, np.ndarray):
            return PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        try:
            return open_image(image)
        except ValueError as error:
            raise UnreadableImage(self.names[index], str(error)) from error


def open_raw_images(
    source: str, *, labels: str = "", split: str = "train", directory: str = "",
    image_column: str = "", label_column: str = "", class_count: int = 0,
) -> RawImages:
    """Opens images of any size, with their labels, in a fixed order.

    Args:
      source: a folder, a .zip or .tar archive, the shards of a WebDataset (see
        `dmf.data.webdataset.find_shards`), parquet files in a local folder or of `hf:OWNER/DATASET`
        (see `dmf.data.parquet_files.find_files`), or a TFDS name.
      labels: the labels file of a flat folder, see `dmf.data.image_files.open_images`.
      split: split of parquet files or of a TFDS name.
      directory: the directory in which TFDS keeps its datasets; empty for TFDS's default.
      image_column: column of images in parquet files; empty to find it.
      label_column: column of labels in parquet files, or field of labels in the .json files of a
        WebDataset; empty to find it.
      class_count: number of classes of parquet files or of a WebDataset; 0 for those that the files
        state, or else for the largest label + 1.

    Raises:
      InputError: the source does not exist or cannot be read, its labels are wrong, or an option
        has no effect on it; its field is "source" or the flag of an option. Records other than
        ArrayRecord need TensorFlow, which reads them if installed.
    """
    options = {"labels-file": labels, "split": split.removeprefix("train") and split,
               "data-directory": directory, "image-column": image_column,
               "label-column": label_column, "num-classes": class_count}
    if class_count < 0:
        raise InputError("num-classes", class_count, "give a whole number >= 0")
    if is_parquet(source):
        _refuse(options, "parquet files", "labels-file", "data-directory")
        return open_parquet(source, split=split, image_column=image_column,
                            label_column=label_column, class_count=class_count)
    if not labels and (shards := find_shards(source)):
        _refuse(options, "a WebDataset", "split", "data-directory", "image-column")
        return open_shards(shards, source, label_field=label_column, class_count=class_count)
    if user_path(source).exists() or source.endswith((".zip", ".tar")):
        _refuse(options, "image files", "split", "data-directory", "image-column",
                "label-column", "num-classes")
        return open_images(source, labels=labels)
    _refuse(options, "a TFDS dataset", "labels-file", "image-column", "label-column", "num-classes")
    try:
        return _open_tfds(source, split, directory)
    except InputError as error:
        field = "source" if error.field == "name" else error.field
        raise InputError(field, error.value, error.remedy) from None


def _refuse(options: Mapping[str, Any], kind: str, *names: str) -> None:
    """Raises InputError for an option that has no effect on a kind of source."""
    for name in names:
        if options[name]:
            raise InputError(name, options[name], f"it has no effect on {kind}; leave it out")


def _open_tfds(name: str, split: str, directory: str) -> TfdsImages:
    builder = open_builder(name, directory)
    features = builder.info.features
    if "image" not in features:
        raise InputError("name", name, f"it has no feature 'image', but {', '.join(features)}")
    # TfdsImages decodes files itself, so that its error names the file that is damaged.
    is_file = isinstance(features["image"], tfds.features.Image)
    decoders = {"image": tfds.decode.SkipDecoding()} if is_file else None
    class_names = tuple(features["label"].names) if "label" in features else ()
    sequential = builder.info.file_format.value != "array_record" and split in builder.info.splits
    if sequential and importlib.util.find_spec("tensorflow"):
        records = SequentialRecords(builder, split, decoders)
    else:
        method = tfds.decode.DeserializeMethod.DESERIALIZE_AND_DECODE
        records = open_records(builder, name, split, method, decoders=decoders)
    return TfdsImages(records=records, name=f"{name}/{split}", class_names=class_names)
