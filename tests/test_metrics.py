"""Distances and moments against closed forms, and what the checks of a measurement refuse."""

import numpy as np
import pytest
import scipy.linalg

from dmf import metrics
from dmf.typing import InputError

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
