"""Datasets by name, as random-access rows. TFDS stores them; no TensorFlow is needed to read.

A TFDS dataset can be read here when it was prepared with `file_format="array_record"`. The digits
prepare themselves on first use.
"""

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dmf.data.digits import Digits
from dmf.typing import InputError

DEFAULT_DIRECTORY = tfds.core.constants.DATA_DIR


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Rows (x, y) of a dataset with an image and perhaps a label.

    Attributes:
      rows: the TFDS data source.
      num_classes: number of labels, 0 where there are none.
      name: what to call it.
    """

    rows: Any
    num_classes: int
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Several rows at once.

        Returns:
          x: [n, h, w, c] float32 in [-1, 1]; y: [n] int32 labels, 0 where there are none.
        """
        rows = self.rows.__getitems__(indices)
        x = np.stack([row["image"] for row in rows]).astype(np.float32) / 127.5 - 1
        y = np.array([row["label"] if self.num_classes else 0 for row in rows], np.int32)
        return x, y


def open_source(name: str, *, split: str = "train", directory: str = "") -> ImageSource:
    """Opens a split of a prepared dataset.

    Args:
      name: "digits", or a TFDS name as it was prepared, with config and version if need be.
      split: a TFDS split, slices such as "train[:90%]" included.
      directory: where TFDS keeps its datasets; its default if empty.

    Raises:
      InputError: the dataset, its split or its features are not there, or its records cannot be
        read without TensorFlow; the message says what to do.
    """
    builder = _builder(name, directory or DEFAULT_DIRECTORY)
    try:
        rows = builder.as_data_source(split=split)
    except NotImplementedError:
        raise InputError(
            f"data.name={name}: prepared as {builder.info.file_format.value}, which needs "
            'TensorFlow to read; prepare it again with file_format="array_record"'
        ) from None
    except (KeyError, ValueError) as error:
        splits = ", ".join(builder.info.splits)
        raise InputError(
            f"data.split={split}: {name} has the splits {splits} ({str(error).splitlines()[0]})"
        ) from None
    features = builder.info.features
    if "image" not in features or np.dtype(features["image"].np_dtype) != np.uint8:
        raise InputError(f"data.name={name}: it needs a feature 'image' of uint8 (h, w, c); it "
                         f"has {', '.join(features)}")
    num_classes = features["label"].num_classes if "label" in features else 0
    return ImageSource(rows, num_classes, name)


def _builder(name: str, directory: str) -> tfds.core.DatasetBuilder:
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
    except (tfds.core.DatasetNotFoundError, ImportError):
        prepared = False
    if not prepared:
        raise InputError(f"data.name={name}: no such dataset in {directory}; {remedy}")
    return builder
