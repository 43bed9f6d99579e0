"""Gaussian data, for which everything is known in closed form.

If x ~ N(mean, std^2) then x_t ~ N(alpha mean, alpha^2 std^2 + sigma^2), and the probability-flow
equation keeps (x_t - mean_t) / std_t constant. That gives the flow map, the velocity and the score.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dmf.models.simple_network import SimpleNetwork
from dmf.objectives.interpolants import Interpolant, per_sample
from dmf.types import Flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Independent values, each N(mean, std^2)."""

    interpolant: Interpolant
    mean: float = 0.7
    std: float = 0.4

    def mean_at(self, t: jax.Array) -> jax.Array:
        return self.interpolant.alpha(t) * self.mean

    def std_at(self, t: jax.Array) -> jax.Array:
        alpha, sigma = self.interpolant.alpha(t), self.interpolant.sigma(t)
        return jnp.sqrt((alpha * self.std) ** 2 + sigma**2)

    def velocity(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """mean_t' + std_t' (x_t - mean_t) / std_t."""
        t = per_sample(t, x_t)
        mean, mean_rate = jax.jvp(self.mean_at, (t,), (jnp.ones_like(t),))
        std, std_rate = jax.jvp(self.std_at, (t,), (jnp.ones_like(t),))
        return mean_rate + std_rate * (x_t - mean) / std

    def score(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
        t = per_sample(t, x_t)
        return -(x_t - self.mean_at(t)) / self.std_at(t) ** 2

    def carried(self, x_t: jax.Array, t: jax.Array, r: jax.Array) -> jax.Array:
        """x_r, the solution at r of the probability-flow equation through x_t at t."""
        t, r = per_sample(t, x_t), per_sample(r, x_t)
        return self.mean_at(r) + self.std_at(r) * (x_t - self.mean_at(t)) / self.std_at(t)

    def flow_map(self, x_t: jax.Array, t: jax.Array, r: jax.Array, y: jax.Array) -> jax.Array:
        """u(x_t, t, r): the mean velocity where t > r, the velocity where t = r."""
        length = per_sample(t - r, x_t)
        apart = length != 0
        mean_velocity = (x_t - self.carried(x_t, t, r)) / jnp.where(apart, length, 1.0)
        return jnp.where(apart, mean_velocity, self.velocity(x_t, t))

    def flow_model(self, x_t: jax.Array, t: jax.Array, r: jax.Array, y: jax.Array) -> jax.Array:
        """The velocity at t, whatever r is."""
        return self.velocity(x_t, t)


def _column(values: jax.Array) -> jax.Array:
    return values[:, None, None, None]


@dataclasses.dataclass(frozen=True)
class GaussianMap(SimpleNetwork):
    """Parameter times the flow map of Gaussian data; or, with a ratio, the map that SoFlow learns
    with it, and alpha-Flow with such an alpha: Euler's method at the times
    r + (1 - ratio)^k (t - r)."""

    gaussian: Gaussian
    ratio: float = 0.0
    num_classes = 0
    sample_shape = (2, 2, 1)
    flops = Flops(encode=0.0, decode=0.0)

    def init(self, key):
        return {"u": jnp.ones((), jnp.float64)}

    def apply(self, params, x_t, t, r, y):
        if not self.ratio:
            return params["u"] * self.gaussian.flow_map(x_t, t, r, y)
        shrunk = (1 - self.ratio) ** jnp.arange(301.0)
        times = r[None] + jnp.outer(shrunk, t - r)
        std, rate = jax.jvp(self.gaussian.std_at, (times,), (jnp.ones_like(times),))
        factor = jnp.prod(1 + (times[1:] - times[:-1]) * (rate / std)[:-1], axis=0)
        centred = _column(factor) * (x_t - self.gaussian.mean_at(_column(t)))
        ends = self.gaussian.mean_at(_column(r)) + centred
        apart = _column(t - r) > 0
        mean = (x_t - ends) / jnp.where(apart, _column(t - r), 1.0)
        return params["u"] * jnp.where(apart, mean, self.gaussian.velocity(x_t, t))
