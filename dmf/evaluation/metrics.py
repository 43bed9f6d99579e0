"""The metrics, each a function of statistics and a `Metric` registered under its name."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from dmf.errors import InputError
from dmf.evaluation.metric import Metric, MetricInput
from dmf.evaluation.running_statistics import (
    SPLIT,
    Moments,
    RunningInceptionScore,
    RunningMoments,
    moments,
)
from dmf.registry import components, lookup, register

# Precision and recall: the manifold reaches from a point to its k-th nearest neighbour.
NEIGHBOURS = 3
# Numbers in the definitions of the metrics, which stand in every result.
CONSTANTS = {"inception_score_split": SPLIT, "neighbours": NEIGHBOURS}


def lookup_metric(name: str) -> Metric:
    """The metric that is registered under a name.

    Raises:
      InputError: there is none; its field is "metrics".
    """
    try:
        return lookup("metric", name)
    except InputError as error:
        raise InputError("metrics", name, error.remedy) from None


def find_metric(name: str) -> Metric | None:
    """The metric that is registered under a name; None where a file of results names a metric whose
    plugin is not loaded."""
    return components("metric").get(name)


# Frechet distances.


def frechet_distance(a: Moments | RunningMoments, b: Moments | RunningMoments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), Frechet (1957), arXiv:1706.08500.

    The trace of the root is that of the symmetric (C_a^(1/2) C_b C_a^(1/2))^(1/2), by eigenvalues.

    >>> a = Moments(np.zeros(2), np.diag([1.0, 4.0]))
    >>> b = Moments(np.array([3.0, 0.0]), np.diag([1.0, 1.0]))
    >>> round(frechet_distance(a, b), 6)  # 3^2 for the means, (2 - 1)^2 for the deviations
    10.0

    Args:
      a, b: mean [d] and covariance [d, d] of two sets of features.

    Returns:
      The squared distance, in squared units of the features.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    return float(
        np.sum((a.mean - b.mean) ** 2) + trace - 2 * np.sqrt(np.maximum(product, 0)).sum()
    )


def halves_distance(features: Float[np.ndarray, "n d"], *, splits: int = 10) -> float:
    """The Frechet distance between two random halves of a set, which is what chance alone amounts
    to; the mean over several splits."""
    half = len(features) // 2
    orders = [np.random.default_rng(seed).permutation(len(features)) for seed in range(splits)]
    halves = [(features[order[:half]], features[order[half:]]) for order in orders]
    return float(np.mean([frechet_distance(moments(a), moments(b)) for a, b in halves]))


def _frechet_distance(reference: MetricInput, samples: MetricInput) -> float:
    return frechet_distance(reference.moments, samples.moments)


register("metric", fid=Metric(
    description="Frechet distance of Inception's 2,048 pooled features (arXiv:1706.08500).",
    title="FID", features="pool3", needs=("moments",), higher_is_better=False,
    compute=_frechet_distance,
))  # fmt: skip
register("metric", sfid=Metric(
    description="Frechet distance of 2,023 spatial features of Inception (arXiv:2103.03841).",
    title="sFID", features="spatial", needs=("moments",), higher_is_better=False,
    compute=_frechet_distance,
))  # fmt: skip
register("metric", fd_dinov2=Metric(
    description="Frechet distance of DINOv2's class token (arXiv:2306.04675).",
    title="FD-DINOv2", features="dinov2", needs=("moments",), higher_is_better=False,
    compute=_frechet_distance,
))  # fmt: skip
register("metric", fd_pixels=Metric(
    description="Frechet distance of the pixels themselves, for small images.",
    title="Frechet distance", features="pixels", needs=("moments",), higher_is_better=False,
    compute=_frechet_distance,
    baseline=lambda reference: halves_distance(reference.features),
))  # fmt: skip


# Kernel Inception Distance.


def kernel_inception_distance(
    reference: Float[np.ndarray, "n d"], samples: Float[np.ndarray, "m d"]
) -> float:
    """Kernel Inception Distance (arXiv:1801.01401): the unbiased estimate of the squared maximum
    mean discrepancy with the kernel (x . y / d + 1)^3.

    Its expectation does not depend on the number of samples, and is 0 for two sets from one
    distribution; a single estimate may therefore be negative. Sums are in float64, block by block.

    >>> kernel_inception_distance(np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]]))
    9.5

    Args:
      reference, samples: features of two sets of images.

    Raises:
      InputError: a set has fewer than 2 images.
    """
    n, m = len(reference), len(samples)
    if min(n, m) < 2:
        raise InputError(f"{min(n, m)} images", remedy="kid needs at least 2")
    within = [_sum_of_distinct_pairs(x) / (len(x) * (len(x) - 1)) for x in (reference, samples)]
    between = sum(_kernel(a, b).sum() for a in _blocks(reference) for b in _blocks(samples))
    return float(within[0] + within[1] - 2 * between / (n * m))


def _kernel(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n m"]:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _sum_of_distinct_pairs(x: Float[np.ndarray, "n d"]) -> float:
    """The sum of the kernel over all ordered pairs of two different rows."""
    total = 0.0
    for i, a in enumerate(_blocks(x)):
        kernel = _kernel(a, a)
        total += kernel.sum() - np.trace(kernel)
        total += 2 * sum(_kernel(a, b).sum() for j, b in enumerate(_blocks(x)) if j > i)
    return float(total)


register("metric", kid=Metric(
    description="Kernel Inception Distance of pooled features, unbiased (arXiv:1801.01401).",
    title="KID", features="pool3", needs=("features",), higher_is_better=False, decimals=5,
    compute=lambda reference, samples: kernel_inception_distance(
        reference.features, samples.features
    ),
))  # fmt: skip


# Inception score.


def inception_score(probabilities: Float[np.ndarray, "n k"], *, split: int = SPLIT) -> float:
    """The Inception score of the softmax of each sample, see `RunningInceptionScore`."""
    running = RunningInceptionScore(split)
    running.add(np.arange(len(probabilities)), probabilities)
    return running.score


register("metric", inception_score=Metric(
    description="Inception score, the mean over splits of 5,000 samples (arXiv:1606.03498).",
    title="Inception score", features="probabilities", needs=("inception_score",),
    higher_is_better=True, compute=lambda reference, samples: samples.inception_score.score,
))  # fmt: skip


# Precision and recall.


def precision_recall(
    reference: Float[np.ndarray, "n d"], samples: Float[np.ndarray, "m d"], *, k: int = NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall (arXiv:1904.06991).

    >>> reference = np.arange(10.0)[:, None]
    >>> samples = np.array([0.0, 1.0, 2.0, 3.0, 20.0, 21.0, 22.0, 23.0])[:, None]
    >>> precision_recall(reference, samples)
    (0.5, 0.7)

    Args:
      reference, samples: features of two sets of images.
      k: see `precision`.

    Returns:
      Precision and recall, two shares from 0 to 1.

    Raises:
      InputError: a set has no k-th neighbour.
    """
    return precision(reference, samples, k=k), precision(samples, reference, k=k)


def precision(
    reference: Float[np.ndarray, "n d"], samples: Float[np.ndarray, "m d"], *, k: int = NEIGHBOURS
) -> float:
    """The share of samples that lie in the manifold of the reference (arXiv:1904.06991).

    A sample lies in it if it is no farther from one point of the reference than the k-th nearest
    other point of the reference is. Recall is the same with the two sets exchanged.

    Args:
      reference, samples: features of two sets of images.
      k: number of the neighbour.

    Raises:
      InputError: a set has no k-th neighbour.
    """
    count = min(len(reference), len(samples))
    if count <= k:
        raise InputError(f"{count} images", remedy=f"precision and recall need more than {k}")
    return _covered_share(samples, reference, _squared_radii(reference, k))


def _squared_distances(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n m"]:
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.maximum(squares, 0)


def _squared_radii(x: Float[np.ndarray, "n d"], k: int) -> Float[np.ndarray, "n"]:
    """The squared distance of each point to its k-th nearest other point."""
    radii = []
    for block in _blocks(x):
        nearest = np.full((len(block), k + 1), np.inf)  # the point itself is among them
        for others in _blocks(x):
            distances = np.concatenate([nearest, _squared_distances(block, others)], axis=1)
            nearest = np.partition(distances, k, axis=1)[:, : k + 1]
        radii.append(nearest.max(axis=1))
    return np.concatenate(radii)


def _covered_share(
    points: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "m d"],
    squared_radii: Float[np.ndarray, "m"],
) -> float:
    """The share of points that lie in one of the balls."""
    covered = []
    for block in _blocks(points):
        inside = np.zeros(len(block), bool)
        for centre, radius in zip(_blocks(centres), _blocks(squared_radii), strict=True):
            inside |= (_squared_distances(block, centre) <= radius[None]).any(axis=1)
        covered.append(inside)
    return float(np.concatenate(covered).mean())


def _blocks(x: Float[np.ndarray, "n *d"], size: int = 2500) -> Iterator[Float[np.ndarray, "m *d"]]:
    """Blocks of rows in float64, so that a matrix between two of them fits in memory."""
    return (np.asarray(x[i : i + size], np.float64) for i in range(0, len(x), size))


register("metric", precision=Metric(
    description="Share of samples in the manifold of the reference (arXiv:1904.06991).",
    title="Precision", features="pool3", needs=("features",), higher_is_better=True, is_share=True,
    compute=lambda reference, samples: precision(reference.features, samples.features),
))  # fmt: skip
register("metric", recall=Metric(
    description="Share of the reference in the manifold of the samples (arXiv:1904.06991).",
    title="Recall", features="pool3", needs=("features",), higher_is_better=True, is_share=True,
    compute=lambda reference, samples: precision(samples.features, reference.features),
))  # fmt: skip


# Label agreement.


def label_agreement(
    reference: Float[np.ndarray, "n d"],
    reference_labels: Int[np.ndarray, "n"],
    samples: Float[np.ndarray, "m d"],
    labels: Int[np.ndarray, "m"],
) -> float:
    """The share of samples that a classifier gives the label which they were generated for.

    The classifier is a support vector machine with a Gaussian kernel, trained on the reference. Of
    a reference with a single class, it gives that class to every sample.
    """
    from sklearn.svm import SVC

    if len(set(reference_labels.tolist())) == 1:
        return float(np.mean(labels == reference_labels[0]))
    return float(np.mean(SVC().fit(reference, reference_labels).predict(samples) == labels))


register("metric", label_agreement=Metric(
    description="Share of samples that a classifier of pixels gives the label they were meant for.",
    title="Label agreement", features="pixels", needs=("features", "labels"),
    higher_is_better=True, is_share=True,
    compute=lambda reference, samples: label_agreement(
        reference.features, reference.labels, samples.features, samples.labels
    ),
))  # fmt: skip
