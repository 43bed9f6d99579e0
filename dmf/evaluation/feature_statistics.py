"""Statistics of the features of images: sums that do not grow, and features where they are needed.

The statistics of a set are the merged statistics of its parts. A part can be a file, so that an
interrupted evaluation resumes, and several processes share one evaluation.
"""

import dataclasses
import io
import zipfile
from collections.abc import Mapping

import numpy as np
from etils import epath
from jaxtyping import Float, Int, Shaped

from dmf.evaluation.metric import MetricInput
from dmf.evaluation.running_statistics import RunningInceptionScore, RunningMoments
from dmf.runtime.files import new_file

PROBABILITIES = "probabilities"
_PART_NUMBERS = "parts"


@dataclasses.dataclass
class Statistics:
    """Statistics of the features of images, by kind of features.

    Attributes:
      feature_strides: for each kind of features that is stored, the stride n: the features of every
        n-th image are stored.
      moments: mean and covariance of each kind of features but probabilities.
      inception_score: sums over probabilities.
      feature_parts: stored features, float32, in parts in the order they were added.
      part_numbers: numbers of the parts of the set that these statistics cover, where the caller
        counts them.
    """

    feature_strides: Mapping[str, int] = dataclasses.field(default_factory=dict)
    moments: dict[str, RunningMoments] = dataclasses.field(default_factory=dict)
    inception_score: RunningInceptionScore = dataclasses.field(
        default_factory=RunningInceptionScore
    )
    feature_parts: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    part_numbers: list[int] = dataclasses.field(default_factory=list)

    def add(
        self, indices: Int[np.ndarray, "n"], features: Mapping[str, Shaped[np.ndarray, "n d"]]
    ) -> None:
        """Adds the features of some images.

        Args:
          indices: of the images.
          features: of the images, by kind.

        Raises:
          InputError: some features are not finite.
        """
        for kind, values in features.items():
            if kind == PROBABILITIES:
                self.inception_score.add(indices, values)
            else:
                self.moments.setdefault(kind, RunningMoments()).add(values)
            if kind in self.feature_strides:
                chosen = values[indices % self.feature_strides[kind] == 0]
                self.feature_parts.setdefault(kind, []).append(chosen)

    def merge(self, other: "Statistics") -> None:
        """Adds the statistics of the images that follow."""
        for kind, moments in other.moments.items():
            self.moments.setdefault(kind, RunningMoments()).merge(moments)
        self.inception_score.merge(other.inception_score)
        for kind, parts in other.feature_parts.items():
            self.feature_parts.setdefault(kind, []).extend(parts)
        self.part_numbers.extend(other.part_numbers)

    def features(self, kind: str) -> Float[np.ndarray, "n d"]:
        """All stored features of a kind."""
        if len(self.feature_parts[kind]) > 1:
            self.feature_parts[kind] = [np.concatenate(self.feature_parts[kind])]
        return self.feature_parts[kind][0]

    def metric_input(self, kind: str, labels: Int[np.ndarray, "n"] | None) -> MetricInput:
        """What a metric may use of a kind of features.

        Args:
          kind: kind of features.
          labels: of the images.
        """
        return MetricInput(
            moments=self.moments.get(kind),
            inception_score=self.inception_score if kind == PROBABILITIES else None,
            features=self.features(kind) if kind in self.feature_parts else None,
            labels=labels,
        )

    def write(self, path: epath.Path) -> None:
        """Writes a file, which appears when it is complete.

        Raises:
          RunError: the disk is full or cannot be written.
        """
        arrays: dict[str, np.ndarray] = {_PART_NUMBERS: np.array(self.part_numbers, np.int64)}
        for kind, moments in self.moments.items():
            for name in ("count", "mean", "scatter"):
                arrays[f"moments/{kind}/{name}"] = np.asarray(getattr(moments, name))
        for number, sums in self.inception_score.sums.items():
            for name, value in zip(("count", "entropy", "total"), sums, strict=True):
                arrays[f"splits/{number}/{name}"] = np.asarray(value)
        arrays |= {f"features/{kind}/values": self.features(kind) for kind in self.feature_parts}
        write_npz(path, arrays)


def write_npz(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an `.npz`, which appears when it is complete.

    Raises:
      RunError: the disk is full or cannot be written.
    """
    with new_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def read_statistics(path: epath.Path, feature_strides: Mapping[str, int]) -> Statistics:
    """Reads the statistics that `Statistics.write` wrote.

    Args:
      path: of the file.
      feature_strides: with which the statistics were collected.
    """
    groups: dict[str, dict[str, dict[str, np.ndarray]]] = {
        "moments": {}, "splits": {}, "features": {}
    }  # fmt: skip
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        part_numbers = file[_PART_NUMBERS].tolist()
        for name in sorted({*file.files} - {_PART_NUMBERS}):
            group, key, field = name.split("/")
            groups[group].setdefault(key, {})[field] = file[name]
    statistics = Statistics(feature_strides, part_numbers=part_numbers)
    for kind, fields in groups["moments"].items():
        count = int(fields["count"])
        statistics.moments[kind] = RunningMoments(count, fields["mean"], fields["scatter"])
    for number, fields in groups["splits"].items():
        sums = int(fields["count"]), float(fields["entropy"]), fields["total"]
        statistics.inception_score.sums[int(number)] = sums
    statistics.feature_parts = {
        kind: [fields["values"]] for kind, fields in groups["features"].items()
    }
    return statistics


def is_whole(path: epath.Path) -> bool:
    """Whether there is a file that `Statistics.write` wrote to its end."""
    try:
        read_part_numbers(path)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return False
    return True


def read_part_numbers(path: epath.Path) -> list[int]:
    """The numbers of the parts in a file that `Statistics.write` wrote; reads nothing else."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return arrays[_PART_NUMBERS].tolist()
