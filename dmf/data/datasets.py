"""Datasets by name, as samples that are read by their index.

TFDS stores datasets, and reading them needs no TensorFlow if they were prepared with
`file_format="array_record"`. The digits prepare themselves on first use.

A dataset may also hold what representation alignment (REPA, arXiv:2410.06940) needs: the images
that latents were encoded from, or patch features of these images. `open_dataset` takes the name of
one of the two as `extra`, and every `read` then returns it too.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dmf.data.latent_caches import SUFFIXES as CACHE_SUFFIXES
from dmf.data.latent_caches import open_cache
from dmf.data.latent_shards import holds_shards, open_latent_shards
from dmf.data.tfds_records import (
    INFO_FILE,
    StoredFeature,
    TfdsDataset,
    is_dataset,
    is_encoded,
    is_packed,
    open_builder,
    open_records,
)
from dmf.errors import InputError
from dmf.runtime.paths import user_path

CACHE, DIGITS = "cache", "digits"
# Datasets up to this size are read once and stay in memory.
IN_MEMORY_BYTES = 2**26
# TFDS feature of each field that a dataset may return along with "x" and "y".
EXTRA_FEATURES = {"images": "image", "features": "features"}

Rows = dict[str, np.ndarray]


@runtime_checkable
class Dataset(Protocol):
    """Samples that are read by their index.

    Attributes:
      name: name of the dataset.
      num_classes: number of labels; 0 for a dataset without labels.
      shape: shape of "x" of one sample: (h, w, c) of an image, or (f, h, w, 2c) of moments.
    """

    name: str
    num_classes: int
    shape: tuple[int, ...]

    def __len__(self) -> int:
        """Number of samples."""

    def read(self, indices: Sequence[int]) -> Rows:
        """Several samples, as arrays by the name of their field in `dmf.types.Batch`.

        Args:
          indices: n indices in [0, len(dataset)).

        Returns:
          "x": [n, h, w, c] uint8 images, or [n, f, h, w, 2c] moments in half or single precision.
          "y": labels [n] int32, 0 for a dataset without labels; or whatever else the network makes
            its condition of, as one array [n, ...].
          "images": [n, h, w, c] uint8, if the dataset was opened with them.
          "features": [n, f, tokens, width] float16, if the dataset was opened with them.
        """

    def labels(self) -> np.ndarray:
        """The labels of all samples, [len(dataset)] int64."""


def check_labels(y: np.ndarray, dataset: Dataset) -> None:
    """Checks the labels of samples; conditions that are no labels pass.

    Args:
      y: "y" of some samples.
      dataset: the dataset of the samples.

    Raises:
      InputError: a label is below 0, or not below the number of classes.
    """
    if not dataset.num_classes or y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        return
    for label in y[(y < 0) | (y >= dataset.num_classes)][:1]:
        raise InputError(
            "data.name", dataset.name,
            f"a sample has the label {label}, but the {dataset.num_classes} classes have the "
            f"labels 0 to {dataset.num_classes - 1}; correct the labels of the dataset",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InMemoryDataset:
    """A dataset in memory.

    >>> rows = {"x": np.zeros((2, 8, 8, 1), np.uint8), "y": np.array([3, 7], np.int32)}
    >>> InMemoryDataset(name="black", num_classes=10, rows=rows).read([1])["y"].tolist()
    [7]

    Attributes:
      name: name of the dataset.
      num_classes: number of labels; 0 for a dataset without labels.
      rows: all samples, as `Dataset.read` returns them.
    """

    name: str
    num_classes: int
    rows: Mapping[str, np.ndarray]

    def __post_init__(self):
        counts = {key: len(values) for key, values in self.rows.items()}
        if len(set(counts.values())) > 1:
            raise InputError("dataset", self.name, f"its rows differ in number, {counts}; give one "
                             "of each for every sample")
        x = self.rows["x"]
        if x.ndim == 4 and x.dtype != np.uint8:
            raise InputError("dataset", self.name, f'"x" has dtype {x.dtype}; images are uint8, '
                             "from 0 to 255")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of "x" of one sample."""
        return self.rows["x"].shape[1:]

    def __len__(self) -> int:
        return len(self.rows["x"])

    def read(self, indices: Sequence[int]) -> Rows:
        """Several samples, see `Dataset`."""
        chosen = np.asarray(indices, np.int64)
        return {key: values[chosen] for key, values in self.rows.items()}

    def labels(self) -> np.ndarray:
        """The labels of all samples, int64."""
        return self.rows["y"].astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConcatenatedDataset:
    """Some samples of several datasets, one dataset after the other.

    Attributes:
      parts: each dataset, and the indices of its samples that are taken.
    """

    parts: tuple[tuple[Dataset, np.ndarray], ...]

    @property
    def name(self) -> str:
        """The names of all datasets."""
        return " + ".join(dataset.name for dataset, _ in self.parts)

    @property
    def num_classes(self) -> int:
        """Number of labels, which is the same for all datasets."""
        return self.parts[0][0].num_classes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of "x" of one sample."""
        return self.parts[0][0].shape

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of samples of each part."""
        return tuple(len(indices) for _, indices in self.parts)

    def __len__(self) -> int:
        return sum(self.lengths)

    def read(self, indices: Sequence[int]) -> Rows:
        """Several samples, see `Dataset`."""
        wanted, start = np.asarray(indices, np.int64), 0
        joined: Rows = {}
        for dataset, chosen in self.parts:
            here = np.flatnonzero((wanted >= start) & (wanted < start + len(chosen)))
            if len(here):
                rows = dataset.read(chosen[wanted[here] - start].tolist())
                joined = joined or {key: np.empty((len(wanted), *values.shape[1:]), values.dtype)
                                    for key, values in rows.items()}
                for key, values in rows.items():
                    joined[key][here] = values
            start += len(chosen)
        return joined

    def labels(self) -> np.ndarray:
        """The labels of all samples, int64."""
        return np.concatenate([dataset.labels()[chosen] for dataset, chosen in self.parts])


@dataclasses.dataclass(frozen=True)
class UnlabelledDataset:
    """A dataset whose labels are replaced by 0, the only label of a network without classes.

    Only label vectors (integers [n]) are replaced: other conditions in "y" stay as they are.

    Attributes:
      dataset: the dataset with labels.
    """

    dataset: Dataset
    num_classes = 0

    @property
    def name(self) -> str:
        """Name of the dataset."""
        return self.dataset.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of "x" of one sample."""
        return self.dataset.shape

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: Sequence[int]) -> Rows:
        """Several samples, see `Dataset`."""
        rows = self.dataset.read(indices)
        is_label = rows["y"].ndim == 1 and np.issubdtype(rows["y"].dtype, np.integer)
        return rows | {"y": np.zeros_like(rows["y"])} if is_label else rows

    def labels(self) -> np.ndarray:
        """0 for every sample, int64."""
        return np.zeros(len(self), np.int64)


def open_dataset(
    name: str,
    *,
    split: str = "train",
    directory: str = "",
    num_classes: int | None = None,
    extra: str = "", in_memory: bool = True,
) -> Dataset:
    """Opens a split of a prepared dataset.

    >>> digits = open_dataset("digits")
    >>> len(digits), digits.num_classes, digits.shape
    (1797, 10, (8, 8, 1))
    >>> {key: (values.shape, str(values.dtype)) for key, values in digits.read([0, 5]).items()}
    {'x': ((2, 8, 8, 1), 'uint8'), 'y': ((2,), 'int32')}

    Args:
      name: "digits"; "cache" for latents that another project cached; or a TFDS name, with config
        and version where needed. Only its use in messages counts if `directory` is a dataset.
      split: a split of the TFDS dataset, or a slice of one, such as "train[:90%]".
      directory: the directory of a dataset (for example the output of `dmf prepare`), or the
        directory in which TFDS keeps its datasets; empty for TFDS's default.
      num_classes: number of labels of a cache, which may hold no sample of the last class; by
        default the largest label + 1.
      extra: "images" or "features" if `read` returns them too; otherwise empty. The "images" of a
        dataset of images are its samples.
      in_memory: whether all samples of a small dataset are read at once, and stay in memory.

    Raises:
      InputError: the dataset, its split or its features do not exist, or its records cannot be read
        without TensorFlow; the message says what to do.
    """
    if name == CACHE:
        return _open_latents(directory, num_classes, extra)
    if name == DIGITS:
        _check_no_latents(directory)
    builder = open_builder(name, directory)
    chosen = _choose_features(builder.info.features, name, extra)
    return _in_memory_if_small(_open_tfds(builder, name, split, chosen), in_memory)


def _open_latents(directory: str, num_classes: int | None, extra: str) -> Dataset:
    """Cached latents, in whichever layout the directory holds them."""
    if extra:
        raise _has_no(extra, CACHE)
    opener = open_latent_shards if directory and holds_shards(directory) else open_cache
    return opener(directory, num_classes=num_classes)


def _check_no_latents(directory: str) -> None:
    """Raises InputError where the digits would be written into a directory of cached latents."""
    is_new = directory and not (user_path(directory) / DIGITS).exists()
    if is_new and stored_name(directory) == CACHE:
        raise InputError("name", DIGITS, f"{directory} holds cached latents; give the "
                         f"name {CACHE} for them")


def stored_name(directory: str) -> str:
    """The name of the dataset that a directory is: that of a TFDS dataset, or "cache" for cached
    latents; empty where it is neither, as the directory in which TFDS keeps its datasets.

    >>> stored_name("/nowhere")
    ''

    Args:
      directory: a directory, or a .zip of cached latents.

    Raises:
      InputError: it is empty, or begins with ~ and there is no such home directory.
    """
    place = user_path(directory)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if is_dataset(place):
            return str(json.loads((place / INFO_FILE).read_text()).get("name", ""))
        if place.is_file():
            return CACHE if place.suffix == ".zip" else ""
        if _holds_latents(place) or holds_shards(place):
            return CACHE
        first_class = next((path for path in place.iterdir() if path.is_dir()), None)
        return CACHE if first_class is not None and _holds_latents(first_class) else ""
    return ""


def _holds_latents(folder: epath.Path) -> bool:
    return any(path.suffix in CACHE_SUFFIXES for path in folder.iterdir())


def _choose_features(
    features: tfds.features.FeaturesDict, name: str, extra: str
) -> dict[str, str]:
    """The TFDS feature of each field that `read` returns.

    Raises:
      InputError: the dataset has no such features.
    """
    main = next((feature for feature in ("moments", "image") if feature in features), None)
    if main is None or (main == "image" and not _is_uint8(features[main])):
        raise InputError(
            "name", name,
            "it needs a feature 'image' of uint8 (h, w, c), or 'moments'; it has "
            f"{', '.join(features)}",
        )
    if not extra:
        return {"x": main}
    feature = EXTRA_FEATURES[extra]
    if feature not in features or (extra == "images" and not _is_uint8(features[feature])):
        raise _has_no(extra, name)
    return {"x": main, extra: feature}


def _is_uint8(feature: Any) -> bool:
    return np.dtype(feature.np_dtype) == np.uint8


def _has_no(extra: str, name: str) -> InputError:
    return InputError(
        "name", name,
        f"it has no {extra} to align with; store features with dmf prepare --features=DIR and "
        "leave alignment.encoder empty, or let alignment.encoder name a DINOv2, for which latents "
        "need dmf prepare --keep-images",
    )


def _open_tfds(
    builder: tfds.core.DatasetBuilder, name: str, split: str, chosen: Mapping[str, str]
) -> TfdsDataset:
    """A split of a TFDS dataset, and the TFDS feature of each field that `read` returns."""
    features = builder.info.features
    packed = all(
        is_packed(features[feature]) or is_encoded(features[feature])
        for feature in chosen.values()
    )
    methods = tfds.decode.DeserializeMethod
    method = methods.RAW_BYTES if packed else methods.DESERIALIZE_AND_DECODE
    records = open_records(builder, name, split, method)

    def stored(name: str) -> StoredFeature:
        feature = features[name]
        shape = feature.shape if packed else records[0][name].shape
        return StoredFeature(name, tuple(shape), np.dtype(feature.np_dtype), is_encoded(feature))

    return TfdsDataset(
        name=name,
        num_classes=features["label"].num_classes if "label" in features else 0,
        features={key: stored(feature) for key, feature in chosen.items()},
        records=records,
        packed=packed,
        directory=epath.Path(builder.data_dir),
    )


def _in_memory_if_small(dataset: TfdsDataset, in_memory: bool) -> Dataset:
    """The dataset itself, or all its samples in memory if they are few and are to be read."""
    if dataset.size > IN_MEMORY_BYTES or not in_memory:
        return dataset
    return InMemoryDataset(
        name=dataset.name, num_classes=dataset.num_classes, rows=dataset.read(range(len(dataset)))
    )
