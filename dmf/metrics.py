"""How far a set of samples is from a set of images: moments, Frechet distance, label agreement."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from dmf.typing import InputError


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


def frechet_distance(a: RunningMoments, b: RunningMoments) -> float:
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
