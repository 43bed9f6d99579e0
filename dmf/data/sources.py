"""Datasets by name, as random-access rows. TFDS stores them; no TensorFlow is needed to read.

A TFDS dataset can be read here when it was prepared with `file_format="array_record"`. The digits
prepare themselves on first use. `dmf.data.samples` says what a row is.
"""

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from dmf.data.caches import open_cache
from dmf.data.digits import Digits
from dmf.typing import InputError

CACHE = "cache"
DEFAULT_DIRECTORY = tfds.core.constants.DATA_DIR
# Datasets up to this size are read once and kept.
RESIDENT_BYTES = 2**26
LABELS_FILE = "labels.npy"
_INFO_FILE = "dataset_info.json"


@runtime_checkable
class Source(Protocol):
    """Random-access rows of a dataset.

    Attributes:
      name: what to call it.
      num_classes: number of labels, 0 where there are none.
      shape: of a row.
    """

    name: str
    num_classes: int
    shape: tuple[int, ...]

    def __len__(self) -> int:
        """How many rows there are."""

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Rows [n, ...] as they are stored, and labels [n] int32, 0 where there are none."""

    def labels(self) -> np.ndarray:
        """The label of every row, int64."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSource:
    """A split of a TFDS dataset with a feature `image` or `moments`, and perhaps `label`.

    Attributes:
      name, num_classes, shape: as of every source.
      feature: which of the two it has.
      dtype: of its rows.
      records: TFDS's data source, of serialized examples if `packed`, else of decoded ones.
      packed: whether the feature's values are stored as the bytes of an array.
      directory: where the dataset lies.
    """

    name: str
    num_classes: int
    shape: tuple[int, ...]
    feature: str
    dtype: np.dtype
    records: Any
    packed: bool
    directory: epath.Path

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Several rows at once, see `Source`."""
        rows = np.empty((len(indices), *self.shape), self.dtype)
        labels = np.zeros(len(indices), np.int32)
        for i, record in enumerate(self.records.__getitems__(list(map(int, indices)))):
            rows[i], labels[i] = self._unpacked(record) if self.packed else self._decoded(record)
        return rows, labels

    def _unpacked(self, record: bytes) -> tuple[np.ndarray, int]:
        """The row in the bytes of an example: TFDS's decoding in the few lines that it takes here,
        at a third of its time."""
        features = tf_example_pb2.Example.FromString(record).features.feature
        row = np.frombuffer(features[self.feature].bytes_list.value[0], self.dtype)
        label = features["label"].int64_list.value[0] if self.num_classes else 0
        return row.reshape(self.shape), label

    def _decoded(self, record: Mapping[str, Any]) -> tuple[np.ndarray, int]:
        row = record[self.feature]
        if row.shape != self.shape:
            raise InputError(f"data.name={self.name}: its images have several shapes, {row.shape} "
                             f"and {self.shape}; make them one with dmf prepare")
        return row, record["label"] if self.num_classes else 0

    def labels(self) -> np.ndarray:
        """All labels: from a file beside the records if there is one, else by reading them."""
        stored = self.directory / LABELS_FILE
        if stored.exists() and len(found := np.load(io.BytesIO(stored.read_bytes()))) == len(self):
            return found
        parts = [self.read(range(i, min(i + 1000, len(self))))[1]
                 for i in range(0, len(self), 1000)]
        return np.concatenate(parts).astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidentSource:
    """A source whose rows are in memory."""

    name: str
    num_classes: int
    rows: np.ndarray
    all_labels: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""
        return self.rows.shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Several rows at once, see `Source`."""
        chosen = np.asarray(indices, np.int64)
        return self.rows[chosen], self.all_labels[chosen]

    def labels(self) -> np.ndarray:
        """All labels."""
        return self.all_labels.astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinedSource:
    """Parts of sources one behind the other: of each, the rows of some indices."""

    parts: tuple[tuple[Source, np.ndarray], ...]

    @property
    def name(self) -> str:
        """The names of all."""
        return " + ".join(source.name for source, _ in self.parts)

    @property
    def num_classes(self) -> int:
        """Those of the first; the others have as many."""
        return self.parts[0][0].num_classes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""
        return self.parts[0][0].shape

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many rows each part has."""
        return tuple(len(indices) for _, indices in self.parts)

    def __len__(self) -> int:
        return sum(self.lengths)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Several rows at once, see `Source`."""
        wanted, start = np.asarray(indices, np.int64), 0
        rows = labels = None
        for source, chosen in self.parts:
            here = np.flatnonzero((wanted >= start) & (wanted < start + len(chosen)))
            if len(here):
                found = source.read(chosen[wanted[here] - start].tolist())
                if rows is None:
                    rows = np.empty((len(wanted), *self.shape), found[0].dtype)
                    labels = np.empty(len(wanted), np.int32)
                rows[here], labels[here] = found
            start += len(chosen)
        return rows, labels

    def labels(self) -> np.ndarray:
        """All labels."""
        return np.concatenate([source.labels()[chosen] for source, chosen in self.parts])


@dataclasses.dataclass(frozen=True)
class Unlabelled:
    """A source whose labels are not looked at: all are 0, as a network without classes wants."""

    source: Source
    num_classes = 0

    @property
    def name(self) -> str:
        """That of the source."""
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""
        return self.source.shape

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Several rows at once, see `Source`."""
        rows, labels = self.source.read(indices)
        return rows, np.zeros_like(labels)

    def labels(self) -> np.ndarray:
        """All 0."""
        return np.zeros(len(self), np.int64)


def open_source(
    name: str, *, split: str = "train", directory: str = "", num_classes: int | None = None
) -> Source:
    """Opens a split of a prepared dataset.

    Args:
      name: "digits", "cache" for latents that another project cached, or a TFDS name as it was
        prepared, with config and version if need be; of no account where `directory` is a dataset.
      split: a TFDS split, slices such as "train[:90%]" included.
      directory: a dataset (what `dmf prepare` wrote, say), or where TFDS keeps its datasets, its
        default if empty.
      num_classes: of a cache, whose labels need not reach the last class.

    Raises:
      InputError: the dataset, its split or its features are not there, or its records cannot be
        read without TensorFlow; the message says what to do.
    """
    if name == CACHE:
        return open_cache(directory, num_classes=num_classes)
    builder = tfds_builder(name, directory or DEFAULT_DIRECTORY)
    features = builder.info.features
    feature = next((f for f in ("moments", "image") if f in features), None)
    if feature is None or (feature == "image"
                           and np.dtype(features["image"].np_dtype) != np.uint8):
        raise InputError(f"data.name={name}: it needs a feature 'image' of uint8 (h, w, c), or "
                         f"'moments'; it has {', '.join(features)}")
    packed = _is_packed(features[feature])
    methods = tfds.decode.DeserializeMethod
    method = methods.RAW_BYTES if packed else methods.DESERIALIZE_AND_DECODE
    records = tfds_records(builder, name, split, method)
    first = records[0] if not packed else None
    source = TfdsSource(
        name=name,
        num_classes=features["label"].num_classes if "label" in features else 0,
        shape=tuple(features[feature].shape if packed else first[feature].shape),
        feature=feature,
        dtype=np.dtype(features[feature].np_dtype),
        records=records,
        packed=packed,
        directory=epath.Path(builder.data_dir),
    )
    return _resident(source)


def _is_packed(feature: Any) -> bool:
    """Whether a feature's values are stored as the bytes of an array, and nothing else."""
    return type(feature) is tfds.features.Tensor and feature.to_json_content().encoding == "bytes"


def _resident(source: TfdsSource) -> Source:
    """The source itself, or its rows in memory if they are few."""
    if len(source) * int(np.prod(source.shape)) * source.dtype.itemsize > RESIDENT_BYTES:
        return source
    rows, labels = source.read(range(len(source)))
    return ResidentSource(
        name=source.name, num_classes=source.num_classes, rows=rows, all_labels=labels
    )


def tfds_records(
    builder: tfds.core.DatasetBuilder,
    name: str,
    split: str,
    method: tfds.decode.DeserializeMethod,
    *,
    decoders: Any = None,
    field: str = "data.name",
) -> Any:
    """The records of a split; `field` is what messages call the dataset's name.

    Raises:
      InputError: there is no such split, or they cannot be read without TensorFlow.
    """
    try:
        return builder.as_data_source(split=split, decoders=decoders, deserialize_method=method)
    except NotImplementedError:
        raise InputError(
            f"{field}={name}: prepared as {builder.info.file_format.value}, which needs "
            'TensorFlow to read; prepare it again with file_format="array_record"'
        ) from None
    except (KeyError, ValueError) as error:
        splits = ", ".join(builder.info.splits)
        raise InputError(
            f"{field.replace('name', 'split')}={split}: {name} has the splits {splits} "
            f"({str(error).splitlines()[0]})"
        ) from None


def is_dataset(directory: epath.PathLike) -> bool:
    """Whether a TFDS dataset lies there."""
    return (epath.Path(directory) / _INFO_FILE).exists()


def tfds_builder(
    name: str, directory: str, *, field: str = "data.name"
) -> tfds.core.DatasetBuilder:
    """A prepared dataset by name, or the one that lies in a directory itself.

    Raises:
      InputError: there is none; the message says how to prepare it.
    """
    if is_dataset(directory):
        return tfds.builder_from_directory(directory)
    if name == "digits":
        builder = Digits(data_dir=directory, file_format="array_record")
        if not builder.is_prepared():
            # TFDS announces a download to standard output, but there is none.
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare()
        return builder
    remedy = (
        "prepare it where TensorFlow is installed (pip install 'dmf-jax[tfds]'): "
        f"tfds.builder({name!r}, data_dir={directory!r}, "
        'file_format="array_record").download_and_prepare()'
    )
    try:
        builder = tfds.builder(name, data_dir=directory)
        prepared = builder.is_prepared()
    except (tfds.core.DatasetNotFoundError, ImportError, ValueError):
        prepared = False
    if not prepared:
        raise InputError(f"{field}={name}: no such dataset in {directory}; {remedy}")
    return builder
