"""Samplers: from noise at t = 1 to data at t = 0.

    x = noise
    carry = sampler.init(x)
    for t, t_next in the schedule:
        x, carry = sampler.step(flow_map, x, t, t_next, y, noise, carry)

A sampler is a class derived from `Sampler` with a `step`; one that is registered can be chosen by
`sampling.sampler.name`.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmf.errors import InputError, check_between
from dmf.objectives.interpolants import LINEAR, Interpolant
from dmf.objectives.time_samplers import shift_times
from dmf.registry import build, define_kind, runtime_field
from dmf.runtime.memoize import memoized
from dmf.sampling.sampler_checks import check_schedule, check_step
from dmf.types import ClassLabels, Condition, FlowMap, Images, PRNGKeys

MOST_STEPS = 10_000

Time = Float[Array, ""]
Trajectory = Float[Array, "n b h w c"]
Carry = Any


def uniform_schedule(steps: int, shift: float = 1.0) -> Float[Array, "n"]:
    """The steps + 1 times of a sampler, from 1 to 0, equally spaced before the shift.

    >>> uniform_schedule(2).tolist()
    [1.0, 0.5, 0.0]

    Args:
      steps: number of steps, from 1 to MOST_STEPS.
      shift: s > 0 in t <- s t / (1 + (s - 1) t); 1 leaves the steps equal.

    Raises:
      InputError: steps < 1, steps > MOST_STEPS or shift <= 0.
    """
    if steps < 1:
        raise InputError("steps", steps, "sampling needs at least 1 step")
    if steps > MOST_STEPS:
        raise InputError("steps", steps, f"sampling takes at most {MOST_STEPS} steps")
    if not shift > 0:
        raise InputError("shift", shift, "the time shift is positive; 1 leaves the times equal")
    return shift_times(jnp.linspace(1.0, 0.0, steps + 1), shift)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler(abc.ABC):
    """One step from t to t_next, and the schedule of times.

    Attributes:
      interpolant: the path that the network was trained on; the program fills it in.
    """

    interpolant: Interpolant = runtime_field(LINEAR)
    # Whether each step takes fresh noise.
    stochastic = False

    def schedule(self, steps: int, shift: float) -> Float[Array, "n"]:
        """The steps + 1 times, from 1 to 0."""
        return uniform_schedule(steps, shift)

    def init(self, x: Images) -> Carry:
        """What the sampler carries from step to step beside x: a pytree of arrays, () for none."""
        del x
        return ()

    @abc.abstractmethod
    def step(
        self,
        flow_map: FlowMap,
        x: Images,
        t: Time,
        t_next: Time,
        y: Any,
        noise: Images | None,
        carry: Carry,
    ) -> tuple[Images, Carry]:
        """x at t_next, and what is carried on.

        Args:
          flow_map: u(x_t, t, r, y), guided or not.
          x: [b, h, w, c] at time t, float32 or better.
          t, t_next: scalars, t_next < t.
          y: the condition of the samples.
          noise: [b, h, w, c] fresh standard normal noise; None unless `stochastic`.
          carry: what `init` or the step before returned.
        """


def velocity_at(flow_map: FlowMap, x: Images, t: Time, r: Time, y: Any) -> Images:
    """u(x, t, r, y) at scalar times, in the dtype of x."""
    ts, rs = (jnp.broadcast_to(time, x.shape[:1]) for time in (t, r))
    return flow_map(x, ts, rs, y).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(Sampler):
    """x + (t_next - t) u(x, t, t_next): exact for a perfect flow map, whatever the step; the Euler
    method for a flow model, which ignores t_next."""

    def step(self, flow_map, x, t, t_next, y, noise=None, carry=()):
        return x + (t_next - t) * velocity_at(flow_map, x, t, t_next, y), carry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restart(Sampler):
    """Jumps to data, then adds fresh noise up to t_next (the multistep sampler of consistency
    models, arXiv:2303.01469)."""

    stochastic = True

    def step(self, flow_map, x, t, t_next, y, noise, carry=()):
        x_0 = x - t * velocity_at(flow_map, x, t, jnp.zeros_like(t), y)
        alpha, sigma = self.interpolant.alpha(t_next), self.interpolant.sigma(t_next)
        return alpha * x_0 + sigma * noise, carry


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyTrajectory(Sampler):
    """Goes beyond t_next to s = t_next sqrt(1 - gamma^2), then adds the noise that leads back
    (CTM, arXiv:2310.02279).

    gamma = 0 is `Euler`, gamma = 1 is `Restart`. The noise has variance
    sigma(t_next)^2 - a^2 sigma(s)^2 with a = alpha(t_next) / alpha(s), which keeps the marginal of
    the path.

    Attributes:
      gamma: share of fresh noise in [0, 1].
    """

    gamma: float = 0.5
    stochastic = True

    def __post_init__(self):
        if not 0 <= self.gamma <= 1:
            raise InputError("gamma", self.gamma, "the share of fresh noise lies in [0, 1]")

    def step(self, flow_map, x, t, t_next, y, noise, carry=()):
        alpha, sigma = self.interpolant.alpha, self.interpolant.sigma
        s = t_next * (1 - self.gamma**2) ** 0.5
        x_s = x + (s - t) * velocity_at(flow_map, x, t, s, y)
        a = alpha(t_next) / alpha(s)
        variance = sigma(t_next) ** 2 - (a * sigma(s)) ** 2
        return a * x_s + jnp.sqrt(jnp.maximum(variance, 0.0)) * noise, carry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun(Sampler):
    """Second order for flow models: an Euler step, then the mean of the velocities at both ends.
    The last step is Euler (EDM, arXiv:2206.00364, algorithm 1)."""

    def step(self, flow_map, x, t, t_next, y, noise=None, carry=()):
        velocity = velocity_at(flow_map, x, t, t, y)

        def corrected() -> Images:
            x_next = x + (t_next - t) * velocity
            return (velocity + velocity_at(flow_map, x_next, t_next, t_next, y)) / 2

        return x + (t_next - t) * jax.lax.cond(t_next > 0, corrected, lambda: velocity), carry


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamsBashforth(Sampler):
    """Second order for flow models at one call a step: extrapolates the velocity from this step and
    the step before. The first step is Euler.

    With steps h = t_next - t and h_last, the two-step Adams-Bashforth formula for unequal steps is
    x + h ((1 + h / (2 h_last)) v - h / (2 h_last) v_last) (Hairer, Norsett and Wanner, Solving
    Ordinary Differential Equations I, III.5).
    """

    def init(self, x):
        """The velocity and the length of the step before; a length of 0 marks the first step."""
        return jnp.zeros_like(x), jnp.zeros((), x.dtype)

    def step(self, flow_map, x, t, t_next, y, noise=None, carry=()):
        last_velocity, last_h = carry
        velocity, h = velocity_at(flow_map, x, t, t, y), (t_next - t).astype(x.dtype)
        ratio = jnp.where(last_h == 0, 0.0, h / jnp.where(last_h == 0, 1.0, 2 * last_h))
        return x + h * ((1 + ratio) * velocity - ratio * last_velocity), (velocity, h)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerMaruyama(Sampler):
    """Euler-Maruyama on the reverse SDE of a flow model, with diffusion coefficient
    w(t) = 2 sigma(t) and drift v - w/2 score (SiT, arXiv:2401.08740).

    All steps but the last go from 1 to `last_time` in equal parts; the last goes to 0 along the
    drift and adds no noise.

    Attributes:
      last_time: where the last step begins, from 1e-6 to 0.99.
    """

    last_time: float = 1e-4
    stochastic = True

    def __post_init__(self):
        # The score divides by the time; at 1 all steps but the last would have no length.
        check_between(self, 1e-6, 0.99, "last_time")

    def schedule(self, steps, shift):
        """The steps + 1 times, from 1 to 0.

        Raises:
          InputError: steps < 2.
        """
        if steps < 2:
            raise InputError("steps", steps, "the sde sampler needs at least 2 steps")
        start = jnp.linspace(1.0, self.last_time, steps)
        return shift_times(jnp.append(start, 0.0), shift)

    def step(self, flow_map, x, t, t_next, y, noise, carry=()):
        velocity = velocity_at(flow_map, x, t, t, y)
        w = 2 * self.interpolant.sigma(t)
        score = self.interpolant.score(velocity, x, jnp.broadcast_to(t, x.shape[:1]))
        drifted = x + (t_next - t) * (velocity - w / 2 * score)
        return drifted + jnp.where(t_next > 0, jnp.sqrt(w * (t - t_next)), 0.0) * noise, carry


# A new sampler is a class above and its name here.
define_kind(
    "sampler", "One step from t to t_next, from noise to data.", Sampler,
    euler=Euler, restart=Restart, ctm=ConsistencyTrajectory, heun=Heun, sde=EulerMaruyama,
    adams_bashforth=AdamsBashforth,
)


def noise_like(keys: PRNGKeys, shape: tuple[int, ...]) -> Images:
    """Standard normal noise [b, *shape] in float32; sample i depends on keys[i] alone.

    >>> noise_like(jax.random.split(jax.random.key(0), 4), (8, 8, 1)).shape
    (4, 8, 8, 1)

    Args:
      keys: [b] keys.
      shape: shape of the noise of a sample.
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def sample(
    flow_map: FlowMap,
    noise: Images,
    y: Any,
    *,
    steps: int = 1,
    sampler: Sampler | str = Euler(),
    shift: float = 1.0,
    step_noise: Callable[[jax.Array], Images] | None = None,
    trajectory: bool = False,
) -> Images | Trajectory:
    """Carries noise at t = 1 to data at t = 0.

    >>> flow_map = lambda x_t, t, r, y: x_t  # u(x_t, 1, 0) of data that is all 0
    >>> noise, labels = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.arange(4)
    >>> sample(flow_map, noise, labels, steps=1).max().item()
    0.0

    A stochastic sampler takes fresh noise in every step:

    >>> fresh = lambda step: jax.random.normal(jax.random.key(step + 1), noise.shape)
    >>> sample(flow_map, noise, labels, steps=2, sampler=Restart(), step_noise=fresh).shape
    (4, 8, 8, 1)

    With a trajectory, x at each time of `Euler().schedule(2, shift=1.0)`:

    >>> sample(flow_map, noise, labels, steps=2, sampler="euler", trajectory=True).shape
    (3, 4, 8, 8, 1)

    Args:
      flow_map: u(x_t, t, r, y), guided or not.
      noise: [b, h, w, c] standard normal.
      y: the condition of the samples: class labels [b], or a `Condition`.
      steps: number of steps; each costs one call of the flow map, or two with Heun.
      sampler: takes the steps; or the name of one with its defaults, on the linear path.
      shift: s in t <- s t / (1 + (s - 1) t); 1 leaves the steps equal.
      step_noise: from the index of a step to fresh noise [b, h, w, c]; for stochastic samplers.
      trajectory: whether all x are returned, from the noise to the data.

    Returns:
      [b, h, w, c] in float32 or better, whatever the network computes in; with `trajectory`
      [steps + 1, b, h, w, c].

    Raises:
      InputError: too few steps, another number of conditions than of noise, a stochastic sampler
        without `step_noise`, no such sampler, or one whose step or schedule has a wrong shape.
    """
    sampler = sampler if isinstance(sampler, Sampler) else _named(sampler)
    y = jnp.asarray(y) if isinstance(y, list | range) else y
    if sampler.stochastic and step_noise is None:
        raise InputError("step_noise", None, f"{type(sampler).__name__} needs fresh noise in each "
                         "step; give a function from the index of a step to noise")
    conditions = y.count if isinstance(y, Condition) else y.shape[0]
    if conditions != noise.shape[0]:
        raise InputError("y", remedy=f"it has {conditions} conditions, and noise has "
                         f"{noise.shape[0]} samples; give one for each")
    schedule = sampler.schedule(steps, shift)
    check_schedule(sampler, steps, schedule)

    def step(state: tuple[Images, Carry], now: tuple[Time, Time, jax.Array]) -> Any:
        (x, carry), (t, t_next, index) = state, now
        fresh_noise = step_noise(index) if sampler.stochastic else None
        after = sampler.step(flow_map, x, t, t_next, y, fresh_noise, carry)
        check_step(sampler, (x, carry), after)
        return after, after[0] if trajectory else None

    x_1 = noise.astype(jnp.promote_types(noise.dtype, jnp.float32))
    x_1 = sampler.interpolant.noise_scale * x_1
    times = schedule[:-1], schedule[1:], jnp.arange(steps)
    (x_0, _), later = jax.lax.scan(step, (x_1, sampler.init(x_1)), times)
    return jnp.concatenate([x_1[None], later]) if trajectory else x_0


def _named(name: str) -> Sampler:
    """The sampler of a name, with its defaults.

    Raises:
      InputError: there is none.
    """
    try:
        return build("sampler", name)
    except InputError as error:
        raise InputError("sampler", name, error.remedy) from None


@memoized
def call_times(sampler: Sampler, steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """The times t at which a sampler calls the flow map, each once.

    >>> call_times(Euler(), 2), call_times(Heun(), 2)
    ((1.0, 0.5), (1.0, 0.5))

    Args:
      sampler: takes the steps; its times must not depend on the samples.
      steps: number of steps.
      shift: s in t <- s t / (1 + (s - 1) t); 1 leaves the steps equal.

    Raises:
      InputError: too few steps.
    """
    times: dict[float, None] = {}

    def flow_map(x_t: Images, t: jax.Array, r: jax.Array, y: Any) -> Images:
        times[float(t[0])] = None
        return x_t

    x, y = jnp.zeros((1, 1, 1, 1)), ClassLabels(jnp.zeros(1, jnp.int32), num_classes=1)
    with jax.disable_jit():  # so that times are numbers
        sample(flow_map, x, y, steps=steps, sampler=sampler, shift=shift, step_noise=lambda i: x)
    return tuple(times)
