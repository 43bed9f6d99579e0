"""Images that are evaluated: how they are read, and what tells them from others."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from dmf.data.image_sets import ImageSet
from dmf.runtime.checksums import fingerprint
from dmf.sampling.generator import GeneratedImages

ReadImages = Callable[[Int[np.ndarray, "n"]], GeneratedImages]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedImages:
    """Images that are evaluated, or that are a reference.

    Attributes:
      name: what logs call them.
      read: function of indices [n] that reads or generates images; indices may exceed the count.
      count: number of images.
      shape: (h, w, c) of an image.
      labels: the label that each image was generated for; None without labels.
      row: the fields of a row of the results that say which images they are.
      identity: tells the images from others, so that interrupted work on them can resume; JSON.
    """

    name: str
    read: ReadImages
    count: int
    shape: tuple[int, ...]
    labels: Int[np.ndarray, "n"] | None
    row: Mapping[str, Any]
    identity: Any


def evaluated_image_set(images: ImageSet) -> EvaluatedImages:
    """A set of images to evaluate, identified by its name, its size and a few of its images."""

    def read(indices: Int[np.ndarray, "n"]) -> GeneratedImages:
        inside = indices[indices < len(images)]
        rows = np.zeros((len(indices), *images.shape), np.uint8)
        rows[: len(inside)] = images.read(inside)
        return GeneratedImages(rows, np.ones(len(indices), bool))

    some = np.unique(np.linspace(0, len(images) - 1, 16).astype(np.int64))
    return EvaluatedImages(
        name=images.name,
        read=read,
        count=len(images),
        shape=tuple(images.shape),
        labels=images.labels(),
        row={"images": images.name} | ({"notes": images.notes} if images.notes else {}),
        identity=[images.name, len(images), fingerprint(images.read(some))],
    )
