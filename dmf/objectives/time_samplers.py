"""The random times of training: t, or a pair (t, r)."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dmf.errors import InputError, check_between
from dmf.objectives.interpolants import Interpolant
from dmf.registry import component_field
from dmf.types import PRNGKey, Times

# From a key, a number of samples and the path to times [count], or to times (t, r).
TimeSampler = Callable[[PRNGKey, int, Interpolant], Times]
TimePair = Callable[[PRNGKey, int, Interpolant], tuple[Times, Times]]


def shift_times(t: jax.Array, shift: float) -> jax.Array:
    """s t / (1 + (s - 1) t): times at which the noise of the linear path is s times as large beside
    the data (arXiv:2403.03206, resolution-dependent shifting).

    >>> shift_times(jnp.array([1.0, 0.5, 0.0]), 3.0).tolist()
    [1.0, 0.75, 0.0]

    Args:
      t: times in [0, 1], of any shape.
      shift: s > 0; 1 leaves the times as they are, more gives noisier times.
    """
    return shift * t / (1 + (shift - 1) * t)


def dimension_shift(values: int, base: int = 4096) -> float:
    """The shift sqrt(m / n) of times for samples of m values, where n values need none (RAE,
    arXiv:2510.11690, dimension-dependent noise schedule shift).

    It is `UniformTime.shift` and `sampling.shift`. The logit-normal times of a mean have it where
    its logarithm is added to the mean.

    >>> round(dimension_shift(768 * 16 * 16), 3)
    6.928

    Args:
      values: number of values m of a sample, >= 1.
      base: number of values n whose times are not shifted, >= 1; 4,096 are those of latents of
        32 x 32 x 4.
    """
    return math.sqrt(values / base)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """Logit-normal t: its `Interpolant.log_ratio` is z ~ N(mean, std^2), so that t is the sigmoid
    of z on the linear path and 2/pi atan(exp z) on the cosine path (arXiv:2403.03206).

    >>> from dmf.objectives import LINEAR
    >>> LogitNormal(mean=0.4)(jax.random.key(0), 5, LINEAR).shape
    (5,)

    Attributes:
      mean: mean of the normal; larger values give noisier samples.
      std: standard deviation of the normal, positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        # Beyond 20, the sigmoid is 0 or 1 in float32.
        check_between(self, -20.0, 20.0, "mean")
        if not 0 < self.std <= 20:
            raise InputError("std", self.std, "a logit-normal time sampler needs 0 < std <= 20")

    def __call__(self, key: PRNGKey, count: int, interpolant: Interpolant) -> Times:
        return interpolant.time_of(self.mean + self.std * jax.random.normal(key, (count,)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformTime:
    """Uniform t in [0, 1), whatever the path, then shifted.

    Attributes:
      shift: s in t <- s t / (1 + (s - 1) t), from 0.001 to 1000; 1 leaves t uniform, more gives
        noisier samples; published for RAE: sqrt(m / 4096) for samples of m values
        (arXiv:2510.11690).
    """

    shift: float = 1.0

    def __post_init__(self):
        check_between(self, 1e-3, 1e3, "shift")

    def __call__(self, key: PRNGKey, count: int, interpolant: Interpolant) -> Times:
        del interpolant
        return shift_times(jax.random.uniform(key, (count,)), self.shift)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderedPair:
    """(t, r) = (max, min) of one draw from each of two time samplers; some samples take r = t.

    MeanFlow (arXiv:2505.13447) uses one distribution twice and r = t with probability 0.75;
    Decoupled MeanFlow (arXiv:2510.24474) uses two distributions and never r = t.

    Attributes:
      first: one time sampler.
      second: the other time sampler.
      equal_probability: probability in [0, 1] that a sample takes r = t.
    """

    first: TimeSampler = component_field("time_sampler")
    second: TimeSampler = component_field("time_sampler")
    equal_probability: float = 0.0

    def __post_init__(self):
        if not 0 <= self.equal_probability <= 1:
            raise InputError("equal_probability", self.equal_probability,
                             "a probability lies in [0, 1]")

    def __call__(self, key: PRNGKey, count: int, interpolant: Interpolant) -> tuple[Times, Times]:
        first_key, second_key, equal_key = jax.random.split(key, 3)
        a = self.first(first_key, count, interpolant)
        b = self.second(second_key, count, interpolant)
        t, r = jnp.maximum(a, b), jnp.minimum(a, b)
        equal = jax.random.bernoulli(equal_key, self.equal_probability, (count,))
        return t, jnp.where(equal, t, r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedPair:
    """(t, r) = (max, min) of two draws from one time sampler, some of both from [0, 1) uniformly;
    samples with r = t take one draw, and not the larger one of two (pixel MeanFlow,
    arXiv:2601.22158).

    Attributes:
      times: the time sampler.
      uniform_probability: probability in [0, 1] that both draws are uniform; published: 0 or 0.1.
      equal_probability: probability in [0, 1] that a sample takes r = t.
    """

    times: TimeSampler = component_field("time_sampler", LogitNormal())
    uniform_probability: float = 0.1
    equal_probability: float = 0.5

    def __post_init__(self):
        check_between(self, 0.0, 1.0, "uniform_probability", "equal_probability")

    def __call__(self, key: PRNGKey, count: int, interpolant: Interpolant) -> tuple[Times, Times]:
        keys = jax.random.split(key, 4)
        uniform, equal = (
            jax.random.bernoulli(key, probability, (count,)) for key, probability in
            zip(keys[2:], (self.uniform_probability, self.equal_probability), strict=True)
        )  # fmt: skip

        def draw(key: PRNGKey) -> Times:
            sampled_key, uniform_key = jax.random.split(key)
            sampled = self.times(sampled_key, count, interpolant)
            return jnp.where(uniform, jax.random.uniform(uniform_key, (count,)), sampled)

        first, second = draw(keys[0]), draw(keys[1])
        second = jnp.where(equal, first, second)
        return jnp.maximum(first, second), jnp.minimum(first, second)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToData:
    """(t, 0): every jump ends at the data (consistency models, arXiv:2410.11081); some samples take
    r = t.

    Attributes:
      times: the time sampler of t.
      equal_probability: probability in [0, 1] that a sample takes r = t.
    """

    times: TimeSampler = component_field("time_sampler", LogitNormal(mean=-0.4))
    equal_probability: float = 0.0

    def __post_init__(self):
        check_between(self, 0.0, 1.0, "equal_probability")

    def __call__(self, key: PRNGKey, count: int, interpolant: Interpolant) -> tuple[Times, Times]:
        time_key, equal_key = jax.random.split(key)
        t = self.times(time_key, count, interpolant)
        equal = jax.random.bernoulli(equal_key, self.equal_probability, (count,))
        return t, jnp.where(equal, t, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GapPair:
    """(r + g, r): a logit-normal gap g = t - r, and a logit-normal r that is truncated at 1 - g
    (terminal velocity matching, arXiv:2511.19797, "truncated gap sampling").

    Attributes:
      gap_mean: mean of the normal of g; larger values give longer jumps.
      gap_std: standard deviation of the normal of g, positive.
      mean: mean of the normal of r before it is truncated.
      std: standard deviation of the normal of r, positive.
    """

    gap_mean: float = -0.8
    gap_std: float = 1.0
    mean: float = -0.4
    std: float = 1.0

    def __post_init__(self):
        check_between(self, -20.0, 20.0, "gap_mean", "mean")
        for name in ("gap_std", "std"):
            if not 0 < getattr(self, name) <= 20:
                raise InputError(name, getattr(self, name), "a logit-normal needs 0 < std <= 20")

    def __call__(self, key: PRNGKey, count: int, interpolant: Interpolant) -> tuple[Times, Times]:
        gap_key, r_key = jax.random.split(key)
        gap = interpolant.time_of(
            self.gap_mean + self.gap_std * jax.random.normal(gap_key, (count,))
        )
        last = interpolant.log_ratio(1 - gap)
        below = jax.scipy.special.ndtr((last - self.mean) / self.std)
        uniform = jax.random.uniform(r_key, (count,))
        r = interpolant.time_of(self.mean + self.std * jax.scipy.special.ndtri(uniform * below))
        r = jnp.minimum(r, 1 - gap)
        return r + gap, r
