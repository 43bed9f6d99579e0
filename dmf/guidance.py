"""Guidance: of the velocity that training regresses on, and of the flow map that sampling follows.

Training has one formula for every method,

    v_g = omega v_t + kappa u(x_t, t, t, y) + (1 - omega - kappa) u(x_t, t, t, null),

with coefficients per sample; a kind of guidance is a choice of coefficients and of whose u is
meant. Network velocities in it carry no gradient. Its effective scale is omega / (1 - kappa)
(MeanFlow, arXiv:2505.13447).
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dmf.flow import check_interval, inside, per_sample
from dmf.typing import (
    Dropped,
    FlowMap,
    GuidedLabels,
    Images,
    InputError,
    Labels,
    PerSample,
    PRNGKey,
    Times,
)

Coefficients = tuple[PerSample, PerSample]


def _check_finite(field: str, value: float) -> None:
    if not math.isfinite(value):
        raise InputError(f"{field}={value}: give a finite number")


def _check_kappa(kappa: float) -> None:
    if not -math.inf < kappa < 1:
        raise InputError(f"kappa={kappa}: the effective scale is omega / (1 - kappa), so give a "
                         "finite kappa below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoGuidance:
    """v_g = v_t."""

    teacher = drawn = False
    needs_label = needs_null = False

    def coefficients(
        self, t: Times, dropped: Dropped, asked: GuidedLabels | None = None
    ) -> Coefficients:
        return jnp.ones_like(t), jnp.zeros_like(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfGuidance:
    """The network guides itself: (omega, kappa) where t lies in the closed interval and the label
    is kept, v_t elsewhere.

    MeanFlow gives (omega, kappa) directly; the "model guidance" of strength w in Decoupled
    MeanFlow is omega 1, kappa w.
    """

    omega: float = 1.0
    kappa: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    teacher = drawn = False

    def __post_init__(self):
        check_interval("interval", self.interval)
        _check_finite("omega", self.omega)
        _check_kappa(self.kappa)

    @property
    def needs_label(self) -> bool:
        return self.kappa != 0

    @property
    def needs_null(self) -> bool:
        return self.omega + self.kappa != 1

    def coefficients(
        self, t: Times, dropped: Dropped, asked: GuidedLabels | None = None
    ) -> Coefficients:
        active = inside(t, self.interval) & ~dropped
        return jnp.where(active, self.omega, 1.0), jnp.where(active, self.kappa, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherGuidance:
    """Distillation: v_g is the classifier-free guided velocity of a frozen teacher, of scale
    `scale` in the closed interval and 1 outside, for every sample, its label dropped or not."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    teacher = True
    drawn = False
    needs_label = True

    def __post_init__(self):
        check_interval("interval", self.interval)
        _check_finite("scale", self.scale)

    @property
    def needs_null(self) -> bool:
        return self.scale != 1

    def coefficients(
        self, t: Times, dropped: Dropped, asked: GuidedLabels | None = None
    ) -> Coefficients:
        return jnp.zeros_like(t), jnp.where(inside(t, self.interval), self.scale, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnGuidance:
    """The network guides itself by a scale and in an interval that are drawn for each sample and
    given to it, to be chosen at sampling (improved MeanFlow, arXiv:2512.02012).

    Attributes:
      kappa: as in `SelfGuidance`; omega is scale (1 - kappa), so that the scale is the effective
        one.
      largest: the scale lies in [1, largest] ...
      power: ... with a density in proportion to scale^-power.
      low, high: ranges that the ends of the interval are drawn from, uniformly.
    """

    kappa: float = 0.0
    largest: float = 8.0
    power: float = 1.0
    low: tuple[float, float] = (0.0, 0.5)
    high: tuple[float, float] = (0.5, 1.0)
    teacher = False
    drawn = needs_null = True

    def __post_init__(self):
        check_interval("low", self.low)
        check_interval("high", self.high)
        _check_kappa(self.kappa)
        _check_finite("power", self.power)
        if not 1 < self.largest < math.inf:
            raise InputError(f"largest={self.largest}: scales are drawn from 1 up to it; give more "
                             "than 1")
        if self.low[1] > self.high[0]:
            raise InputError(f"low={self.low}: it must end before high={self.high} begins")

    @property
    def needs_label(self) -> bool:
        return self.kappa != 0

    def draw(self, key: PRNGKey, y: Labels) -> GuidedLabels:
        """Labels with a scale and an interval each."""
        keys, count = jax.random.split(key, 3), (len(y),)
        u, top = jax.random.uniform(keys[0], count), math.log(self.largest)
        if self.power == 1:
            scale = jnp.exp(u * top)
        else:
            rest = 1 - self.power
            scale = (1 + u * (self.largest**rest - 1)) ** (1 / rest)
        ends = (jax.random.uniform(k, count, minval=least, maxval=most)
                for k, (least, most) in zip(keys[1:], (self.low, self.high), strict=True))
        return GuidedLabels(y, scale, *ends)

    def coefficients(
        self, t: Times, dropped: Dropped, asked: GuidedLabels | None = None
    ) -> Coefficients:
        active = (asked.low <= t) & (t <= asked.high) & ~dropped
        omega = asked.scale * (1 - self.kappa)
        return jnp.where(active, omega, 1.0), jnp.where(active, self.kappa, 0.0)


Guidance = NoGuidance | SelfGuidance | TeacherGuidance | DrawnGuidance


class GuidedVelocity(NamedTuple):
    """v_g as a function of the velocity of the network itself: base + kappa u(x_t, t, t, y).

    Attributes:
      base: [b, h, w, c], omega v_t + (1 - omega - kappa) u(x_t, t, t, null).
      kappa: [b], or None where the network's own velocity plays no part.
    """

    base: jax.Array
    kappa: jax.Array | None

    def at(self, conditional: Images | None) -> Images:
        """v_g, which carries no gradient.

        Args:
          conditional: u(x_t, t, t, y); not looked at where it plays no part.
        """
        v_g = self.base
        if self.kappa is not None:
            v_g += per_sample(self.kappa, v_g) * conditional
        return jax.lax.stop_gradient(v_g)


def guided_velocity(
    guidance: Guidance,
    t: Times,
    dropped: Dropped,
    v_t: Images,
    unconditional: Images | None,
    asked: GuidedLabels | None = None,
) -> GuidedVelocity:
    """How v_g follows from the velocity of the network, or of its teacher.

    Args:
      guidance: which coefficients.
      t: times.
      dropped: whether a sample's label was dropped.
      v_t: the path's own velocity.
      unconditional: u(x_t, t, t, null); not looked at unless `guidance.needs_null`.
      asked: what was drawn, where `guidance.drawn`.
    """
    omega, kappa = guidance.coefficients(t, dropped, asked)
    base = per_sample(omega, v_t) * v_t
    if guidance.needs_null:
        base += per_sample(1 - omega - kappa, v_t) * unconditional
    return GuidedVelocity(base, kappa if guidance.needs_label else None)


def null_needed(
    guidance: Guidance, t: Times, dropped: Dropped, asked: GuidedLabels | None = None
) -> Bool[Array, "b"]:
    """Where the unconditional velocity has a coefficient other than 0."""
    omega, kappa = guidance.coefficients(t, dropped, asked)
    return omega + kappa != 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierFree:
    """Classifier-free guidance at sampling: takes a flow map, returns the guided flow map.

    u_null + scale (u_cond - u_null), both at the same (t, r), for t in the closed interval and
    u_cond outside (arXiv:2207.12598, arXiv:2404.07724). It costs a forward pass of twice the batch,
    and that of the batch itself with scale 1, or where no t of the batch lies in the interval.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        check_interval("sampling.guidance.interval", self.interval)
        _check_finite("sampling.guidance.scale", self.scale)

    def __call__(self, flow_map: FlowMap, null_label: int) -> FlowMap:
        """The guided flow map.

        Args:
          flow_map: of a network of `null_label` labels.
          null_label: which stands for none.

        Raises:
          InputError: there is something to guide, and no label to guide it by.
        """
        if self.scale == 1:
            return flow_map
        if null_label == 0:
            raise InputError(f"sampling.guidance.scale={self.scale}: this network has no labels "
                             "(model.num_classes=0) to guide it by; set it to 1")

        def guided(x_t: Images, t: Times, r: Times, y: Labels) -> Images:
            def both() -> tuple[Images, Images]:
                # In one batch, which reads the parameters once, where two passes read them twice.
                twice = (jnp.concatenate([values, values]) for values in (x_t, t, r))
                labels = jnp.concatenate([y, jnp.full_like(y, null_label)])
                return tuple(jnp.split(flow_map(*twice, labels), 2))

            def one() -> tuple[Images, Images]:
                u = flow_map(x_t, t, r, y)
                return u, u

            active = inside(t, self.interval)
            # All samples of a step have the same t. No time lies outside the whole interval, which
            # needs no second program.
            whole = tuple(self.interval) == (0, 1)
            u, u_null = both() if whole else jax.lax.cond(active.any(), both, one)
            scale = jnp.where(active, self.scale, 1.0)
            return u_null + per_sample(scale, u) * (u - u_null)

        return guided


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskedOf:
    """Guidance at sampling of a network that takes it as an input: at the price of none."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        check_interval("sampling.guidance.interval", self.interval)
        if not 0 < self.scale < math.inf:
            raise InputError(f"sampling.guidance.scale={self.scale}: a network that takes its "
                             "guidance as an input wants a positive scale; 1 is none")

    def __call__(self, flow_map: FlowMap) -> FlowMap:
        def asked(x_t: Images, t: Times, r: Times, y: Labels) -> Images:
            wanted = (jnp.full(t.shape, value, jnp.float32)
                      for value in (self.scale, *self.interval))
            return flow_map(x_t, t, r, GuidedLabels(y, *wanted))

        return asked
