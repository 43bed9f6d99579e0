"""The losses of each weighting, and their gradients in the error and in phi."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.errors import InputError
from dmf.objectives import (
    AdaptiveWeighting,
    CauchyWeighting,
    NormalizedWeighting,
    PublishedCauchyWeighting,
    UniformWeighting,
)

ERROR = jnp.asarray([0.02, 1.0, 30.0, 256.0])
SIZE = 16
PHI = jnp.asarray([-1.0, 0.0, 0.5, 2.0])


def slope_in_phi(weighting, phi: jax.Array) -> jax.Array:
    return jax.grad(lambda phi: weighting(ERROR, SIZE, phi).sum())(phi)


def slope_in_error(weighting) -> jax.Array:
    return jax.grad(lambda error: weighting(error, SIZE, PHI).sum())(ERROR)


def test_cauchy_is_minimal_where_phi_is_the_log_of_the_mean_error():
    best = jnp.log(ERROR / SIZE)
    np.testing.assert_allclose(slope_in_phi(CauchyWeighting(), best), 0, atol=1e-6)
    loss = CauchyWeighting()(ERROR, SIZE, best)
    for step in (-0.3, 0.3):
        assert (CauchyWeighting()(ERROR, SIZE, best + step) > loss).all()


def test_cauchy_is_the_negative_log_likelihood():
    """The loss is the negative log-likelihood of sqrt(m) under a Cauchy distribution of scale
    e^(phi/2), less log(pi)."""
    scale = jnp.exp(PHI / 2)
    expected = jnp.log(jnp.pi * scale * (1 + ERROR / SIZE / scale**2)) - jnp.log(jnp.pi)
    np.testing.assert_allclose(CauchyWeighting()(ERROR, SIZE, PHI), expected, rtol=1e-5)


@pytest.mark.parametrize("phi", [-8.0, 0.0, 8.0])
def test_published_cauchy_always_grows_with_phi(phi):
    assert (slope_in_phi(PublishedCauchyWeighting(), jnp.full_like(ERROR, phi)) > 0).all()


def test_published_cauchy_becomes_the_log_of_the_mean_error():
    loss = PublishedCauchyWeighting()(ERROR, SIZE, jnp.full_like(ERROR, -20.0))
    np.testing.assert_allclose(loss, jnp.log(ERROR / SIZE), atol=1e-4)


@pytest.mark.parametrize(("power", "offset"), [(1.0, 0.01), (0.75, 0.01), (0.5, 0.3)])
def test_adaptive_divides_the_gradient_by_a_power_of_the_summed_error(power, offset):
    weighting = AdaptiveWeighting(power=power, offset=offset)
    np.testing.assert_allclose(
        slope_in_error(weighting), (ERROR + offset) ** -power, rtol=1e-5
    )


def test_adaptive_of_power_1_is_near_1():
    np.testing.assert_allclose(AdaptiveWeighting()(ERROR, SIZE), ERROR / (ERROR + 0.01), rtol=1e-6)


@pytest.mark.parametrize("weighting", [
    AdaptiveWeighting(power=5.0, offset=1e-6), AdaptiveWeighting(power=5.0, offset=1e6),
    NormalizedWeighting(offset=1e-6),
])
def test_float32_holds_the_weights_at_the_ends_of_the_ranges(weighting):
    errors = jnp.asarray([0.0, 1e-12, 4096.0, 1e7])
    assert np.isfinite(weighting(errors, SIZE)).all()
    slopes = jax.grad(lambda error: weighting(error, SIZE).sum())(errors)
    assert (np.isfinite(slopes) & (slopes > 0)).all()


def test_uniform_is_the_mean():
    np.testing.assert_allclose(UniformWeighting()(ERROR, SIZE), ERROR / SIZE)
    np.testing.assert_allclose(slope_in_error(UniformWeighting()), 1 / SIZE)


@pytest.mark.parametrize(
    "weighting",
    [UniformWeighting(), AdaptiveWeighting(), CauchyWeighting(), PublishedCauchyWeighting()],
)
def test_samples_are_not_coupled(weighting):
    jacobian = jax.jacobian(lambda error: weighting(error, SIZE, PHI))(ERROR)
    assert jacobian.shape == (4, 4)
    assert (jacobian - jnp.diag(jnp.diag(jacobian)) == 0).all()
    assert (jnp.diag(jacobian) > 0).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in (("power", (-0.5, 12.0, float("inf"), float("nan"))),
                                          ("offset", (0.0, 1e-9, -1.0, float("inf"), float("nan"))))
     for value in values],
)  # fmt: skip
def test_invalid_fields_of_adaptive_weighting_are_refused(field, value):
    with pytest.raises(InputError, match=f"^{field}={value}: "):
        AdaptiveWeighting(**{field: value})
