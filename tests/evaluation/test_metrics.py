"""Distances and moments against closed forms, and what the checks of a measurement refuse."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from dmf.errors import InputError
from dmf.evaluation import metrics
from dmf.evaluation.metric import Metric
from dmf.registry import components

RANDOM = np.random.default_rng(0)


def exact(mean: np.ndarray, covariance: np.ndarray) -> metrics.RunningMoments:
    """Moments of a set of 2d points that has exactly this mean and covariance."""
    d = len(mean)
    root = scipy.linalg.sqrtm(covariance).real * np.sqrt((2 * d - 1) / 2)
    return metrics.moments(np.concatenate([mean + root.T, mean - root.T]))


def random_covariance(d: int) -> np.ndarray:
    root = RANDOM.normal(size=(d, d))
    return root @ root.T + 0.1 * np.eye(d)


def test_distance_of_gaussians_whose_covariances_commute():
    mean = np.array([1.0, -2.0, 0.5])
    a, b = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.25])
    expected = 1.0 + 4.0 + 0.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    distance = metrics.frechet_distance(exact(np.zeros(3), np.diag(a)), exact(mean, np.diag(b)))
    assert distance == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("d", [2, 5, 20])
def test_distance_of_gaussians_whose_covariances_do_not_commute(d):
    means, covariances = RANDOM.normal(size=(2, d)), [random_covariance(d) for _ in range(2)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(covariances[0] + covariances[1])
    distance = metrics.frechet_distance(*map(exact, means, covariances))
    assert distance == pytest.approx(expected - 2 * np.trace(root), rel=1e-8)


def test_distance_is_symmetric_and_zero_from_itself():
    a, b = (metrics.moments(RANDOM.normal(size=(40, 6)) * scale) for scale in (1.0, 3.0))
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a))
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_distance_of_singular_covariances():
    flat, double = (metrics.moments(np.outer(scale * np.arange(-5.0, 6), np.ones(4)))
                    for scale in (1, 2))
    # All variance lies along (1, 1, 1, 1): 4 * 11 for one and four times that for the other.
    assert metrics.frechet_distance(flat, double) == pytest.approx(44 * (2 - 1) ** 2, rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_in_parts_are_those_of_the_whole(offset):
    features = RANDOM.normal(size=(100, 7)) + offset
    running = metrics.RunningMoments()
    for part in np.split(features, [1, 30, 31, 90]):
        running.add(part)
    assert running.count == 100
    np.testing.assert_allclose(running.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(running.covariance, np.cov(features, rowvar=False), atol=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(bad):
    features = RANDOM.normal(size=(5, 3))
    features[[1, 4], 2] = bad
    with pytest.raises(InputError, match="2 of 5 samples"):
        metrics.moments(features)


def test_one_sample_has_no_covariance():
    with pytest.raises(InputError, match="at least 2"):
        _ = metrics.moments(np.ones((1, 3))).covariance


def test_two_halves_of_a_set_differ_by_what_chance_amounts_to():
    features = RANDOM.normal(size=(4000, 3))
    chance = metrics.halves_distance(features)
    assert chance == metrics.halves_distance(features)
    # Two samples of n: d 2/n from the means, and a quarter of |C_a - C_b|^2 = 2 d (d + 1) / n.
    assert chance == pytest.approx(3 * 2 / 2000 + 2 * 3 * 4 / 2000 / 4, rel=0.5)
    assert metrics.halves_distance(features, splits=1) != chance


def test_label_agreement_is_the_share_of_right_labels():
    centres = 10 * np.eye(3)
    labels = np.arange(60) % 3
    reference = centres[labels] + 0.1 * RANDOM.normal(size=(60, 3))
    samples = centres[labels] + 0.1 * RANDOM.normal(size=(60, 3))
    claimed = labels.copy()
    claimed[:15] = (claimed[:15] + 1) % 3
    assert metrics.label_agreement(reference, labels, samples, labels) == 1.0
    assert metrics.label_agreement(reference, labels, samples, claimed) == 0.75


def test_inception_score_of_known_classes():
    """Even and certain: the number of classes. All alike: 1."""
    certain = np.eye(5)[np.arange(100) % 5]
    assert metrics.inception_score(certain) == pytest.approx(5)
    assert metrics.inception_score(np.full((100, 5), 0.2)) == pytest.approx(1)
    halves = np.concatenate([certain[:50], np.full((50, 5), 0.2)])
    assert metrics.inception_score(halves, split=50) == pytest.approx((5 + 1) / 2)
    # As the published evaluators do, a last split that is not full counts like the others.
    assert metrics.inception_score(halves[:75], split=50) == pytest.approx((5 + 1) / 2)


def test_inception_score_has_splits_of_5000_samples():
    """Each split has one class, and the next split has the other."""
    certain = np.eye(2)[np.arange(10_000) // 5000]
    assert metrics.inception_score(certain) == pytest.approx(1)
    assert metrics.inception_score(np.roll(certain, 2500, axis=0)) == pytest.approx(2)


def test_inception_score_against_entropies():
    p = RANDOM.dirichlet(np.ones(7), 300)
    q = p.mean(0)
    entropy = scipy.stats.entropy
    expected = np.exp(entropy(q) - np.mean([entropy(row) for row in p]))
    assert metrics.inception_score(p) == pytest.approx(expected, rel=1e-9)


def test_precision_and_recall_of_known_sets():
    line = np.stack([np.arange(40.0), np.zeros(40)], axis=1)
    near, away = np.array([[0.0, 0.5]]), np.array([[5000.0, 0.0]])
    assert metrics.precision_recall(line, line + near) == (1.0, 1.0)
    assert metrics.precision_recall(line, line + away) == (0.0, 0.0)
    # Half of the samples far away; the others cover the left half of the reference and 3 beyond.
    mixed = np.concatenate([line[:20], line[:20] + away])
    assert metrics.precision_recall(line, mixed) == (0.5, 23 / 40)


def test_precision_and_recall_one_by_one():
    a, b = RANDOM.normal(size=(60, 4)), RANDOM.normal(size=(50, 4)) * 0.7 + 0.3

    def share(points, centres):
        radii = [np.sort(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
        return np.mean([
            any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True))
            for p in points
        ])

    assert metrics.precision_recall(a, b) == (share(b, a), share(a, b))
    with pytest.raises(InputError, match="3 images: precision and recall need more than 3"):
        metrics.precision_recall(a[:3], b)


# Kernel Inception Distance.


def plain_kid(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate, pair by pair."""

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    of_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    of_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    of_both = sum(kernel(a, b) for a in x for b in y)
    return of_x / (n * (n - 1)) + of_y / (m * (m - 1)) - 2 * of_both / (n * m)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("block", [2500, 7, 1])
def test_kid_pair_by_pair(monkeypatch, dtype, block):
    x = RANDOM.normal(size=(23, 5)).astype(dtype)
    y = (RANDOM.normal(size=(31, 5)) * 1.5 + 0.2).astype(dtype)
    blocks = metrics._blocks
    monkeypatch.setattr(metrics, "_blocks", lambda rows: blocks(rows, block))
    expected = plain_kid(x.astype(float), y.astype(float))
    assert expected > 0.1
    assert metrics.kernel_inception_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert metrics.kernel_inception_distance(y, x) == pytest.approx(expected, rel=1e-10)


def test_kid_of_two_halves_of_one_distribution_is_0_in_the_mean():
    def of_halves(seed):
        features = np.random.default_rng(seed).normal(size=(40, 4))
        return metrics.kernel_inception_distance(features[:20], features[20:])

    estimates = np.array([of_halves(seed) for seed in range(400)])
    error = estimates.std() / np.sqrt(len(estimates))
    assert abs(estimates.mean()) < 3 * error
    assert (estimates < 0).mean() > 0.3, "an unbiased estimate is often negative"
    # A biased estimate counts pairs of a vector with itself, and would miss 0 by far more: by
    # 2 (E k(x, x) - E k(x, y)) / 20, where k(x, x) = (|x|^2 / 4 + 1)^3 is 2^3 or so.
    assert 10 * error < 2 * (2**3 - 1) / 20


def test_kid_needs_two_images_of_each_set():
    with pytest.raises(InputError, match="1 images: kid needs at least 2"):
        metrics.kernel_inception_distance(np.ones((5, 3)), np.ones((1, 3)))


# The registered metrics.


def test_every_metric_describes_itself():
    for name, metric in components("metric").items():
        assert metric is metrics.lookup_metric(name) is metrics.find_metric(name)
        assert metric.title and metric.description.endswith(".")
    shares = {name for name, metric in components("metric").items() if metric.is_share}
    assert shares == {"precision", "recall", "label_agreement"}
    better = {name for name, metric in components("metric").items() if metric.higher_is_better}
    assert better == shares | {"inception_score"}


def test_numbers_are_shown_as_the_metric_says():
    assert metrics.lookup_metric("recall").format(0.256) == "26%"
    assert metrics.lookup_metric("fid").format(2.345678) == "2.35"
    assert metrics.lookup_metric("kid").format(0.00123456) == "0.00123"


def test_an_unknown_metric_is_refused():
    assert metrics.find_metric("kd") is None
    with pytest.raises(InputError, match="^metrics=kd: choose one of fd_dinov2"):
        metrics.lookup_metric("kd")


def test_a_metric_needs_what_can_be_collected():
    with pytest.raises(InputError, match="^needs=pixels: choose of moments"):
        Metric(title="T", description="D.", features="pool3", needs=("pixels",),
               higher_is_better=True, compute=lambda reference, samples: 0.0)


def test_label_agreement_with_a_single_class_is_the_share_of_that_class():
    rng = np.random.default_rng(0)
    reference, samples = rng.normal(size=(2, 8, 3)).astype(np.float32)
    labels = np.array([3, 3, 1, 2, 0, 4, 5, 6])
    assert metrics.label_agreement(reference, np.full(8, 3), samples, labels) == 0.25
