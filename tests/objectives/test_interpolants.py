"""The path between data and noise: its ends, its derivative, its score, and its times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_data import Gaussian

from dmf.errors import InputError
from dmf.objectives.interpolants import COSINE, LINEAR, ScaledLinear, check_interval, in_interval
from dmf.sampling.samplers import uniform_schedule

SHAPE = (5, 2, 3, 1)
over_paths = pytest.mark.parametrize(
    "path", [LINEAR, COSINE, ScaledLinear(noise_scale=3.0)], ids=["linear", "cosine", "scaled"]
)


def ends(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_key, noise_key = jax.random.split(jax.random.key(seed))
    x, noise = (jax.random.normal(key, SHAPE) for key in (x_key, noise_key))
    return x, noise, jnp.asarray([0.05, 0.3, 0.5, 0.8, 0.99])


@over_paths
def test_path_leads_from_data_to_noise(path):
    x, noise, t = ends()
    np.testing.assert_allclose(path.interpolate(x, noise, jnp.zeros_like(t)), x, atol=1e-7)
    at_one = path.interpolate(x, noise, jnp.ones_like(t))
    np.testing.assert_allclose(at_one, path.noise_scale * noise, atol=1e-6)


def test_linear_path_is_straight():
    x, noise, t = ends()
    np.testing.assert_allclose(LINEAR.velocity(x, noise, t), noise - x, atol=1e-6)


def test_cosine_path_keeps_unit_variance():
    t = jnp.linspace(0, 1, 11)
    np.testing.assert_allclose(COSINE.alpha(t) ** 2 + COSINE.sigma(t) ** 2, 1, atol=1e-6)


@over_paths
def test_velocity_is_the_derivative_of_the_path(path):
    x, noise, t = ends()
    _, derivative = jax.jvp(lambda t: path.interpolate(x, noise, t), (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(path.velocity(x, noise, t), derivative, atol=1e-6)


@over_paths
def test_each_sample_has_its_own_time(path):
    x, noise, t = ends()
    alone = path.interpolate(x[3:4], noise[3:4], t[3:4])
    np.testing.assert_array_equal(path.interpolate(x, noise, t)[3:4], alone)


@over_paths
def test_score_of_gaussian_data(path):
    gaussian = Gaussian(interpolant=path)
    x_t, _, t = ends()
    ours = path.score(gaussian.velocity(x_t, t), x_t, t)
    np.testing.assert_allclose(ours, gaussian.score(x_t, t), rtol=2e-4, atol=2e-4)


@over_paths
def test_time_of_inverts_the_log_ratio_of_noise_to_data(path):
    t = jnp.linspace(0.02, 0.98, 25)
    np.testing.assert_allclose(path.time_of(path.log_ratio(t)), t, atol=1e-6)


def test_paths_of_equal_noise_are_equal():
    """Equal recipes share compiled programs."""
    one, same, other = (ScaledLinear(noise_scale=scale) for scale in (2.0, 2.0, 4.0))
    assert one == same != other
    assert hash(one) == hash(same)
    with pytest.raises(InputError, match="^noise_scale=0.0: give a number from 0.001 to 1000"):
        ScaledLinear(noise_scale=0.0)


def test_interval_is_closed():
    t = jnp.asarray([0.19, 0.2, 0.5, 0.7, 0.71])
    assert in_interval(t, (0.2, 0.7)).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 250, 1000])
def test_the_times_of_a_sampler_at_both_ends_of_an_interval_lie_in_it(steps):
    """Their rounding to float32 is of either sign."""
    for end in (0.1, 0.3, 0.7, 0.9):
        times = uniform_schedule(steps)
        index = round((1 - end) * steps)
        at, before = times[index : index + 1], times[index - 1 : index]
        np.testing.assert_allclose(at, end, atol=1e-6)
        assert in_interval(at, (0.0, end))
        assert in_interval(at, (end, 1.0))
        assert not in_interval(before, (0.0, end))


@pytest.mark.parametrize("interval", [(0.5, 0.4), (-0.1, 0.5), (0.5, 1.1)])
def test_bad_interval_is_named(interval):
    with pytest.raises(InputError, match=r"^guidance\.interval=\(.*\): give \(start, end\)"):
        check_interval("guidance.interval", interval)
