"""Images to be prepared, wherever they are: files, archives, or a TFDS dataset."""

import dataclasses
import functools
import importlib.util
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from etils import epath

from dmf.data.crop import decode
from dmf.data.image_files import ImageFiles, UnreadableImage, open_images
from dmf.data.sources import DEFAULT_DIRECTORY, tfds_builder, tfds_records
from dmf.typing import InputError

Record = Mapping[str, Any]
BLOCK = 256


class SequentialRecords:
    """Records that TFDS reads one after the other with TensorFlow, by index: a block of them is
    read at once, and the last two blocks are kept."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, decoders: Any):
        self._builder, self._split, self._decoders = builder, split, decoders
        self._blocks: dict[int, list[Record]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._builder.info.splits[self._split].num_examples

    def __getitem__(self, index: int) -> Record:
        number, place = divmod(index, BLOCK)
        with self._lock:
            if number not in self._blocks:
                first = number * BLOCK
                self._blocks[number] = list(self._read(first, min(first + BLOCK, len(self))))
                for old in sorted(self._blocks, key=lambda n: abs(n - number))[2:]:
                    del self._blocks[old]
            return self._blocks[number][place]

    def __iter__(self) -> Iterator[Record]:
        return self._read(0, len(self))

    def _read(self, start: int, stop: int) -> Iterator[Record]:
        """Records start to stop - 1 in their order on disk."""
        rows = tfds.core.ReadInstruction(self._split, from_=start, to=stop, unit="abs")
        return iter(tfds.as_numpy(self._builder.as_dataset(
            split=rows, decoders=self._decoders, read_config=tfds.ReadConfig(
                interleave_cycle_length=1, try_autocache=False
            ),
        )))


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """The images of a split of a TFDS dataset, as they were stored.

    Attributes:
      records: by index; `image` is the bytes of a file, or pixels.
      name: of the dataset and split.
      class_names: of its labels, empty where there are none.
    """

    records: Any
    name: str
    class_names: Sequence[str]

    def __len__(self) -> int:
        return len(self.records)

    @functools.cached_property
    def names(self) -> list[str]:
        """What a report calls each image: its place in the dataset."""
        return [f"{self.name}/{i}" for i in range(len(self))]

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """The label of each, which takes a pass over the dataset."""
        if not self.class_names:
            return None
        return np.array([record["label"] for record in self.records], np.int64)

    def image(self, index: int) -> PIL.Image.Image:
        """One image.

        Raises:
          UnreadableImage: its file is damaged.
        """
        image = self.records[index]["image"]
        if isinstance(image, np.ndarray):
            return PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        try:
            return decode(image)
        except ValueError as error:
            raise UnreadableImage(self.names[index], str(error)) from error


def open_originals(
    source: str, *, labels: str = "", split: str = "train", directory: str = ""
) -> ImageFiles | TfdsImages:
    """Images with labels, in a fixed order.

    Args:
      source: a folder or an archive, or else a TFDS name.
      labels: the labels file of a flat folder.
      split, directory: of a TFDS name, and where TFDS keeps its datasets.

    Raises:
      InputError: nothing is there, or it cannot be read; records other than ArrayRecord need
        TensorFlow, which is used where it is installed.
    """
    if epath.Path(source).exists() or source.endswith((".zip", ".tar")):
        return open_images(source, labels=labels)
    builder = tfds_builder(source, directory or DEFAULT_DIRECTORY, field="source")
    features = builder.info.features
    if "image" not in features:
        raise InputError(f"source={source}: it has no feature 'image', but {', '.join(features)}")
    # Files are decoded here, so that one that is damaged is known by its name.
    stored = isinstance(features["image"], tfds.features.Image)
    decoders = {"image": tfds.decode.SkipDecoding()} if stored else None
    names = tuple(features["label"].names) if "label" in features else ()
    sequential = builder.info.file_format.value != "array_record" and split in builder.info.splits
    if sequential and importlib.util.find_spec("tensorflow"):
        return TfdsImages(SequentialRecords(builder, split, decoders), f"{source}/{split}", names)
    method = tfds.decode.DeserializeMethod.DESERIALIZE_AND_DECODE
    records = tfds_records(builder, source, split, method, decoders=decoders, field="source")
    return TfdsImages(records, f"{source}/{split}", names)
