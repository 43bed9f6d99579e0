"""From `config.data` to a dataset, its mixture and the data loader."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dmf.data.batch_transform import BatchTransform, sample_shape
from dmf.data.data_loader import DataLoader
from dmf.data.datasets import (
    CACHE,
    ConcatenatedDataset,
    Dataset,
    InMemoryDataset,
    UnlabelledDataset,
    check_labels,
    open_dataset,
    stored_name,
)
from dmf.data.latent_origin import check_same_origin
from dmf.data.tfds_records import open_builder
from dmf.errors import InputError, check_at_least, check_valid
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.registry import at, build, component_field, components
from dmf.runtime.paths import user_path
from dmf.types import Network

# Bytes of the names of classes that a run stores: a config may hold 2^20 bytes in all.
_LARGEST_NAMES = 2**18


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixturePart:
    """One more dataset of a mixture.

    Attributes:
      name: dataset name, as in data.name.
      split: split of a TFDS dataset, or a slice of one, for example "train[:90%]".
      directory: the directory of the dataset (for example the output of dmf prepare), or the
        directory in which TFDS keeps its datasets; empty for TFDS's default.
      weight: how often this dataset is drawn from, relative to data.weight and to the other parts;
        positive.
    """

    name: str
    split: str = "train"
    directory: str = ""
    weight: float = 1.0

    def __post_init__(self):
        _check_weight(self.weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The dataset and its batches.

    Attributes:
      name: dataset name: "digits", "cache" (latents that another project cached), a TFDS name, or
        the name of a registered dataset; empty for the dataset that `directory` holds.
      split: split of a TFDS dataset, or a slice of one, for example "train[:90%]".
      directory: the directory of the dataset (for example the output of dmf prepare), or the
        directory in which TFDS keeps its datasets; empty for TFDS's default.
      batch_size: global batch size, over all devices; >= 1.
      mirror: whether each sample is mirrored horizontally with probability 1/2.
      classes: labels whose samples are used, also in the mixture; empty for all labels.
      weight: how often this dataset is drawn from, relative to the weights of the mixture;
        positive; without effect unless there is a mixture.
      mixture: more datasets to draw from, by a name of your choice.
      class_names: names of the classes by label, for `dmf sample` and captions; a run that starts
        with none stores those of its dataset. It may change on resume.
    """

    name: str = "digits"
    split: str = "train"
    directory: str = ""
    batch_size: int = 128
    mirror: bool = False
    classes: tuple[int, ...] = ()
    weight: float = 1.0
    mixture: Mapping[str, MixturePart] = component_field(MixturePart, {}, by_name=True)
    class_names: tuple[str, ...] = ()

    def __post_init__(self):
        check_at_least(self, 1, "batch_size")
        _check_weight(self.weight)
        check_valid(self, _are_printable(self.class_names), "class_names", "give names that can be "
                    "printed on a line")

    @property
    def parts(self) -> dict[str, "Data | MixturePart"]:
        """This dataset and the datasets of the mixture, by their place in the config."""
        return {"data": self} | {f"data.mixture.{k}": part for k, part in self.mixture.items()}

    @property
    def directories(self) -> dict[str, str]:
        """The directory of each part, by its place in the config; some may be empty."""
        return {place: part.directory for place, part in self.parts.items()}

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each part of the mixture; () without a mixture."""
        return tuple(part.weight for part in self.parts.values()) if self.mixture else ()


def _check_weight(weight: float) -> None:
    if not 1e-6 <= weight <= 1e6:
        raise InputError("weight", weight, "give a positive number, from 1e-6 to 1e6")


class DatasetSizes(NamedTuple):
    """What a network takes from its dataset.

    Attributes:
      input_size: height and width of a sample.
      channels: channels of a sample.
      num_classes: number of labels; 0 without labels.
      samples: number of samples.
    """

    input_size: int
    channels: int
    num_classes: int
    samples: int


def data(section: Any) -> Data:
    """The settings of `config.data`.

    Args:
      section: `config.data`, a mapping.

    Raises:
      InputError: a field that cannot be used; the message names it.
    """
    with at("data"):
        return build(Data, section)


def dataset(settings: Data, network: Network, extra: str = "") -> Dataset:
    """The dataset of `config.data`: one dataset, some classes of it, or a mixture.

    Args:
      settings: settings of `config.data`.
      network: network that takes the samples and the labels.
      extra: "images" or "features" if `Dataset.read` returns them too, for representation
        alignment; otherwise empty.

    Raises:
      InputError: a dataset does not exist, or its samples, labels or extra do not fit the network;
        or the latents of a mixture are of several autoencoders.
    """
    parts = []
    for place, part in settings.parts.items():
        with at(place):
            opened = _open(part, network.num_classes or None, extra)
        _check_network(place, part, opened, network)
        if isinstance(opened, InMemoryDataset):  # The labels of others are checked when read.
            check_labels(opened.rows["y"], opened)
        with at("data"):
            BatchTransform(scaling=LatentScaling(), mirror=settings.mirror).check(opened.shape)
            indices = _of_classes(settings.classes, opened)
        parts.append((opened if network.num_classes else UnlabelledDataset(opened), indices))
    check_same_origin(settings.directories)
    check_class_names(settings, network.num_classes)
    if extra:
        _check_same_extra([part for part, _ in parts], extra)
    if len(parts) == 1 and not settings.classes:
        return parts[0][0]
    return ConcatenatedDataset(parts=tuple(parts))


def dataset_sizes(settings: Data) -> DatasetSizes:
    """The sizes of the samples and labels of `config.data`, of a mixture those of the first part.

    Of datasets that TFDS or `dmf prepare` wrote, the metadata alone are read.

    Args:
      settings: settings of `config.data`.

    Raises:
      InputError: the dataset does not exist, or its samples are not square.
      RunError: its files are damaged.
    """
    with at("data"):
        opened = _open(settings, None, "", in_memory=False)
        height, width, channels = sample_shape(opened.shape)
        if height != width:
            raise InputError("name", settings.name, f"its samples are {height} x {width}, and "
                             "networks take squares; dmf prepare makes square crops")
    return DatasetSizes(height, channels, opened.num_classes, len(opened))


def class_names(settings: Data) -> tuple[str, ...]:
    """The names of the classes of `config.data`, by label: those that it gives, else those that the
    dataset stores; () for data that stores none.

    Args:
      settings: settings of `config.data`.

    Raises:
      InputError: the dataset does not exist.
      RunError: its files are damaged.
    """
    if settings.class_names:
        return settings.class_names
    if settings.name in components("dataset") or settings.name == CACHE:
        return ()
    with at("data"):
        features = open_builder(settings.name, settings.directory).info.features
    return tuple(getattr(features["label"], "names", ())) if "label" in features else ()


def names_to_store(names: Sequence[str]) -> tuple[str, ...]:
    """The names of the classes of a dataset that a run stores in its config: all or none.

    >>> names_to_store(["cat", "Great Dane"]), names_to_store(["0", "1"])
    (('cat', 'Great Dane'), ())

    Args:
      names: name of each class, by label. Those that are only numbers, that cannot be written on
        one line, or that are too long for a config are not stored.
    """
    size = sum(len(name.encode()) + 4 for name in names) if _are_printable(names) else 0
    fit = 0 < size <= _LARGEST_NAMES and not all(map(str.isdecimal, names))
    return tuple(names) if fit else ()


def _are_printable(names: Sequence[str]) -> bool:
    return all(name and name.isprintable() for name in names)


def _open(
    part: Data | MixturePart, num_classes: int | None, extra: str, *, in_memory: bool = True
) -> Dataset:
    """A registered dataset, or a stored one where none is registered by that name.

    Raises:
      InputError: the directory does not exist; nothing is made there.
    """
    directory = os.fspath(user_path(part.directory)) if part.directory else ""
    place = epath.Path(directory)
    if directory and not (place.is_dir() or (part.name == CACHE and place.is_file())):
        raise InputError("directory", part.directory, "there is no such directory; dmf prepare "
                         "makes one, and without a directory TFDS uses its own")
    if not part.name and not (directory and stored_name(directory)):
        raise InputError("directory", part.directory, "give the directory of a dataset, for "
                         "example the output of dmf prepare")
    open_registered = components("dataset").get(part.name)
    if open_registered is None:
        return open_dataset(
            part.name, split=part.split, directory=directory, num_classes=num_classes, extra=extra,
            in_memory=in_memory,
        )  # fmt: skip
    if extra:
        raise InputError("name", part.name, f"a registered dataset has no {extra} to align with; "
                         "set objective.alignment_coefficient to 0")
    opened = open_registered(split=part.split, directory=directory)
    if not isinstance(opened, Dataset):
        raise InputError("name", part.name, f"its function returned a {type(opened).__name__}; "
                         "return a dmf.data.datasets.Dataset, for example an InMemoryDataset")
    return opened


def _check_network(
    place: str, part: Data | MixturePart, opened: Dataset, network: Network
) -> None:
    """Raises InputError where a network does not take the samples or the labels of a dataset."""
    shape = sample_shape(opened.shape)
    if shape != network.sample_shape:
        raise InputError(
            f"{place}.name", part.name,
            f"its images have shape {shape}, but config.model takes {network.sample_shape}; set "
            "model.input_size and model.channels, or prepare images of that size",
        )
    if network.num_classes and opened.num_classes != network.num_classes:
        raise InputError(
            "model.num_classes", network.num_classes,
            f"{part.name} has {opened.num_classes} classes; 0 trains without labels",
        )


def check_class_names(settings: Data, num_classes: int) -> None:
    """Raises InputError where the settings name some classes, and not all of them."""
    if settings.class_names and len(settings.class_names) != num_classes:
        raise InputError("data.class_names", settings.class_names, "give a name for each of the "
                         f"{num_classes} classes, or leave it empty")


def _check_same_extra(parts: Sequence[Dataset], extra: str) -> None:
    """Raises InputError where the images or features of the datasets have several shapes."""
    shapes = {part.name: part.read([0])[extra].shape[1:] for part in parts}
    if len(set(shapes.values())) > 1:
        raise InputError(
            "data.mixture",
            remedy=f"its {extra} have several shapes, {shapes}; make them one with dmf prepare",
        )


def _of_classes(classes: Sequence[int], opened: Dataset) -> np.ndarray:
    """The indices of the samples of some classes; of all samples if `classes` is empty."""
    if not classes:
        return np.arange(len(opened))
    unknown = [label for label in classes if not 0 <= label < opened.num_classes]
    if unknown:
        raise InputError(
            "classes", tuple(classes),
            f"{opened.name} has the labels 0 to {opened.num_classes - 1}, and no {unknown[0]}"
            if opened.num_classes else f"{opened.name} has no labels; leave it empty",
        )
    indices = np.flatnonzero(np.isin(opened.labels(), classes))
    if not len(indices):
        raise InputError("classes", tuple(classes), f"{opened.name} has no sample of them")
    return indices


def data_loader(settings: Data, dataset: Dataset, *, seed: int) -> DataLoader:
    """The loader of shuffled batches of a dataset.

    Args:
      settings: settings of `config.data`.
      dataset: the dataset that `dataset` opened.
      seed: random seed of the shuffle.
    """
    return DataLoader(
        dataset=dataset, batch_size=settings.batch_size, seed=seed, weights=settings.weights
    )
