"""How far a set of samples is from a set of images: moments, Frechet distance, label agreement."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dmf.typing import InputError


class Moments(NamedTuple):
    """Mean [d] and unbiased covariance [d, d] of features, float64."""

    mean: Float[np.ndarray, "d"]
    covariance: Float[np.ndarray, "d d"]


@dataclasses.dataclass
class RunningMoments:
    """Mean and unbiased covariance of vectors [n, d] seen in parts, in float64.

    Sums are kept around the first part's mean, so that large offsets cost no precision.
    """

    count: int = 0

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
        if not self.count:
            self._origin = features.mean(axis=0)
            self._sum = np.zeros_like(self._origin)
            self._outer = np.zeros((len(self._origin), len(self._origin)))
        centred = features - self._origin
        self.count += len(features)
        self._sum += centred.sum(axis=0)
        self._outer += centred.T @ centred

    @property
    def mean(self) -> Float[np.ndarray, "d"]:
        """The mean of all vectors seen."""
        return self._origin + self._sum / self.count

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased covariance of all vectors seen; at least 2."""
        if self.count < 2:
            raise InputError(f"{self.count} samples: a covariance needs at least 2")
        return (self._outer - np.outer(self._sum, self._sum) / self.count) / (self.count - 1)


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


def inception_score(
    probabilities: Float[np.ndarray, "n k"], *, split: int = 5000
) -> float:
    """exp(E KL(p(y|x) || p(y))), the mean over splits of so many samples (arXiv:1606.03498).

    Args:
      probabilities: a softmax a sample; each row sums to 1.
      split: samples of a split; a last one that is not full is left out, unless it is the only one.
    """
    p = np.asarray(probabilities, np.float64)
    count = max(len(p) // split, 1)
    scores = []
    for part in (p[i * split : (i + 1) * split] for i in range(count)):
        logs = np.log(np.maximum(part, 1e-300)) - np.log(np.maximum(part.mean(0), 1e-300))[None]
        scores.append(np.exp((part * logs).sum(1).mean()))
    return float(np.mean(scores))


def precision_recall(
    reference: Float[np.ndarray, "n d"], samples: Float[np.ndarray, "m d"], *, k: int = 3
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
    sets = [np.asarray(x, np.float64) for x in (reference, samples)]
    radii = [_radii(x, k) for x in sets]
    return _covered(sets[1], sets[0], radii[0]), _covered(sets[0], sets[1], radii[1])


def _squared_distances(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n m"]:
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.maximum(squares, 0)


def _radii(x: Float[np.ndarray, "n d"], k: int) -> Float[np.ndarray, "n"]:
    """Squared distance of each point to its k-th nearest other point."""
    parts = [np.partition(_squared_distances(part, x), k, axis=1)[:, k] for part in _parts(x)]
    return np.concatenate(parts)


def _covered(
    points: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "m d"],
    radii: Float[np.ndarray, "m"],
) -> float:
    """Share of points that lie in one of the balls."""
    hits = [(_squared_distances(part, centres) <= radii[None]).any(1) for part in _parts(points)]
    return float(np.concatenate(hits).mean())


def _parts(x: Float[np.ndarray, "n d"], size: int = 500) -> list[Float[np.ndarray, "m d"]]:
    """Rows in parts, whose distances to many points fit in memory."""
    return [x[i : i + size] for i in range(0, len(x), size)]


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
