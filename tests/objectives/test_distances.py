"""The distances that losses are made of: of velocities, and of features."""

import jax
import jax.numpy as jnp
import numpy as np

from dmf.objectives.distances import cosine_distance, squared_error


def test_a_token_that_is_zero_has_no_direction_and_no_nan():
    tokens, features = jnp.zeros((2, 4, 3)).at[0, 1].set(2.0), jnp.ones((2, 4, 3))
    np.testing.assert_allclose(cosine_distance(tokens, features), [-1 / 4, 0], atol=1e-6)
    slope = jax.grad(lambda tokens: cosine_distance(tokens, features).sum())(tokens)
    assert jnp.isfinite(slope).all()


def test_cosine_distance_ignores_lengths_and_not_directions():
    features = jax.random.normal(jax.random.key(3), (3, 4, 3))
    scaled = features * jnp.arange(1.0, 5.0).reshape(1, 4, 1)
    np.testing.assert_allclose(cosine_distance(scaled, features), -1, atol=1e-6)
    np.testing.assert_allclose(cosine_distance(-scaled, features), 1, atol=1e-6)


def test_squared_error_sums_in_float32():
    x = jnp.full((2, 4, 4, 4), 0.1, jnp.bfloat16)
    error = squared_error(x, jnp.zeros_like(x))
    assert error.dtype == jnp.float32
    np.testing.assert_allclose(error, 64 * float(x[0, 0, 0, 0]) ** 2, rtol=1e-5)
