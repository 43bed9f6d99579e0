"""LayerNorm and GELU: their derivatives, and what they store for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.models.activations import gelu, layer_norm

FLOAT32 = jnp.dtype("float32")


def norm(x):
    return layer_norm(x, FLOAT32)


def formula(x):
    variance = jnp.square(x - x.mean(-1, keepdims=True)).mean(-1, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(variance + 1e-6)


CASES = {"gelu": (gelu, jax.nn.gelu), "layer_norm": (norm, formula)}


@pytest.mark.parametrize("name", CASES)
def test_values_tangents_and_gradients_are_those_of_the_formula(name):
    ours, theirs = CASES[name]
    x, dx = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8, 16)), "f4")

    def everything(f):
        value, tangent = jax.jvp(f, (x,), (dx,))
        gradient = jax.vjp(f, x)[1](dx)[0]
        # The tangent may be differentiated too: of the second order.
        second = jax.grad(lambda x: jnp.vdot(jax.jvp(f, (x,), (dx,))[1], dx))(x)
        return value, tangent, gradient, second

    for a, b in zip(everything(ours), everything(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_norm_of_zeros_and_of_one_value_is_zero_with_a_finite_gradient():
    for x in (jnp.zeros((1, 2, 4)), jnp.full((1, 2, 4), 7.0)):
        value, tangent = jax.jvp(norm, (x,), (jnp.ones_like(x),))
        np.testing.assert_array_equal(value, 0)
        np.testing.assert_array_equal(tangent, 0)


@pytest.mark.parametrize("name, copies", [("gelu", 1), ("layer_norm", 1.25)])
def test_little_is_stored_for_the_backward_pass(name, copies):
    """Of GELU its slope; of LayerNorm its result, and one value per token of four."""
    x = jnp.ones((3, 5, 4))
    stored = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(CASES[name][0], x)[1], x))
    assert sum(leaf.size for leaf in stored) == copies * x.size
