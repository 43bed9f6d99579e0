"""What is kept of the images that were seen: sums that do not grow, and features where asked for.

The statistics of a set are those of its parts, merged; a part can be a file, so that a measurement
that was interrupted goes on, and several processes share one.
"""

import dataclasses
import io
from collections.abc import Mapping

import numpy as np
from etils import epath
from jaxtyping import Float, Int, Shaped

from dmf.files import disk_errors
from dmf.metrics import RunningInceptionScore, RunningMoments

PROBABILITIES = "probabilities"
_PARTS = "parts"


@dataclasses.dataclass
class Statistics:
    """Sums over images, by kind of feature.

    Attributes:
      keep: kinds of features that are kept: those of every n-th image.
      moments: of each kind but probabilities.
      inception_score: of the probabilities.
      kept: features in parts, in the order they were seen; float32.
      parts: numbers of the parts that are in it, for those who count them.
    """

    keep: Mapping[str, int] = dataclasses.field(default_factory=dict)
    moments: dict[str, RunningMoments] = dataclasses.field(default_factory=dict)
    inception_score: RunningInceptionScore = dataclasses.field(
        default_factory=RunningInceptionScore
    )
    kept: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    parts: list[int] = dataclasses.field(default_factory=list)

    def add(
        self, indices: Int[np.ndarray, "n"], features: Mapping[str, Shaped[np.ndarray, "n d"]]
    ) -> None:
        """Takes in the features of some images.

        Raises:
          InputError: some are not finite.
        """
        for kind, values in features.items():
            if kind == PROBABILITIES:
                self.inception_score.add(indices, values)
            else:
                self.moments.setdefault(kind, RunningMoments()).add(values)
            if kind in self.keep:
                chosen = values[indices % self.keep[kind] == 0]
                self.kept.setdefault(kind, []).append(chosen)

    def merge(self, other: "Statistics") -> None:
        """Takes in the statistics of the images that follow."""
        for kind, moments in other.moments.items():
            self.moments.setdefault(kind, RunningMoments()).merge(moments)
        self.inception_score.merge(other.inception_score)
        for kind, parts in other.kept.items():
            self.kept.setdefault(kind, []).extend(parts)
        self.parts.extend(other.parts)

    def features(self, kind: str) -> Float[np.ndarray, "n d"]:
        """All that was kept of a kind."""
        self.kept[kind] = [np.concatenate(self.kept[kind])]
        return self.kept[kind][0]

    def write(self, path: epath.Path) -> None:
        """Writes a file that appears when it is whole.

        Raises:
          RunError: the disk is full or cannot be written.
        """
        arrays: dict[str, np.ndarray] = {_PARTS: np.array(self.parts, np.int64)}
        for kind, moments in self.moments.items():
            for name in ("count", "mean", "scatter"):
                arrays[f"moments/{kind}/{name}"] = np.asarray(getattr(moments, name))
        for number, sums in self.inception_score.sums.items():
            for name, value in zip(("count", "entropy", "total"), sums, strict=True):
                arrays[f"splits/{number}/{name}"] = np.asarray(value)
        arrays |= {f"kept/{kind}/features": self.features(kind) for kind in self.kept}
        write_npz(path, arrays)


def write_npz(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an `.npz` that appears when it is whole.

    Raises:
      RunError: the disk is full or cannot be written.
    """
    partial = path.parent / f".{path.name}.partial"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)


def read_statistics(path: epath.Path, keep: Mapping[str, int]) -> Statistics:
    """The statistics that `Statistics.write` wrote."""
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {"moments": {}, "splits": {}, "kept": {}}
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        parts = file[_PARTS].tolist()
        for name in sorted({*file.files} - {_PARTS}):
            group, key, field = name.split("/")
            found[group].setdefault(key, {})[field] = file[name]
    statistics = Statistics(keep, parts=parts)
    for kind, fields in found["moments"].items():
        count = int(fields["count"])
        statistics.moments[kind] = RunningMoments(count, fields["mean"], fields["scatter"])
    for number, fields in found["splits"].items():
        sums = int(fields["count"]), float(fields["entropy"]), fields["total"]
        statistics.inception_score.sums[int(number)] = sums
    statistics.kept = {kind: [fields["features"]] for kind, fields in found["kept"].items()}
    return statistics


def parts_in(path: epath.Path) -> list[int]:
    """The parts that are in a file that `Statistics.write` wrote; nothing else of it is read."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
        return held[_PARTS].tolist()
