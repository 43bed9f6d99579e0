"""Sums of terms: weights, losses and metrics."""

import jax.numpy as jnp
import numpy as np

from dmf.objectives.objective import Sum, Term


def term_of(name: str, value: float) -> Term:
    """A term whose losses are `value` times the parameter and the input, with one metric."""

    def loss(params, x):
        losses = value * params["scale"] * x
        return losses, {f"{name}_loss": losses}

    return Term(loss, (jnp.arange(1.0, 4.0),))


def test_half_the_sum_of_two_terms_is_their_mean():
    params = {"scale": jnp.float32(2.0)}
    first, second = Sum([term_of("first", 3.0)]), Sum([term_of("second", 5.0)])
    losses, metrics = ((first + second) / 2).value(params)
    np.testing.assert_allclose(losses, (first.value(params)[0] + second.value(params)[0]) / 2)
    np.testing.assert_allclose(losses, [8.0, 16.0, 24.0])
    # Metrics are those of the terms themselves, without weights.
    assert set(metrics) == {"first_loss", "second_loss"}
    np.testing.assert_allclose(metrics["first_loss"], [6.0, 12.0, 18.0])
    np.testing.assert_allclose(metrics["second_loss"], [10.0, 20.0, 30.0])


def test_sums_are_linear():
    params = {"scale": jnp.float32(2.0)}
    first, second, third = (Sum([term_of(str(i), float(i))]) for i in range(1, 4))
    assert isinstance(first + second, Sum)
    assert isinstance(first / 4, Sum)
    assert [term.weight for term in (first + second / 2) / 4 + third] == [0.25, 0.125, 1.0]
    grouped, flat = (first + (second + third)) / 2, first / 2 + second / 2 + third / 2
    np.testing.assert_allclose(grouped.value(params)[0], flat.value(params)[0])
