"""Images to be prepared, wherever they are: files, archives, or a TFDS dataset."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from etils import epath

from dmf.data.image_files import ImageFiles, open_images
from dmf.data.sources import DEFAULT_DIRECTORY, tfds_builder, tfds_records
from dmf.typing import InputError


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """The images of a split of a TFDS dataset, as they were stored.

    Attributes:
      records: TFDS's data source.
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
        """One image."""
        pixels = self.records[index]["image"]
        return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def open_originals(
    source: str, *, labels: str = "", split: str = "train", directory: str = ""
) -> ImageFiles | TfdsImages:
    """Images with labels, in a fixed order.

    Args:
      source: a folder or an archive, or else a TFDS name.
      labels: the labels file of a flat folder.
      split, directory: of a TFDS name, and where TFDS keeps its datasets.

    Raises:
      InputError: nothing is there, or it cannot be read.
    """
    if epath.Path(source).exists() or source.endswith((".zip", ".tar")) :
        return open_images(source, labels=labels)
    builder = tfds_builder(source, directory or DEFAULT_DIRECTORY, field="source")
    features = builder.info.features
    if "image" not in features:
        raise InputError(f"source={source}: it has no feature 'image', but {', '.join(features)}")
    method = tfds.decode.DeserializeMethod.DESERIALIZE_AND_DECODE
    records = tfds_records(builder, source, split, method, field="source")
    names = features["label"].names if "label" in features else ()
    return TfdsImages(records, f"{source}/{split}", tuple(names))
