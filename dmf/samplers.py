"""From noise to data: a step of each sampler, and the loop that repeats it.

A step takes a flow map, x [b, h, w, c] at time t, both times as scalars, labels [b], and one
draw of standard normal noise (None for the deterministic samplers), and returns x at t_next.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmf import times
from dmf.flow import LINEAR, Interpolant
from dmf.typing import FlowMap, Images, InputError, Labels, PRNGKeys

Time = Float[Array, ""]


@runtime_checkable
class Sampler(Protocol):
    """One step from t to t_next, and the times it wants."""

    stochastic: bool

    def schedule(self, steps: int, shift: float) -> Float[Array, "n"]: ...

    def step(
        self,
        flow_map: FlowMap,
        x: Images,
        t: Time,
        t_next: Time,
        y: Labels,
        noise: Images | None,
    ) -> Images: ...


def _average_velocity(flow_map: FlowMap, x: Images, t: Time, r: Time, y: Labels) -> Images:
    ts, rs = jnp.broadcast_to(t, y.shape), jnp.broadcast_to(r, y.shape)
    return flow_map(x, ts, rs, y).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler:
    """x + (t_next - t) u(x, t, t_next): exact for a perfect flow map, whatever the step, and the
    Euler method for a flow model, which ignores t_next."""

    stochastic = False

    def schedule(self, steps: int, shift: float) -> Float[Array, "n"]:
        return times.schedule(steps, shift)

    def step(
        self,
        flow_map: FlowMap,
        x: Images,
        t: Time,
        t_next: Time,
        y: Labels,
        noise: Images | None = None,
    ) -> Images:
        return x + (t_next - t) * _average_velocity(flow_map, x, t, t_next, y)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restart:
    """Jumps to data, then noises the result afresh to t_next (the sampler of consistency models,
    arXiv:2303.01469, multistep sampling)."""

    interpolant: Interpolant = LINEAR
    stochastic = True

    def schedule(self, steps: int, shift: float) -> Float[Array, "n"]:
        return times.schedule(steps, shift)

    def step(
        self,
        flow_map: FlowMap,
        x: Images,
        t: Time,
        t_next: Time,
        y: Labels,
        noise: Images,
    ) -> Images:
        x_0 = x - t * _average_velocity(flow_map, x, t, jnp.zeros_like(t), y)
        return self.interpolant.alpha(t_next) * x_0 + self.interpolant.sigma(t_next) * noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyTrajectory:
    """Goes beyond t_next to s = t_next sqrt(1 - gamma^2), then adds the noise that leads back.

    gamma 0 is `Euler`, gamma 1 is `Restart` (CTM, arXiv:2310.02279). The noise has
    variance sigma(t_next)^2 - a^2 sigma(s)^2 with a = alpha(t_next) / alpha(s), which keeps the
    marginal of the path.
    """

    gamma: float = 0.5
    interpolant: Interpolant = LINEAR
    stochastic = True

    def __post_init__(self):
        if not 0 <= self.gamma <= 1:
            raise InputError(f"gamma={self.gamma}: the share of fresh noise lies in [0, 1]")

    def schedule(self, steps: int, shift: float) -> Float[Array, "n"]:
        return times.schedule(steps, shift)

    def step(
        self,
        flow_map: FlowMap,
        x: Images,
        t: Time,
        t_next: Time,
        y: Labels,
        noise: Images,
    ) -> Images:
        alpha, sigma = self.interpolant.alpha, self.interpolant.sigma
        s = t_next * (1 - self.gamma**2) ** 0.5
        x_s = x + (s - t) * _average_velocity(flow_map, x, t, s, y)
        shrink = alpha(t_next) / alpha(s)
        variance = sigma(t_next) ** 2 - (shrink * sigma(s)) ** 2
        return shrink * x_s + jnp.sqrt(jnp.maximum(variance, 0.0)) * noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun:
    """Second order for flow models: Euler, then the mean of the velocities at both ends. The last
    step is Euler (EDM, arXiv:2206.00364, algorithm 1)."""

    stochastic = False

    def schedule(self, steps: int, shift: float) -> Float[Array, "n"]:
        return times.schedule(steps, shift)

    def step(
        self,
        flow_map: FlowMap,
        x: Images,
        t: Time,
        t_next: Time,
        y: Labels,
        noise: Images | None = None,
    ) -> Images:
        velocity = _average_velocity(flow_map, x, t, t, y)

        def corrected() -> Images:
            guess = x + (t_next - t) * velocity
            return (velocity + _average_velocity(flow_map, guess, t_next, t_next, y)) / 2

        return x + (t_next - t) * jax.lax.cond(t_next > 0, corrected, lambda: velocity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diffusion:
    """Euler-Maruyama on the reverse SDE of a flow model, with diffusion w(t) = 2 sigma(t).

    SiT, arXiv:2401.08740: drift v - w/2 score. All steps but the last go from 1 to
    `last_time` in equal parts; the last goes to 0 along the drift and adds no noise.
    """

    last_time: float = 1e-4
    interpolant: Interpolant = LINEAR
    stochastic = True

    def schedule(self, steps: int, shift: float) -> Float[Array, "n"]:
        if steps < 2:
            raise InputError(f"steps={steps}: the sde sampler needs at least 2 steps")
        start = jnp.linspace(1.0, self.last_time, steps)
        return times.shifted(jnp.append(start, 0.0), shift)

    def step(
        self,
        flow_map: FlowMap,
        x: Images,
        t: Time,
        t_next: Time,
        y: Labels,
        noise: Images,
    ) -> Images:
        velocity = _average_velocity(flow_map, x, t, t, y)
        w = 2 * self.interpolant.sigma(t)
        score = self.interpolant.score(velocity, x, jnp.broadcast_to(t, y.shape))
        drifted = x + (t_next - t) * (velocity - w / 2 * score)
        spread = jnp.where(t_next > 0, jnp.sqrt(w * (t - t_next)), 0.0)
        return drifted + spread * noise


def noise_like(keys: PRNGKeys, shape: tuple[int, ...]) -> Images:
    """Standard normal noise [b, *shape] in float32; row i depends on keys[i] alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def sample(
    flow_map: FlowMap,
    noise: Images,
    y: Labels,
    *,
    steps: int = 1,
    sampler: Sampler = Euler(),
    shift: float = 1.0,
    step_noise: Callable[[jax.Array], Images] | None = None,
) -> Images:
    """Carries noise at t = 1 to data at t = 0.

    Args:
      flow_map: u(x_t, t, r, y), guided or not.
      noise: [b, h, w, c] standard normal.
      y: [b] labels.
      steps: number of steps; each costs one call of the flow map, or two with Heun.
      sampler: which step.
      shift: s in t <- s t / (1 + (s - 1) t); 1 leaves the steps equal.
      step_noise: from the index of a step to fresh noise [b, h, w, c]; stochastic samplers only.

    Returns:
      [b, h, w, c] in float32 or better, whatever the network computes in.

    Raises:
      InputError: too few steps, or a stochastic sampler without `step_noise`.
    """
    if sampler.stochastic and step_noise is None:
        raise InputError(f"step_noise=None: {type(sampler).__name__} needs fresh noise each step")
    schedule = sampler.schedule(steps, shift)

    def advance(x: Images, now: tuple[Time, Time, jax.Array]) -> tuple[Images, None]:
        t, t_next, index = now
        fresh = step_noise(index) if sampler.stochastic else None
        return sampler.step(flow_map, x, t, t_next, y, fresh), None

    state = noise.astype(jnp.promote_types(noise.dtype, jnp.float32))
    x, _ = jax.lax.scan(advance, state, (schedule[:-1], schedule[1:], jnp.arange(steps)))
    return x
