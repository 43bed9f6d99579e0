"""The path between data and noise: x_t = alpha(t) x + sigma(t) noise.

Time runs from t = 0 (data) to t = 1 (standard normal noise), here and everywhere.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dmf.errors import InputError, check_between
from dmf.types import Images, Times


def per_sample(values: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes values [b] to [b, 1, ...] with the rank of `like`, so that nothing broadcasts
    by accident."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolant:
    """A path x_t = alpha(t) x + sigma(t) noise (Stochastic Interpolants, arXiv:2303.08797).

    >>> x, noise = jnp.zeros((2, 8, 8, 1)), jnp.ones((2, 8, 8, 1))
    >>> LINEAR.interpolate(x, noise, jnp.array([0.25, 1.0]))[:, 0, 0, 0].tolist()
    [0.25, 1.0]

    Attributes:
      alpha: coefficient of the data as a function of t in [0, 1].
      sigma: coefficient of the noise as a function of t in [0, 1].
      alpha_derivative: derivative of alpha in t.
      sigma_derivative: derivative of sigma in t.
      time_of: t as a function of z = log(sigma / (noise_scale alpha)), the inverse of `log_ratio`.
        A normal z gives the path's "logit-normal" time.
    """

    alpha: Callable[[jax.Array], jax.Array]
    sigma: Callable[[jax.Array], jax.Array]
    alpha_derivative: Callable[[jax.Array], jax.Array]
    sigma_derivative: Callable[[jax.Array], jax.Array]
    time_of: Callable[[jax.Array], jax.Array]

    # Standard deviation of the path at t = 1, where sampling starts.
    noise_scale: ClassVar[float] = 1.0

    def interpolate(self, x: Images, noise: Images, t: Times) -> Images:
        """x_t, the point of the path at t."""
        t = per_sample(t, x)
        return self.alpha(t) * x + self.sigma(t) * noise

    def velocity(self, x: Images, noise: Images, t: Times) -> Images:
        """v_t = alpha'(t) x + sigma'(t) noise, the derivative of `interpolate` in t."""
        t = per_sample(t, x)
        return self.alpha_derivative(t) * x + self.sigma_derivative(t) * noise

    def log_ratio(self, t: Times) -> jax.Array:
        """[b] log(sigma / (noise_scale alpha)), the log ratio of noise to data, with noise of unit
        standard deviation.

        >>> ratios = ScaledLinear(noise_scale=4.0).log_ratio(jnp.array([0.5, 0.75]))
        >>> [round(ratio, 4) for ratio in ratios.tolist()]  # the logarithms of 1 and 3
        [0.0, 1.0986]
        """
        return jnp.log(self.sigma(t) / (self.noise_scale * self.alpha(t)))

    def score(self, velocity: Images, x_t: Images, t: Times) -> Images:
        """Gradient of the log density at x_t, from the marginal velocity there; t > 0.

        SiT, arXiv:2401.08740, score from velocity.
        """
        t = per_sample(t, x_t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        alpha_derivative, sigma_derivative = self.alpha_derivative(t), self.sigma_derivative(t)
        spread = alpha_derivative * sigma**2 - alpha * sigma_derivative * sigma
        return (alpha * velocity - alpha_derivative * x_t) / spread


_QUARTER_TURN = math.pi / 2

LINEAR = Interpolant(
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    alpha_derivative=lambda t: -jnp.ones_like(t),
    sigma_derivative=jnp.ones_like,
    time_of=jax.nn.sigmoid,
)
COSINE = Interpolant(
    alpha=lambda t: jnp.cos(_QUARTER_TURN * t),
    sigma=lambda t: jnp.sin(_QUARTER_TURN * t),
    alpha_derivative=lambda t: -_QUARTER_TURN * jnp.sin(_QUARTER_TURN * t),
    sigma_derivative=lambda t: _QUARTER_TURN * jnp.cos(_QUARTER_TURN * t),
    time_of=lambda z: jnp.arctan(jnp.exp(z)) / _QUARTER_TURN,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledLinear(Interpolant):
    """The linear path to noise of another standard deviation s: x_t = (1 - t) x + t s noise (pixel
    MeanFlow, arXiv:2601.22158). Logit-normal times are those of the linear path, whatever s is.

    >>> x, noise = jnp.zeros((2, 8, 8, 3)), jnp.ones((2, 8, 8, 3))
    >>> path = ScaledLinear(noise_scale=4.0)
    >>> path.interpolate(x, noise, jnp.array([0.25, 1.0]))[:, 0, 0, 0].tolist()
    [1.0, 4.0]

    Attributes:
      noise_scale: the standard deviation s of the noise, from 0.001 to 1000; published: 1, 2 or 4.
    """

    noise_scale: float = 1.0
    alpha: Any = dataclasses.field(init=False, repr=False, compare=False)
    sigma: Any = dataclasses.field(init=False, repr=False, compare=False)
    alpha_derivative: Any = dataclasses.field(init=False, repr=False, compare=False)
    sigma_derivative: Any = dataclasses.field(init=False, repr=False, compare=False)
    time_of: Any = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        check_between(self, 1e-3, 1e3, "noise_scale")
        functions = {
            "alpha": LINEAR.alpha, "alpha_derivative": LINEAR.alpha_derivative,
            "sigma": lambda t: self.noise_scale * t,
            "sigma_derivative": lambda t: self.noise_scale * jnp.ones_like(t),
            "time_of": LINEAR.time_of,
        }  # fmt: skip
        for name, function in functions.items():
            object.__setattr__(self, name, function)


def check_interval(field: str, interval: Any) -> None:
    """Raises InputError unless interval = (start, end) with 0 <= start <= end <= 1."""
    try:
        start, end = interval
        good = 0 <= start <= end <= 1
    except (TypeError, ValueError):
        good = False
    if not good:
        raise InputError(field, interval, "give (start, end) with 0 <= start <= end <= 1")


# The times of a sampler are rounded to float32: its step at 0.7 may be at 0.70000005.
_TIME_ROUNDING = 1e-6


def in_interval(t: Times, interval: tuple[Any, Any]) -> jax.Array:
    """[b] bool: whether t lies in the closed interval (start, end), numbers or scalars, up to
    rounding.

    >>> in_interval(jnp.array([0.69, 0.7 + 6e-8, 0.701]), (0.0, 0.7)).tolist()
    [True, True, False]
    """
    start, end = interval
    return (t >= start - _TIME_ROUNDING) & (t <= end + _TIME_ROUNDING)
