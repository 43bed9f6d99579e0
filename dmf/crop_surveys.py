"""Statistics of crops as they go by: a reference made in the same pass as a dataset.

Sums are too large to be kept for every shard, so each process adds its shards up in one file, which
also says which shards are in it: one that is made again after an interruption is not added twice.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from dmf.evaluator import Evaluator
from dmf.intact import fingerprint
from dmf.references import Reference, kept_of, of_statistics
from dmf.statistics import Statistics, parts_in, read_statistics

_FILES = "statistics-*.npz"


class CropSurvey:
    """Takes the statistics of crops, shard by shard."""

    def __init__(
        self, evaluator: Evaluator, folder: epath.Path, *, side: int, count: int, process: int = 0
    ):
        """Checks that there are enough images.

        Args:
          evaluator: of the protocol.
          folder: for the sums.
          side: of the crops.
          count: of the images.
          process: which of those that share the work.

        Raises:
          InputError: there are fewer images than a covariance needs.
        """
        evaluator.check_count((side, side, 3), count, f"reference={count} images")
        self._surveyor = evaluator.surveyor
        self.keep = kept_of(evaluator.protocol.kept_of_reference, count)
        self._folder = folder
        self._path = folder / _FILES.replace("*", f"{process:05}")
        self._shard = Statistics(self.keep)

    @property
    def identity(self) -> Any:
        """Tells the features from others."""
        extractor = self._surveyor.extractor
        return [list(extractor.kinds), fingerprint(extractor.params), self.keep]

    def add(self, indices: Sequence[int], pixels: UInt8[np.ndarray, "n side side 3"]) -> None:
        """Takes in crops of the shard that is being made; there may be more pixels than indices."""
        found = self._surveyor.features(pixels)
        features = {kind: values[: len(indices)] for kind, values in found.items()}
        self._shard.add(np.array(indices), features)

    def finish(self, shard: int) -> None:
        """Adds the shard to the sums, if it is not among them.

        Raises:
          RunError: the disk is full or cannot be written.
        """
        made, self._shard = self._shard, Statistics(self.keep)
        made.parts.append(shard)
        if any(shard in parts_in(path) for path in self._folder.glob(_FILES)):
            return
        total = Statistics(self.keep)
        if self._path.exists():
            total = read_statistics(self._path, self.keep)
        total.merge(made)
        total.write(self._path)

    def reference(self, name: str) -> Reference:
        """What all processes have added up."""
        total = Statistics(self.keep)
        for path in sorted(self._folder.glob(_FILES)):
            total.merge(read_statistics(path, self.keep))
        return of_statistics(name, total, None)
