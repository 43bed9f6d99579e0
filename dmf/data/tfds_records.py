"""TFDS datasets as arrays, without TensorFlow.

Features that are stored as the bytes of an array, and images of one shape, are parsed here, the
images on all cores, in a third of the time that TFDS takes; TFDS decodes all other features.
"""

import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from dmf.data.digits import Digits
from dmf.data.feature_files import check_features
from dmf.errors import InputError, RunError
from dmf.runtime.paths import user_path
from dmf.runtime.thread_pool import ThreadPool

DEFAULT_DIRECTORY = tfds.core.constants.DATA_DIR
INFO_FILE = "dataset_info.json"
# The labels of a dataset that `dmf prepare` wrote, in the order of its records.
LABELS_FILE = "labels.npy"
# A name, a config and a version, without a namespace.
_NAME = re.compile(r"\w+(/[\w.+-]+)?(:[\d.*]+)?")


class StoredFeature(NamedTuple):
    """A feature of a TFDS dataset.

    Attributes:
      name: name of the feature.
      shape: shape of a value.
      dtype: dtype of a value.
      is_encoded: whether examples hold image files rather than the bytes of arrays.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    is_encoded: bool = False

    @property
    def size(self) -> int:
        """Number of bytes of a value."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def parse(self, example: Mapping[str, Any]) -> np.ndarray:
        """The value of the feature in a serialized example."""
        stored = example[self.name].bytes_list.value[0]
        if not self.is_encoded:
            return np.frombuffer(stored, self.dtype).reshape(self.shape)
        with PIL.Image.open(io.BytesIO(stored)) as image:
            pixels = np.asarray(image)
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def checked(self, value: np.ndarray, dataset: str) -> np.ndarray:
        """The value as it is.

        Raises:
          InputError: the value has another shape than the feature.
        """
        if value.shape != self.shape:
            raise InputError(
                "name", dataset,
                f"its images have several shapes, {value.shape} and {self.shape}; make them one "
                "with dmf prepare",
            )
        return value


def is_packed(feature: Any) -> bool:
    """Whether the values of a feature are stored as the bytes of arrays."""
    return type(feature) is tfds.features.Tensor and feature.to_json_content().encoding == "bytes"


def is_encoded(feature: Any) -> bool:
    """Whether the values of a feature are stored as files of 8-bit images of one shape."""
    is_image = type(feature) is tfds.features.Image and np.dtype(feature.np_dtype) == np.uint8
    return is_image and None not in feature.shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsDataset:
    """A split of a TFDS dataset, see `dmf.data.datasets.Dataset`.

    Attributes:
      name: name of the dataset.
      num_classes: number of labels; 0 for a dataset without labels.
      features: the features that `read` returns, by their name in `dmf.types.Batch`: "x", and
        perhaps "images" or "features".
      records: TFDS's data source, of serialized examples if `packed`, else of decoded ones.
      packed: whether this class takes the values out of serialized examples.
      directory: directory of the dataset.
    """

    name: str
    num_classes: int
    features: Mapping[str, StoredFeature]
    records: Any
    packed: bool
    directory: epath.Path
    _threads: ThreadPool = dataclasses.field(
        init=False, repr=False, compare=False,
        default_factory=lambda: ThreadPool(os.cpu_count(), "decode"),
    )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of "x" of one sample."""
        return self.features["x"].shape

    @property
    def size(self) -> int:
        """Bytes of all samples."""
        return len(self) * sum(feature.size for feature in self.features.values())

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Several samples, see `dmf.data.datasets.Dataset`.

        Raises:
          InputError: the samples have several shapes.
          RunError: the files are damaged.
        """
        with damage_named(self.directory):
            return self._read(indices)

    def _read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        count = len(indices)
        rows = {key: np.empty((count, *f.shape), f.dtype) for key, f in self.features.items()}
        rows["y"] = np.zeros(count, np.int32)

        def fill(i: int, record: Any) -> None:
            example = self._example(record)
            for key, feature in self.features.items():
                value = feature.parse(example) if self.packed else example[feature.name]
                rows[key][i] = feature.checked(value, self.name)
            rows["y"][i] = self._label(example)

        records = self.records.__getitems__(list(map(int, indices)))
        if self.packed and any(f.is_encoded for f in self.features.values()):
            # Decoding takes the most time, and it releases the interpreter lock.
            self._threads.map(fill, range(count), records)
        else:
            list(map(fill, range(count), records))
        return rows

    def _example(self, record: Any) -> Mapping[str, Any]:
        return tf_example_pb2.Example.FromString(record).features.feature if self.packed else record

    def _label(self, example: Mapping[str, Any]) -> int:
        if not self.num_classes:
            return 0
        return example["label"].int64_list.value[0] if self.packed else example["label"]

    def labels(self) -> np.ndarray:
        """The labels of all samples, int64.

        They come from `LABELS_FILE` if it holds as many, which is not so for a slice of a split;
        otherwise, or where one is no label, all records are read.

        Raises:
          RunError: the files are damaged.
        """
        path = self.directory / LABELS_FILE
        if path.exists():
            with damage_named(self.directory):
                stored = np.load(io.BytesIO(path.read_bytes()))
            if stored.shape == (len(self),) and set(stored) <= set(range(self.num_classes)):
                return stored
        parts = [self.read(range(i, min(i + 1000, len(self))))["y"]
                 for i in range(0, len(self), 1000)]
        return np.concatenate(parts).astype(np.int64)


@contextlib.contextmanager
def damage_named(directory: epath.PathLike) -> Iterator[None]:
    """Turns what any library raises for damaged files of a dataset into one line.

    Raises:
      RunError: a file is missing or damaged.
    """
    try:
        yield
    except (InputError, RunError, MemoryError):
        raise
    except Exception as error:  # TFDS and ArrayRecord do not document what they raise.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RunError(f"{directory}: a file of the dataset is missing or damaged ({reason}); "
                       "restore it, or prepare the dataset again") from error


def is_dataset(directory: epath.PathLike) -> bool:
    """Whether a directory is that of a TFDS dataset."""
    return (user_path(directory) / INFO_FILE).exists()


def open_builder(name: str, directory: str = "") -> tfds.core.DatasetBuilder:
    """The builder of a prepared TFDS dataset.

    Args:
      name: a TFDS name, with config and version where needed.
      directory: the directory of a dataset, which is then opened whatever the name; or the
        directory in which TFDS keeps its datasets, empty for TFDS's default.

    Raises:
      InputError: the dataset is not prepared; the message says how to prepare it. Or the name has a
        namespace, which TFDS would look up in the internet; or a file of the dataset names code.
      RunError: the files that describe the dataset are damaged.
    """
    directory = os.fspath(user_path(directory or DEFAULT_DIRECTORY))
    if is_dataset(directory):
        check_features(directory)
        with damage_named(directory):
            return tfds.builder_from_directory(directory)
    if not _NAME.fullmatch(name):
        raise InputError("name", name, "give the name of a TFDS dataset, with config and version "
                         "where needed, for example imagenet2012 or mnist:3.0.1")
    check_features(epath.Path(directory) / re.split("[/:]", name)[0])
    if name == "digits":
        return _digits(directory)
    try:
        builder = tfds.builder(name, data_dir=directory)
        prepared = builder.is_prepared()
    except tfds.core.DatasetNotFoundError:
        raise InputError("name", name, f"no such dataset in {directory}; dmf prepare makes one "
                         "from images, and data.directory=DIR names its output") from None
    except (ImportError, ValueError):
        prepared = False
    if not prepared:
        raise InputError(
            "name", name,
            f"no such dataset in {directory}; prepare it where TensorFlow is installed "
            f"(pip install tensorflow): tfds.builder({name!r}, data_dir={directory!r}, "
            'file_format="array_record").download_and_prepare()',
        )
    return builder


def _digits(directory: str) -> tfds.core.DatasetBuilder:
    """The builder of the digits, which prepares them on first use."""
    builder = Digits(data_dir=directory, file_format="array_record")
    if not builder.is_prepared():
        # TFDS prints that it downloads something, which is not so.
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                builder.download_and_prepare()
            except OSError:  # Another process may have been faster.
                builder = Digits(data_dir=directory, file_format="array_record")
                if not builder.is_prepared():
                    raise
    return builder


def open_records(
    builder: tfds.core.DatasetBuilder,
    name: str,
    split: str,
    method: tfds.decode.DeserializeMethod,
    *,
    decoders: Any = None,
) -> Sequence[Any]:
    """The records of a split, by their index.

    Args:
      builder: builder of a prepared dataset.
      name: name of the dataset in messages.
      split: a split, or a slice of one.
      method: whether records are serialized examples or decoded ones.
      decoders: TFDS decoders by feature.

    Raises:
      InputError: there is no such split, or the records cannot be read without TensorFlow.
      RunError: a file of the split is missing or empty.
    """
    try:
        _check_shards(builder, split)
        return builder.as_data_source(split=split, decoders=decoders, deserialize_method=method)
    except NotImplementedError:
        raise InputError(
            "name", name,
            f"prepared as {builder.info.file_format.value}, which needs TensorFlow to read; "
            "prepare it again with file_format=\"array_record\"",
        ) from None
    except (KeyError, ValueError) as error:
        splits = ", ".join(builder.info.splits)
        raise InputError(
            "split", split, f"{name} has the splits {splits} ({str(error).splitlines()[0]})"
        ) from None


def _check_shards(builder: tfds.core.DatasetBuilder, split: str) -> None:
    """Raises RunError where a file that the records of a split lie in is missing or empty."""
    for path in builder.info.splits[split].filepaths if split in builder.info.splits else ():
        if not path.exists() or not path.stat().length:
            raise RunError(f"{path}: it is missing or empty; restore it, or prepare the dataset "
                           "again")
