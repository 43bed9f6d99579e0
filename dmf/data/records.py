"""Records of a TFDS dataset as arrays, without TensorFlow.

Values that are stored as the bytes of an array, and encoded images beside them, are taken out of an
example directly, at a third of the time of TFDS's decoding; all else is left to TFDS.
"""

import concurrent.futures
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from dmf.typing import InputError

LABELS_FILE = "labels.npy"


class Field(NamedTuple):
    """A feature of a dataset.

    Attributes:
      name: its own.
      shape, dtype: of a value.
      encoded: whether an example holds it as the file of an image, and not as bytes of an array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    encoded: bool = False

    @property
    def size(self) -> int:
        """Bytes of a value."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def taken(self, example: Mapping[str, Any]) -> np.ndarray:
        """The value in the features of an example."""
        stored = example[self.name].bytes_list.value[0]
        if not self.encoded:
            return np.frombuffer(stored, self.dtype).reshape(self.shape)
        with PIL.Image.open(io.BytesIO(stored)) as image:
            pixels = np.asarray(image)
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def checked(self, value: np.ndarray, dataset: str) -> np.ndarray:
        """The value itself.

        Raises:
          InputError: it has another shape.
        """
        if value.shape != self.shape:
            raise InputError(f"data.name={dataset}: its images have several shapes, {value.shape} "
                             f"and {self.shape}; make them one with dmf prepare")
        return value


def is_packed(feature: Any) -> bool:
    """Whether a feature's values are stored as the bytes of an array, and nothing else."""
    return type(feature) is tfds.features.Tensor and feature.to_json_content().encoding == "bytes"


def is_encoded(feature: Any) -> bool:
    """Whether a feature's values are stored as files of 8-bit images, all of one shape."""
    image = type(feature) is tfds.features.Image and np.dtype(feature.np_dtype) == np.uint8
    return image and None not in feature.shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSource:
    """A split of a TFDS dataset with a feature `image` or `moments`, and perhaps `label`.

    Attributes:
      name, num_classes: as of every source.
      row: the feature that is a row.
      beside: one that is read along with it, or none.
      records: TFDS's data source, of serialized examples if `packed`, else of decoded ones.
      packed: whether values are taken out of examples here.
      directory: where the dataset lies.
    """

    name: str
    num_classes: int
    row: Field
    beside: Field | None
    records: Any
    packed: bool
    directory: epath.Path

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""
        return self.row.shape

    @property
    def size(self) -> int:
        """Bytes of all that is read."""
        return len(self) * sum(field.size for field in self._fields)

    @property
    def _fields(self) -> list[Field]:
        return [field for field in (self.row, self.beside) if field]

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Several rows at once, see `dmf.data.sources.Source`."""
        fields = self._fields
        values = [np.empty((len(indices), *field.shape), field.dtype) for field in fields]
        labels = np.zeros(len(indices), np.int32)

        def fill(i: int, record: Any) -> None:
            example = self._example(record)
            for field, found in zip(fields, values, strict=True):
                value = field.taken(example) if self.packed else example[field.name]
                found[i] = field.checked(value, self.name)
            labels[i] = self._label(example)

        records = self.records.__getitems__(list(map(int, indices)))
        if self.packed and any(field.encoded for field in fields):
            # Decoding takes longer than all else, and threads do not hinder each other at it.
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "decode") as pool:
                list(pool.map(fill, range(len(indices)), records))
        else:
            list(map(fill, range(len(indices)), records))
        return values[0], labels, *values[1:]

    def _example(self, record: Any) -> Mapping[str, Any]:
        return tf_example_pb2.Example.FromString(record).features.feature if self.packed else record

    def _label(self, example: Mapping[str, Any]) -> int:
        if not self.num_classes:
            return 0
        return example["label"].int64_list.value[0] if self.packed else example["label"]

    def labels(self) -> np.ndarray:
        """All labels: from a file beside the records if there is one, else by reading them."""
        stored = self.directory / LABELS_FILE
        if stored.exists() and len(found := np.load(io.BytesIO(stored.read_bytes()))) == len(self):
            return found
        parts = [self.read(range(i, min(i + 1000, len(self))))[1]
                 for i in range(0, len(self), 1000)]
        return np.concatenate(parts).astype(np.int64)
