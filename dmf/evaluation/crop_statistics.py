"""Statistics of the crops that `dmf prepare` makes: a reference from the same pass as the dataset.

Sums are too large to be stored for every shard. Each process therefore adds its shards up in one
file, which also lists them: a shard that is made again after an interruption is not added twice.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from dmf.errors import RunError
from dmf.evaluation.evaluator import Evaluator
from dmf.evaluation.feature_statistics import Statistics, read_part_numbers, read_statistics
from dmf.evaluation.reference_statistics import (
    Reference,
    feature_strides,
    reference_from_statistics,
    write_reference,
)
from dmf.runtime.checksums import fingerprint
from dmf.runtime.paths import user_path
from dmf.runtime.progress import log

_FILES = "statistics-*.npz"


class CropStatistics:
    """Collects statistics of crops, shard by shard."""

    def __init__(
        self,
        evaluator: Evaluator,
        folder: epath.Path,
        *,
        side: int,
        count: int,
        reference: epath.PathLike,
        process: int = 0,
    ):
        """Checks that there are enough images.

        Args:
          evaluator: of the protocol.
          folder: for the sums.
          side: height and width of the crops.
          count: number of images.
          reference: the .npz file to write.
          process: number of this process, of those that share the work.

        Raises:
          InputError: there are too few images for a covariance.
        """
        evaluator.check_image_count((side, side, 3), count, field="--reference", value=reference)
        self._collector = evaluator.collector
        self._strides = feature_strides(evaluator.protocol.stored_reference_features, count)
        self._folder, self._reference_file = folder, user_path(reference)
        self._file = folder / _FILES.replace("*", f"{process:05}")
        self._shard = Statistics(self._strides)

    @property
    def identity(self) -> Any:
        """What the statistics depend on but the crops, as JSON."""
        extractor = self._collector.extractor
        return [list(extractor.kinds), fingerprint(extractor.params), self._strides]

    def add(self, indices: Sequence[int], pixels: UInt8[np.ndarray, "n side side 3"]) -> None:
        """Adds crops of the current shard.

        Args:
          indices: of the images.
          pixels: the crops, possibly followed by padding.
        """
        features = self._collector.features(pixels)
        self._shard.add(
            np.array(indices), {kind: values[: len(indices)] for kind, values in features.items()}
        )

    def finish(self, shard: int) -> None:
        """Adds the current shard to the sums, unless they contain it already.

        Args:
          shard: number of the shard.

        Raises:
          RunError: the disk is full or cannot be written.
        """
        finished, self._shard = self._shard, Statistics(self._strides)
        finished.part_numbers.append(shard)
        with self._damage_named():
            if any(shard in read_part_numbers(path) for path in self._folder.glob(_FILES)):
                return
            total = Statistics(self._strides)
            if self._file.exists():
                total = read_statistics(self._file, self._strides)
        total.merge(finished)
        total.write(self._file)

    def write(self) -> None:
        """Writes the statistics of all shards, of all processes, as a reference.

        Raises:
          RunError: the disk is full or cannot be written.
        """
        write_reference(self._reference_file, self.reference(self._reference_file.name))
        log(f"reference written: {self._reference_file}")

    @contextlib.contextmanager
    def _damage_named(self) -> Iterator[None]:
        """Raises RunError where sums cannot be read: their shards have to be read again."""
        try:
            yield
        except Exception as error:  # Python does not document all that zipfile and NumPy raise.
            raise RunError(f"{self._folder}/{_FILES}: the sums are damaged ({error}); remove "
                           f"{self._folder} and run the same command again") from error

    def reference(self, name: str) -> Reference:
        """The statistics of all shards, of all processes."""
        total = Statistics(self._strides)
        with self._damage_named():
            for path in sorted(self._folder.glob(_FILES)):
                total.merge(read_statistics(path, self._strides))
        return reference_from_statistics(name, total, None)
