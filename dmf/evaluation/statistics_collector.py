"""Statistics of a set of images, collected part by part over the devices of this process.

Images go through the devices in chunks of a fixed size, one chunk per device at a time, and a part
is a number of whole chunks. Neither images nor statistics therefore depend on the number of
devices. A finished part is a file: an interrupted collection resumes, and processes share parts.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from dmf.errors import NotFinite, check_at_least
from dmf.evaluation.evaluated_images import ReadImages
from dmf.evaluation.feature_extractors import Extractor
from dmf.evaluation.feature_statistics import Statistics, is_whole, read_statistics
from dmf.runtime.memoize import memoized
from dmf.runtime.processes import all_gather
from dmf.runtime.progress import Progress
from dmf.runtime.sharding import map_over_devices, replicate_on_host
from dmf.sampling.generator import chunks

# Features [n, d] by kind.
Features = dict[str, np.ndarray]
# Indices of images, whether they are finite, and their features.
Batch = tuple[np.ndarray, np.ndarray, Features]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StatisticsCollector:
    """Collects statistics of the features of images.

    Attributes:
      extractor: computes the features.
      mesh: a mesh of devices of this process.
      chunk_size: images of a chunk, which a device processes at a time; another size may round
        otherwise.
      part_size: images between two files, rounded up to whole chunks.
    """

    extractor: Extractor
    mesh: Mesh
    chunk_size: int
    part_size: int

    def __post_init__(self):
        check_at_least(self, 1, "chunk_size", "part_size")

    @functools.cached_property
    def _extract(self) -> Callable[[UInt8[np.ndarray, "n h w c"]], dict[str, jax.Array]]:
        compiled = _compiled(self.extractor.apply, self.mesh)
        params = replicate_on_host(self.extractor.params, self.mesh)
        return lambda images: compiled(params, images)

    def widths(self, shape: tuple[int, ...]) -> dict[str, int]:
        """The number of values of the features of an image of a shape (h, w, c), by kind."""
        image = jax.ShapeDtypeStruct((1, *shape), np.uint8)
        features = jax.eval_shape(self.extractor.apply, self.extractor.params, image)
        return {kind: values.shape[1] for kind, values in features.items()}

    def features(self, images: UInt8[np.ndarray, "n h w c"]) -> Features:
        """The features of any number of images at once, by kind."""
        size = -(-len(images) // self.mesh.size) * self.mesh.size
        padded = np.zeros((size, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        features = jax.device_get(self._extract(padded))
        return {kind: values[: len(images)] for kind, values in features.items()}

    def collect(
        self,
        read: ReadImages,
        count: int,
        folder: epath.Path,
        *,
        feature_strides: Mapping[str, int],
        name: str,
    ) -> Statistics:
        """The statistics of images 0 to count - 1.

        Args:
          read: reads images by their indices, a chunk per device at once; the last indices may
            exceed the count.
          count: number of images.
          folder: for the parts.
          feature_strides: for each kind of features to store, the stride n: the features of every
            n-th image are stored.
          name: of the images, for the progress.

        Raises:
          NotFinite: some images hold NaN or infinity; all processes raise it.
          RunError: a part cannot be written.
        """
        size = -(-self.part_size // self.chunk_size) * self.chunk_size
        parts = {folder / f"{number:05}.npz": (first, min(first + size, count))
                 for number, first in enumerate(range(0, count, size))}
        assigned = list(parts)[jax.process_index() :: jax.process_count()]
        todo = [path for path in assigned if not is_whole(path)]
        total = sum(last - first for first, last in (parts[path] for path in assigned))
        done = total - sum(last - first for first, last in (parts[path] for path in todo))
        progress = Progress(name, done, total, "images")
        with _raised_in_all_processes():
            for path in todo:
                self._collect_part(read, *parts[path], feature_strides, progress).write(path)
        statistics = Statistics(feature_strides)
        for path in parts:
            statistics.merge(read_statistics(path, feature_strides))
        return statistics

    def _collect_part(
        self,
        read: ReadImages,
        first: int,
        last: int,
        feature_strides: Mapping[str, int],
        progress: Progress,
    ) -> Statistics:
        """The statistics of images first to last - 1."""
        statistics, bad, waiting = Statistics(feature_strides), [], []
        # Sums take long: several chunks are added to them at once, always the same number.
        chunks_at_once = max(1, 1024 // self.chunk_size)
        for indices, finite, features in self._batches(read, first, last):
            bad += indices[~finite].tolist()
            progress.add(len(indices))
            for start in range(0, len(indices), self.chunk_size):
                chunk = slice(start, min(start + self.chunk_size, len(indices)))
                values = {kind: values[chunk] for kind, values in features.items()}
                waiting.append((indices[chunk], values))
                if len(waiting) == chunks_at_once:
                    statistics.add(*_concatenate(waiting))
                    waiting = []
        if waiting:
            statistics.add(*_concatenate(waiting))
        if bad:
            raise NotFinite(f"{len(bad)} of images {first} to {last - 1} hold NaN or infinity, the "
                            f"first of them {bad[0]}: nothing can be measured on them")
        return statistics

    def _batches(self, read: ReadImages, first: int, last: int) -> Iterator[Batch]:
        """The features of images in order, a chunk per device at once. The devices compute the next
        batch while the caller uses this one."""

        def begin(indices: Int[np.ndarray, "n"]) -> tuple[Any, Any, Any]:
            images, finite = read(indices)
            return indices, finite, self._extract(images)

        def end(indices: Int[np.ndarray, "n"], finite: Any, features: Any) -> Batch:
            inside = indices < last
            finite, features = jax.device_get((finite, features))
            features = {kind: values[inside] for kind, values in features.items()}
            return indices[inside], finite[inside], features

        current = None
        for indices in chunks(last, self.chunk_size * self.mesh.size, first):
            previous, current = current, begin(indices)
            if previous is not None:
                yield end(*previous)
        if current is not None:
            yield end(*current)


@contextmanager
def _raised_in_all_processes() -> Iterator[None]:
    """Waits until all processes have left the block; raises NotFinite if one of them has."""
    problem = ""
    try:
        yield
    except NotFinite as error:
        problem = str(error)
    problems = [each for each in all_gather(problem) if each]
    if problems:
        raise NotFinite(problems[0])


@memoized
def _compiled(apply: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The program of an extractor, one for all sets of images."""
    return map_over_devices(apply, mesh)


def _concatenate(chunks: Sequence[tuple[np.ndarray, Features]]) -> tuple[np.ndarray, Features]:
    """Indices and features of several chunks as one."""
    indices, features = zip(*chunks, strict=True)
    joined = {kind: np.concatenate([each[kind] for each in features]) for kind in features[0]}
    return np.concatenate(indices), joined
