"""The random times of training have the stated distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dmf.errors import InputError
from dmf.objectives import (
    COSINE,
    LINEAR,
    GapPair,
    LogitNormal,
    MixedPair,
    OrderedPair,
    ScaledLinear,
    UniformTime,
    dimension_shift,
)
from dmf.objectives.time_samplers import shift_times

COUNT = 20_000
KEY = jax.random.key(3)
over_paths = pytest.mark.parametrize("path", [LINEAR, COSINE], ids=["linear", "cosine"])


def logit_normal_cdf(path, mean: float, std: float = 1.0):
    """P(t <= x), from the normal distribution of log(sigma / alpha) with noise of scale 1."""

    def log_ratio(t: np.ndarray) -> np.ndarray:
        return np.log(np.tan(np.pi / 2 * t)) if path is COSINE else special.logit(t)

    return lambda t: stats.norm.cdf((log_ratio(np.asarray(t, np.float64)) - mean) / std)


def assert_distributed(samples: jax.Array, cdf) -> None:
    """By the test of Kolmogorov and Smirnov; keys are fixed, so the outcome is too."""
    assert stats.kstest(np.asarray(samples, np.float64), cdf).pvalue > 0.01


@over_paths
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.4, 1.0), (1.2, 0.6)])
def test_logit_normal(path, mean, std):
    t = LogitNormal(mean=mean, std=std)(KEY, COUNT, path)
    assert_distributed(t, logit_normal_cdf(path, mean, std))


@over_paths
def test_uniform(path):
    assert_distributed(UniformTime()(KEY, COUNT, path), stats.uniform.cdf)


def test_the_shift_of_high_dimensions_has_its_closed_form():
    """P(t <= x) of shifted uniform times is x / (s - (s - 1) x); a logit-normal time is shifted by
    the logarithm of s in its mean."""
    s = dimension_shift(768 * 16 * 16)
    assert s == pytest.approx(48**0.5)
    assert (dimension_shift(4096), dimension_shift(16, base=4)) == (1.0, 2.0)
    t = UniformTime(shift=s)(KEY, COUNT, LINEAR)
    assert_distributed(t, lambda x: np.asarray(x) / (s - (s - 1) * np.asarray(x)))
    shifted = shift_times(LogitNormal(mean=-0.4)(KEY, COUNT, LINEAR), s)
    of_mean = LogitNormal(mean=-0.4 + np.log(s))(KEY, COUNT, LINEAR)
    np.testing.assert_allclose(of_mean, shifted, rtol=1e-5)


@over_paths
@pytest.mark.parametrize("mean", [-6.0, 0.0, 6.0])
def test_logit_normal_stays_in_the_unit_interval(path, mean):
    t = LogitNormal(mean=mean, std=3.0)(KEY, COUNT, path)
    assert t.min() >= 0 and t.max() <= 1
    assert jnp.isfinite(t).all()


@over_paths
def test_pair_is_the_larger_and_the_smaller_of_two_draws(path):
    pair = OrderedPair(first=LogitNormal(mean=0.4), second=LogitNormal(mean=-1.2))
    t, r = pair(KEY, COUNT, path)
    first, second = logit_normal_cdf(path, 0.4), logit_normal_cdf(path, -1.2)
    assert (r <= t).all()
    assert_distributed(t, lambda x: first(x) * second(x))
    assert_distributed(r, lambda x: 1 - (1 - first(x)) * (1 - second(x)))


@over_paths
def test_equal_probability_of_a_pair(path):
    one = LogitNormal(mean=-0.4)
    t, r = OrderedPair(first=one, second=one, equal_probability=0.75)(KEY, COUNT, path)
    cdf = logit_normal_cdf(path, -0.4)
    equal = np.asarray(t == r)
    assert abs(equal.mean() - 0.75) < 4 * (0.75 * 0.25 / COUNT) ** 0.5
    assert_distributed(t, lambda x: cdf(x) ** 2)
    assert_distributed(r[~equal], lambda x: 1 - (1 - cdf(x)) ** 2)


def test_a_mixed_pair_is_uniform_in_part_and_equal_times_are_one_draw():
    pair = MixedPair(times=LogitNormal(mean=3.0), uniform_probability=0.25, equal_probability=0.5)
    t, r = (np.asarray(times) for times in pair(KEY, COUNT, LINEAR))
    equal, logit_normal = t == r, logit_normal_cdf(LINEAR, 3.0)

    def mixed(x: np.ndarray, larger: int) -> np.ndarray:
        return 0.25 * x**larger + 0.75 * logit_normal(x) ** larger

    assert (r <= t).all()
    assert abs(equal.mean() - 0.5) < 4 * (0.25 / COUNT) ** 0.5
    assert_distributed(t[equal], lambda x: mixed(x, 1))
    assert_distributed(t[~equal], lambda x: mixed(x, 2))


def test_equality_is_independent_of_the_times():
    """Whether r = t is an independent draw, so t has one distribution in both groups."""
    pair = OrderedPair(first=UniformTime(), second=UniformTime(), equal_probability=0.5)
    t, r = (np.asarray(times) for times in pair(KEY, COUNT, LINEAR))
    assert stats.ks_2samp(t[t == r], t[t != r]).pvalue > 0.01


@pytest.mark.parametrize(("probability", "expected"), [(0.0, False), (1.0, True)])
def test_extreme_equal_probabilities(probability, expected):
    pair = OrderedPair(first=UniformTime(), second=UniformTime(), equal_probability=probability)
    t, r = pair(KEY, 100, LINEAR)
    assert ((t == r) == expected).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixedPair(uniform_probability=-0.1), r"^uniform_probability=-0\.1: "),
        (lambda: LogitNormal(std=0.0), r"^std=0\.0: "),
        (lambda: UniformTime(shift=0.0), r"^shift=0\.0: give a number from 0\.001 to 1000"),
        (lambda: LogitNormal(std=float("nan")), "^std=nan: "),
        (
            lambda: OrderedPair(first=UniformTime(), second=UniformTime(), equal_probability=1.5),
            r"^equal_probability=1\.5: ",
        ),
    ],
)
def test_invalid_values_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("path", [
    pytest.param(LINEAR, marks=pytest.mark.slow), pytest.param(COSINE, marks=pytest.mark.slow),
    ScaledLinear(noise_scale=4.0),
], ids=["linear", "cosine", "scaled"])  # fmt: skip
def test_gap_pair_is_a_gap_and_a_truncated_end(path):
    """P(r <= x | g) = F(x) / F(1 - g), uniform in [0, 1]."""
    pair = GapPair(gap_mean=0.3, gap_std=2.0, mean=-0.4, std=1.5)
    t, r = (np.asarray(x, np.float64) for x in pair(KEY, COUNT, path))
    assert (r >= 0).all() and (r <= t).all() and (t <= 1).all()
    assert_distributed(t - r, logit_normal_cdf(path, 0.3, 2.0))
    below = logit_normal_cdf(path, -0.4, 1.5)
    inside = (t < 1) & (r > 1e-3)
    assert inside.mean() > 0.7
    quantile = (below(r) / below(1 - (t - r)))[inside]
    low = (below(1e-3) / below(1 - (t - r)))[inside]
    assert_distributed((quantile - low) / (1 - low), stats.uniform.cdf)
