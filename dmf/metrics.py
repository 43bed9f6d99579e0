"""How far a set of samples is from a set of images, by their features."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dmf.typing import InputError

# Samples of a split of the Inception score, and which neighbour precision and recall look at.
SPLIT, NEIGHBOURS = 5000, 3


class Moments(NamedTuple):
    """Mean [d] and unbiased covariance [d, d] of features, float64."""

    mean: Float[np.ndarray, "d"]
    covariance: Float[np.ndarray, "d d"]


@dataclasses.dataclass
class RunningMoments:
    """Mean and unbiased covariance of vectors [n, d] seen in parts, in float64.

    Each part is centred by itself and joined to the rest by the rule of Chan, Golub and LeVeque
    (1979), so that large offsets cost no precision, and sums made apart can be joined.

    Attributes:
      count: vectors seen.
      mean: [d], theirs.
      scatter: [d, d], the sum of outer products of vectors minus the mean.
    """

    count: int = 0
    mean: Float[np.ndarray, "d"] | None = None
    scatter: Float[np.ndarray, "d d"] | None = None

    def add(self, features: Float[np.ndarray, "n d"]) -> None:
        """Takes in more vectors.

        Raises:
          InputError: some are not finite.
        """
        features = np.asarray(features, np.float64)
        bad = int((~np.isfinite(features)).any(axis=1).sum())
        if bad:
            raise InputError(f"{bad} of {len(features)} samples hold NaN or infinity: nothing can "
                             "be measured on them")
        mean = features.mean(axis=0)
        features = features - mean[None]
        self.merge(RunningMoments(len(features), mean, features.T @ features))

    def merge(self, other: "RunningMoments") -> None:
        """Takes in what was seen elsewhere."""
        if not self.count:
            self.count, self.mean = other.count, other.mean
            self.scatter = other.scatter.copy()
            return
        apart, total = other.mean - self.mean, self.count + other.count
        self.scatter += other.scatter
        self.scatter += np.outer(apart, apart * (self.count * other.count / total))
        self.mean = self.mean + apart * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased covariance of all vectors seen; at least 2."""
        if self.count < 2:
            raise InputError(f"{self.count} samples: a covariance needs at least 2")
        return self.scatter / (self.count - 1)


def moments(features: Float[np.ndarray, "n d"]) -> RunningMoments:
    """The moments of one array of vectors."""
    running = RunningMoments()
    running.add(features)
    return running


def frechet_distance(a: Moments | RunningMoments, b: Moments | RunningMoments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), Frechet (1957), arXiv:1706.08500.

    The trace of the root is that of the symmetric (C_a^(1/2) C_b C_a^(1/2))^(1/2), by eigenvalues.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    return float(
        np.sum((a.mean - b.mean) ** 2) + trace - 2 * np.sqrt(np.maximum(product, 0)).sum()
    )


@dataclasses.dataclass
class RunningInceptionScore:
    """exp(E KL(p(y|x) || p(y))), arXiv:1606.03498: the mean over splits of consecutive samples.

    Attributes:
      split: samples of a split; the last one may have fewer.
      sums: by the number of a split: how many were seen, the sum of their p log p, and of their p.
    """

    split: int = SPLIT
    sums: dict[int, tuple[int, float, np.ndarray]] = dataclasses.field(default_factory=dict)

    def add(
        self, indices: Int[np.ndarray, "n"], probabilities: Float[np.ndarray, "n k"]
    ) -> None:
        """Takes in a softmax [k] for each of some samples, whose indices say their splits."""
        p = np.asarray(probabilities, np.float64)
        entropies = (p * np.log(np.maximum(p, 1e-300))).sum(axis=1)
        for number in np.unique(indices // self.split).tolist():
            here = indices // self.split == number
            self._take(number, (int(here.sum()), float(entropies[here].sum()), p[here].sum(0)))

    def merge(self, other: "RunningInceptionScore") -> None:
        """Takes in what was seen elsewhere."""
        for number, sums in other.sums.items():
            self._take(number, sums)

    def _take(self, number: int, sums: tuple[int, float, np.ndarray]) -> None:
        count, entropy, total = self.sums.get(number, (0, 0.0, np.zeros_like(sums[2])))
        self.sums[number] = count + sums[0], entropy + sums[1], total + sums[2]

    @property
    def score(self) -> float:
        """The score of all samples seen."""
        scores = []
        for _, (count, entropy, total) in sorted(self.sums.items()):
            mean = total / count
            scores.append(np.exp(entropy / count - mean @ np.log(np.maximum(mean, 1e-300))))
        return float(np.mean(scores))


def inception_score(probabilities: Float[np.ndarray, "n k"], *, split: int = SPLIT) -> float:
    """The Inception score of a softmax a sample, see `RunningInceptionScore`."""
    running = RunningInceptionScore(split)
    running.add(np.arange(len(probabilities)), probabilities)
    return running.score


def precision_recall(
    reference: Float[np.ndarray, "n d"], samples: Float[np.ndarray, "m d"], *, k: int = NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall (arXiv:1904.06991).

    Precision is the share of samples that lie in the reference's manifold: no farther from one of
    its points than the k-th nearest other point of the reference is. Recall is the same with the
    two exchanged.

    Raises:
      InputError: a set has no k-th neighbour.
    """
    if min(len(reference), len(samples)) <= k:
        raise InputError(f"{min(len(reference), len(samples))} images: precision and recall need "
                         f"more than {k}")
    of_reference, of_samples = _radii(reference, k), _radii(samples, k)
    return _covered(samples, reference, of_reference), _covered(reference, samples, of_samples)


def _squared_distances(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n m"]:
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.maximum(squares, 0)


def _radii(x: Float[np.ndarray, "n d"], k: int) -> Float[np.ndarray, "n"]:
    """Squared distance of each point to its k-th nearest other point."""
    radii = []
    for part in _parts(x):
        nearest = np.full((len(part), k + 1), np.inf)  # itself among them
        for others in _parts(x):
            found = np.concatenate([nearest, _squared_distances(part, others)], axis=1)
            nearest = np.partition(found, k, axis=1)[:, : k + 1]
        radii.append(nearest.max(axis=1))
    return np.concatenate(radii)


def _covered(
    points: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "m d"],
    radii: Float[np.ndarray, "m"],
) -> float:
    """Share of points that lie in one of the balls."""
    hits = []
    for part in _parts(points):
        hit = np.zeros(len(part), bool)
        for centre, radius in zip(_parts(centres), _parts(radii), strict=True):
            hit |= (_squared_distances(part, centre) <= radius[None]).any(axis=1)
        hits.append(hit)
    return float(np.concatenate(hits).mean())


def _parts(x: Float[np.ndarray, "n *d"], size: int = 2500) -> Iterator[Float[np.ndarray, "m *d"]]:
    """Rows in parts, in float64: distances between two parts fit in memory."""
    return (np.asarray(x[i : i + size], np.float64) for i in range(0, len(x), size))


def halves_distance(features: Float[np.ndarray, "n d"], *, splits: int = 10) -> float:
    """Frechet distance between two random halves of a set, the mean of several splits: what
    chance alone amounts to."""
    half = len(features) // 2
    orders = [np.random.default_rng(seed).permutation(len(features)) for seed in range(splits)]
    parts = [(features[order[:half]], features[order[half:]]) for order in orders]
    return float(np.mean([frechet_distance(moments(a), moments(b)) for a, b in parts]))


def label_agreement(
    reference: Float[np.ndarray, "n d"],
    reference_labels: Int[np.ndarray, "n"],
    samples: Float[np.ndarray, "m d"],
    labels: Int[np.ndarray, "m"],
) -> float:
    """Share of samples to which a plain classifier (a support vector machine with a Gaussian
    kernel, trained on the reference) gives the label they were made for."""
    from sklearn.svm import SVC

    return float(np.mean(SVC().fit(reference, reference_labels).predict(samples) == labels))
