"""Statistics that are updated part by part: sums whose size does not grow with the images."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dmf.errors import InputError

# Samples of a split of the Inception score.
SPLIT = 5000


class Moments(NamedTuple):
    """Mean [d] and unbiased covariance [d, d] of features, float64."""

    mean: Float[np.ndarray, "d"]
    covariance: Float[np.ndarray, "d d"]


@dataclasses.dataclass
class RunningMoments:
    """Mean and unbiased covariance of vectors [n, d] that arrive in parts, in float64.

    Each part is centred on its own mean and merged by the rule of Chan, Golub and LeVeque (1979).
    Large offsets therefore cost no precision, and sums of several processes can be merged.

    >>> running = RunningMoments()
    >>> running.add(np.array([[0.0, 1.0], [2.0, 1.0]]))
    >>> running.add(np.array([[4.0, 4.0]]))
    >>> running.count, running.mean.tolist()
    (3, [2.0, 2.0])
    >>> running.covariance.tolist()
    [[4.0, 3.0], [3.0, 3.0]]

    Attributes:
      count: number of vectors.
      mean: [d], their mean; None before the first part.
      scatter: [d, d], the sum of outer products of the vectors minus their mean.
    """

    count: int = 0
    mean: Float[np.ndarray, "d"] | None = None
    scatter: Float[np.ndarray, "d d"] | None = None

    def add(self, features: Float[np.ndarray, "n d"]) -> None:
        """Adds vectors.

        Args:
          features: the vectors, of any floating-point dtype.

        Raises:
          InputError: some vectors hold NaN or infinity.
        """
        features = np.asarray(features, np.float64)
        bad = int((~np.isfinite(features)).any(axis=1).sum())
        if bad:
            raise InputError(
                f"{bad} of {len(features)} samples hold NaN or infinity",
                remedy="nothing can be measured on them",
            )
        mean = features.mean(axis=0)
        features = features - mean[None]
        self.merge(RunningMoments(len(features), mean, features.T @ features))

    def merge(self, other: "RunningMoments") -> None:
        """Adds the vectors of other moments, which stay as they are."""
        if not self.count:
            self.count, self.mean = other.count, other.mean
            self.scatter = other.scatter.copy()
            return
        difference, total = other.mean - self.mean, self.count + other.count
        self.scatter += other.scatter
        self.scatter += np.outer(difference, difference * (self.count * other.count / total))
        self.mean = self.mean + difference * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased covariance of all vectors.

        Raises:
          InputError: there are fewer than 2 vectors.
        """
        if self.count < 2:
            raise InputError(f"{self.count} samples", remedy="a covariance needs at least 2")
        return self.scatter / (self.count - 1)


def moments(features: Float[np.ndarray, "n d"]) -> RunningMoments:
    """The moments of one array of vectors."""
    running = RunningMoments()
    running.add(features)
    return running


@dataclasses.dataclass
class RunningInceptionScore:
    """exp(E KL(p(y|x) || p(y))), arXiv:1606.03498: the mean over splits of consecutive samples.

    Attributes:
      split: samples of a split; the last split may have fewer.
      sums: by the number of a split: its count of samples, their sum of p log p, their sum of p.
    """

    split: int = SPLIT
    sums: dict[int, tuple[int, float, np.ndarray]] = dataclasses.field(default_factory=dict)

    def add(
        self, indices: Int[np.ndarray, "n"], probabilities: Float[np.ndarray, "n k"]
    ) -> None:
        """Adds samples.

        Args:
          indices: of the samples; sample i belongs to split i // `split`.
          probabilities: the softmax of each sample.
        """
        p = np.asarray(probabilities, np.float64)
        entropies = (p * np.log(np.maximum(p, 1e-300))).sum(axis=1)
        for number in np.unique(indices // self.split).tolist():
            here = indices // self.split == number
            self._add_sums(number, (int(here.sum()), float(entropies[here].sum()), p[here].sum(0)))

    def merge(self, other: "RunningInceptionScore") -> None:
        """Adds the samples of other sums."""
        for number, sums in other.sums.items():
            self._add_sums(number, sums)

    def _add_sums(self, number: int, sums: tuple[int, float, np.ndarray]) -> None:
        count, entropy, total = self.sums.get(number, (0, 0.0, np.zeros_like(sums[2])))
        self.sums[number] = count + sums[0], entropy + sums[1], total + sums[2]

    @property
    def score(self) -> float:
        """The Inception score of all samples."""
        scores = []
        for _, (count, entropy, total) in sorted(self.sums.items()):
            mean = total / count
            scores.append(np.exp(entropy / count - mean @ np.log(np.maximum(mean, 1e-300))))
        return float(np.mean(scores))
