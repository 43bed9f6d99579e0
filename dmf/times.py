"""Which times are looked at: in training by random draws, in sampling on a fixed schedule."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmf.flow import Interpolant
from dmf.typing import InputError, PRNGKey, Times

TimeSampler = Callable[[PRNGKey, int, Interpolant], Times]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """log(sigma / alpha) ~ N(mean, std): the sigmoid of a normal on the linear path, and
    2/pi atan(exp z) on the cosine path (arXiv:2403.03206)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if not self.std > 0:
            raise InputError(f"std={self.std}: a logit-normal time sampler needs std > 0")

    def __call__(self, key: PRNGKey, count: int, interpolant: Interpolant) -> Times:
        return interpolant.time_of(self.mean + self.std * jax.random.normal(key, (count,)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """t uniform in [0, 1), whatever the path."""

    def __call__(self, key: PRNGKey, count: int, interpolant: Interpolant) -> Times:
        del interpolant
        return jax.random.uniform(key, (count,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderedPair:
    """(t, r) = (max, min) of one draw from each sampler; a share of samples takes r = t.

    MeanFlow (arXiv:2505.13447) uses one distribution twice and `equal_share` 0.75;
    Decoupled MeanFlow (arXiv:2510.24474) two distributions and no equal share.
    """

    first: TimeSampler
    second: TimeSampler
    equal_share: float = 0.0

    def __post_init__(self):
        if not 0 <= self.equal_share <= 1:
            raise InputError(f"equal_share={self.equal_share}: a share lies in [0, 1]")

    def __call__(self, key: PRNGKey, count: int, interpolant: Interpolant) -> tuple[Times, Times]:
        first_key, second_key, equal_key = jax.random.split(key, 3)
        a = self.first(first_key, count, interpolant)
        b = self.second(second_key, count, interpolant)
        t, r = jnp.maximum(a, b), jnp.minimum(a, b)
        equal = jax.random.bernoulli(equal_key, self.equal_share, (count,))
        return t, jnp.where(equal, t, r)


def shifted(t: jax.Array, shift: float) -> jax.Array:
    """s t / (1 + (s - 1) t): the resolution shift of a schedule (arXiv:2403.03206)."""
    return shift * t / (1 + (shift - 1) * t)


def schedule(steps: int, shift: float = 1.0) -> Float[Array, "n"]:
    """The steps + 1 times of a sampler, from 1 to 0, equally spaced before the shift.

    Raises:
      InputError: steps < 1 or shift <= 0.
    """
    if steps < 1:
        raise InputError(f"steps={steps}: sampling needs at least 1 step")
    if not shift > 0:
        raise InputError(f"shift={shift}: the time shift is positive, and 1 leaves time as it is")
    return shifted(jnp.linspace(1.0, 0.0, steps + 1), shift)
