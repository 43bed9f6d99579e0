"""What a network predicts, and the velocity that follows from it.

On the linear path x_t = (1 - t) x + t e, from data x to noise e, a straight line through x_t with
the velocity u has two ends: x_t - t u at time 0, and x_t + (1 - t) u at time 1. A network predicts
u itself ("velocity"), the first end ("data"; pixel MeanFlow, arXiv:2601.22158) or the second one
("noise"), and u follows:

    u = (x_t - x_u) / max(t, min_time),    u = (e_u - x_t) / max(1 - t, min_time).

Where the network gives the x or the e of x_t, u is exactly v_t = e - x, outside of the last
`min_time` before the end. e is the end of the path at time 1: the noise times its standard
deviation, where that is not 1.
"""

import functools
from typing import Any

import jax.numpy as jnp

from dmf.errors import check_choice, check_valid
from dmf.types import Images, Times

PREDICTIONS = ("velocity", "data", "noise")
DEFAULT_MIN_TIME = 0.05
# float32 has no number as small as some that Python has.
SMALLEST_TIME = 1e-6


def check_prediction_fields(network: Any) -> None:
    """Raises InputError where `prediction` or `min_time` of a network cannot be used."""
    check = functools.partial(check_valid, network)
    check_choice(network, "prediction", PREDICTIONS)
    check(SMALLEST_TIME <= network.min_time <= 1, "min_time",
          f"give a time from {SMALLEST_TIME} to 1; published: {DEFAULT_MIN_TIME}")
    divides = network.prediction != "velocity"
    check(divides or network.min_time == DEFAULT_MIN_TIME, "min_time",
          "model.prediction=velocity divides by no time; set it to data or noise, or leave this at "
          f"{DEFAULT_MIN_TIME}")


def input_of_prediction(network: Any, x_t: Images) -> Images | None:
    """What `velocity_of` needs of the input of a network: x_t, or None where it is not needed."""
    return None if network.prediction == "velocity" else x_t


def velocity_of(network: Any, predicted: Images, x_t: Images | None, t: Times) -> Images:
    """The velocity u that follows from the output of a network.

    >>> import types
    >>> network = types.SimpleNamespace(prediction="noise", min_time=0.05)
    >>> x_t, noise, t = jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1)), jnp.array([0.75])
    >>> float(velocity_of(network, noise, x_t, t).mean())
    4.0

    Args:
      network: its `prediction` and `min_time`.
      predicted: [b, h, w, c] the output, float32.
      x_t: [b, h, w, c] the input, or what `input_of_prediction` returns.
      t: [b] times of the input.

    Returns:
      [b, h, w, c] float32.
    """
    if network.prediction == "velocity":
        return predicted
    x_t, t = x_t.astype(jnp.float32), t.astype(jnp.float32)[:, None, None, None]
    if network.prediction == "data":
        return (x_t - predicted) / jnp.maximum(t, network.min_time)
    return (predicted - x_t) / jnp.maximum(1 - t, network.min_time)
