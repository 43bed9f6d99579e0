"""Datasets by name, as random-access rows. TFDS stores them; no TensorFlow is needed to read.

A TFDS dataset can be read here when it was prepared with `file_format="array_record"`. The digits
prepare themselves on first use. `dmf.data.samples` says what a row is.

Beside its rows a dataset may hold what representation alignment (REPA) needs: the images that
latents were made of, or patch features of them. They are read along if the source was opened so.
"""

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dmf.data.caches import open_cache
from dmf.data.digits import Digits
from dmf.data.records import Field, TfdsSource, is_encoded, is_packed
from dmf.typing import InputError

CACHE = "cache"
DEFAULT_DIRECTORY = tfds.core.constants.DATA_DIR
# Datasets up to this size are read once and kept.
RESIDENT_BYTES = 2**26
# What may be read along with a row, as `Batch` calls it, and the feature that holds it.
BESIDE = {"images": "image", "features": "features"}
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

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Rows [n, ...] as they are stored, and labels [n] int32, 0 where there are none; third,
        if the source was opened with something beside them, that, [n, ...]."""

    def labels(self) -> np.ndarray:
        """The label of every row, int64."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidentSource:
    """A source whose rows are in memory, and perhaps what is read along with them."""

    name: str
    num_classes: int
    rows: np.ndarray
    all_labels: np.ndarray
    beside: tuple[np.ndarray, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""
        return self.rows.shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Several rows at once, see `Source`."""
        chosen = np.asarray(indices, np.int64)
        return tuple(values[chosen] for values in (self.rows, self.all_labels, *self.beside))

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

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Several rows at once, see `Source`."""
        wanted, start = np.asarray(indices, np.int64), 0
        joined: tuple[np.ndarray, ...] = ()
        for source, chosen in self.parts:
            here = np.flatnonzero((wanted >= start) & (wanted < start + len(chosen)))
            if len(here):
                found = source.read(chosen[wanted[here] - start].tolist())
                joined = joined or tuple(
                    np.empty((len(wanted), *values.shape[1:]), values.dtype) for values in found
                )
                for whole, values in zip(joined, found, strict=True):
                    whole[here] = values
            start += len(chosen)
        return joined

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

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Several rows at once, see `Source`."""
        rows, labels, *beside = self.source.read(indices)
        return rows, np.zeros_like(labels), *beside

    def labels(self) -> np.ndarray:
        """All 0."""
        return np.zeros(len(self), np.int64)


def open_source(
    name: str,
    *,
    split: str = "train",
    directory: str = "",
    num_classes: int | None = None,
    beside: str = "",
) -> Source:
    """Opens a split of a prepared dataset.

    Args:
      name: "digits", "cache" for latents that another project cached, or a TFDS name as it was
        prepared, with config and version if need be; of no account where `directory` is a dataset.
      split: a TFDS split, slices such as "train[:90%]" included.
      directory: a dataset (what `dmf prepare` wrote, say), or where TFDS keeps its datasets, its
        default if empty.
      num_classes: of a cache, whose labels need not reach the last class.
      beside: what is read along with rows: a key of `BESIDE`, or nothing. Where rows are images,
        "images" are the rows themselves.

    Raises:
      InputError: the dataset, its split or its features are not there, or its records cannot be
        read without TensorFlow; the message says what to do.
    """
    if name == CACHE:
        if beside:
            raise InputError(_nothing_beside(name, beside))
        return open_cache(directory, num_classes=num_classes)
    builder = tfds_builder(name, directory or DEFAULT_DIRECTORY)
    features = builder.info.features
    feature = next((f for f in ("moments", "image") if f in features), None)
    if feature is None or (feature == "image" and not _is_image(features[feature])):
        raise InputError(f"data.name={name}: it needs a feature 'image' of uint8 (h, w, c), or "
                         f"'moments'; it has {', '.join(features)}")
    second = BESIDE[beside] if beside else None
    if second and (second not in features or (beside == "images"
                                              and not _is_image(features[second]))):
        raise InputError(_nothing_beside(name, beside))
    return _resident(_opened(builder, name, split, feature, second))


def _is_image(feature: Any) -> bool:
    return np.dtype(feature.np_dtype) == np.uint8


def _nothing_beside(name: str, beside: str) -> str:
    return (f"data.name={name}: it has no {beside} to align with; store features with dmf prepare "
            "--features=DIR and leave alignment.encoder empty, or let alignment.encoder name a "
            "DINOv2, for which latents need dmf prepare --keep-images")


def _opened(
    builder: tfds.core.DatasetBuilder, name: str, split: str, feature: str, beside: str | None
) -> TfdsSource:
    """A dataset whose rows are a feature, with another one beside."""
    features = builder.info.features
    packed = is_packed(features[feature])
    if beside:
        packed &= is_packed(features[beside]) or is_encoded(features[beside])
    methods = tfds.decode.DeserializeMethod
    method = methods.RAW_BYTES if packed else methods.DESERIALIZE_AND_DECODE
    records = tfds_records(builder, name, split, method)

    def field(of: str) -> Field:
        found = features[of]
        shape = found.shape if packed else records[0][of].shape
        return Field(of, tuple(shape), np.dtype(found.np_dtype), is_encoded(found))

    return TfdsSource(
        name=name,
        num_classes=features["label"].num_classes if "label" in features else 0,
        row=field(feature),
        beside=field(beside) if beside else None,
        records=records,
        packed=packed,
        directory=epath.Path(builder.data_dir),
    )


def _resident(source: TfdsSource) -> Source:
    """The source itself, or its rows in memory if they are few."""
    if source.size > RESIDENT_BYTES:
        return source
    rows, labels, *beside = source.read(range(len(source)))
    return ResidentSource(
        name=source.name, num_classes=source.num_classes, rows=rows, all_labels=labels,
        beside=tuple(beside),
    )  # fmt: skip


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
