"""Latents that LightningDiT has encoded (arXiv:2501.01423), as samples read by their index.

A folder holds safetensors files, as `latents_rank00_shard000.safetensors`, each of thousands of
samples: `latents` [n, c, h, w], perhaps `latents_flip`, those of the mirror images, and perhaps
`labels` [n]. The latents are drawn already, so that their standard deviation is 0 here, and they
are not normalised: `latents_stats.pt` beside them says by what.

Opening a cache reads the headers and the labels of all files; of latents, only the rows of a batch
are read.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open

from dmf.errors import InputError, brief
from dmf.runtime.paths import user_path
from dmf.runtime.thread_pool import ThreadPool

SUFFIX = ".safetensors"
_LATENTS, _LABELS = ("latents", "latents_flip"), "labels"
_DTYPES = {"F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
_WHOLE = ("I64", "I32", "I16", "U8")
# Threads of a cache that read files.
READ_THREADS = 16


class ShardLayout(NamedTuple):
    """What all files of a cache have in common.

    Attributes:
      arrays: names of the arrays of latents.
      shape: (c, h, w) of the latents of an image.
      dtype: dtype of the latents, as safetensors names it.
      has_labels: whether the files hold labels.
    """

    arrays: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    has_labels: bool

    def __str__(self) -> str:
        names = [*self.arrays, _LABELS] if self.has_labels else self.arrays
        return f"{'+'.join(names)} {self.shape} {self.dtype}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LatentShards:
    """A dataset of moments and labels. Any number of threads may read at once.

    Attributes:
      name: name of the dataset.
      directory: the folder, as the user gave it.
      files: the files, in the order of their names.
      starts: index of the first sample of each file, and the number of samples.
      layout: layout of each file.
      known_labels: [n] labels; None without.
      num_classes: number of classes; 0 without labels.
    """

    name: str
    directory: str
    files: tuple[str, ...]
    starts: Int64[np.ndarray, "m"]
    layout: ShardLayout
    known_labels: Int64[np.ndarray, "n"] | None
    num_classes: int
    _threads: ThreadPool = dataclasses.field(
        init=False, default_factory=lambda: ThreadPool(READ_THREADS, "read")
    )

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(f, h, w, 2c) of a sample; f is 2 if the latents of the mirror image are stored too."""
        channels, height, width = self.layout.shape
        return len(self.layout.arrays), height, width, 2 * channels

    def labels(self) -> Int64[np.ndarray, "n"]:
        """The label of every sample, 0 without labels."""
        return np.zeros(len(self), np.int64) if self.known_labels is None else self.known_labels

    def read(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Several samples, see `dmf.data.datasets.Dataset`.

        Args:
          indices: n indices in [0, len(cache)).

        Returns:
          "x": moments [n, f, h, w, 2c]: the latents as they are stored, and zeros for their
            standard deviation.
          "y": labels [n] int32, 0 without labels.

        Raises:
          InputError: a file is gone or damaged, or holds values that are not finite. Its field is
            "directory", and the text names the file.
        """
        wanted = np.asarray(indices, np.int64)
        moments = np.zeros((len(wanted), *self.shape), _DTYPES[self.layout.dtype])
        shards = np.searchsorted(self.starts, wanted, "right") - 1

        def fill(shard: int) -> None:
            places = np.flatnonzero(shards == shard)
            with _open(self.directory, self.files[shard]) as file:
                for view, name in enumerate(self.layout.arrays):
                    latents = file.get_slice(name)
                    for place in places:
                        row = int(wanted[place] - self.starts[shard])
                        values = latents[row : row + 1][0].transpose(1, 2, 0)
                        moments[place, view, :, :, : values.shape[2]] = values
            self._check_finite(shard, moments[places], wanted[places])

        self._threads.map(fill, np.unique(shards).tolist())
        y = np.zeros(len(wanted)) if self.known_labels is None else self.known_labels[wanted]
        return {"x": moments, "y": y.astype(np.int32)}

    def _check_finite(self, shard: int, moments: np.ndarray, indices: np.ndarray) -> None:
        """Raises InputError where latents are not finite."""
        wrong = ~np.isfinite(moments).all((1, 2, 3, 4))
        for index in indices[wrong][:1]:
            raise _bad(self.directory, self.files[shard], "its latents of row "
                       f"{index - self.starts[shard]} are not all finite: write it again")


def holds_shards(directory: epath.PathLike) -> bool:
    """Whether a folder holds cached latents in this layout.

    >>> holds_shards("/nowhere")
    False
    """
    folder = user_path(directory)
    return folder.is_dir() and bool(_names(folder))


def _names(folder: epath.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()
                  if path.name.endswith(SUFFIX) and not path.name.startswith("."))


def open_latent_shards(
    directory: epath.PathLike, *, num_classes: int | None = None
) -> LatentShards:
    """Opens cached latents.

    Args:
      directory: the folder, on a local disk.
      num_classes: number of classes, which labels must be below; 0 ignores the labels; by default
        the largest label + 1.

    Raises:
      InputError: a file is damaged, holds something else, or differs from the first one, or a label
        is not in range. Its field is "directory", and the text names the file.
    """
    folder = user_path(directory)
    files, layouts, labels = tuple(_names(folder)), [], []
    for name in files:
        with _open(folder, name) as file:
            layout, count = _layout(folder, name, file)
            layouts.append(layout)
            labels.append(file.get_tensor(_LABELS) if layout.has_labels else np.zeros(count))
        if layout != layouts[0]:
            raise _bad(folder, name, f"it holds {layout}, but {files[0]!r} {layouts[0]}: keep "
                       "latents of different autoencoders, resolutions and types apart")
        _check_labels(folder, name, labels[-1], num_classes)
    known = np.concatenate(labels).astype(np.int64)
    is_labelled = layouts[0].has_labels and num_classes != 0
    return LatentShards(
        name=folder.name, directory=os.fspath(folder), files=files, layout=layouts[0],
        starts=np.cumsum([0, *map(len, labels)]), known_labels=known if is_labelled else None,
        num_classes=(num_classes or int(known.max()) + 1) if is_labelled else 0,
    )  # fmt: skip


def _layout(folder: epath.Path, name: str, file: Any) -> tuple[ShardLayout, int]:
    """The layout of a file, and the number of its samples."""
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    arrays = tuple(array for array in _LATENTS if array in slices)
    if arrays[:1] != _LATENTS[:1]:
        raise _bad(folder, name, f"it holds {', '.join(sorted(slices))[:200] or 'nothing'}, and no "
                   "latents: give a folder of cached latents alone")
    shapes = [tuple(slices[array].get_shape()) for array in arrays]
    dtypes = {slices[array].get_dtype() for array in arrays}
    count, *shape = shapes[0]
    if len(shape) != 3 or not count or len(set(shapes)) > 1 or not dtypes < set(_DTYPES):
        held = ", ".join(f"{array} {s} {slices[array].get_dtype()}"
                         for array, s in zip(arrays, shapes, strict=True))
        raise _bad(folder, name, f"it holds {held}: latents are [n, c, h, w] in F16 or F32, and "
                   "those of mirror images of the same shape")
    if _LABELS in slices and (slices[_LABELS].get_shape() != [count]
                              or slices[_LABELS].get_dtype() not in _WHOLE):
        raise _bad(folder, name, f"its labels are {slices[_LABELS].get_shape()} "
                   f"{slices[_LABELS].get_dtype()}: give {count} whole numbers")
    return ShardLayout(arrays, tuple(shape), *dtypes, _LABELS in slices), count


def _check_labels(
    folder: epath.Path, name: str, labels: np.ndarray, num_classes: int | None
) -> None:
    """Raises InputError where a label is not in range; with `num_classes` 0 none is looked at."""
    limit = num_classes or 2**31
    for row in np.flatnonzero((labels < 0) | (labels >= limit))[: num_classes != 0]:
        raise _bad(folder, name, f"the label of row {row} is {int(labels[row])}: labels are from 0 "
                   f"to {limit - 1}; correct it, or the number of classes")


@contextlib.contextmanager
def _open(folder: epath.PathLike, name: str) -> Iterator[Any]:
    """An opened file, whose size safetensors compares with what its header claims.

    Raises:
      InputError: it is gone, damaged or cut short.
    """
    try:
        with safe_open(os.path.join(folder, name), framework="np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _bad(folder, name, f"is no whole safetensors file ({brief(error)}): copy it again"
                   ) from None


def _bad(folder: epath.PathLike, name: str, remedy: str) -> InputError:
    return InputError("directory", os.fspath(folder), f"{name!r}: {remedy}")
