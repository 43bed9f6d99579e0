"""Guidance in training: the velocity that the losses regress on.

Every method has one formula,

    v_g = omega v_t + kappa u(x_t, t, t, y) + (1 - omega - kappa) u(x_t, t, t, null),

with coefficients per sample. A kind of guidance chooses the coefficients, and whose velocities u
are meant. Network velocities in v_g carry no gradient. The effective guidance scale is
omega / (1 - kappa) (MeanFlow, arXiv:2505.13447).
"""

import abc
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from dmf.errors import InputError, check_between
from dmf.objectives.interpolants import check_interval, in_interval, per_sample
from dmf.types import Dropped, GuidanceInput, Images, PerSample, PRNGKey, Times

Coefficients = tuple[PerSample, PerSample]


# Published scales are below 10.
LARGEST_SCALE = 1000.0


def _check_kappa(kappa: float) -> None:
    if not (0 <= kappa < 1 and np.float32(kappa) < 1):
        raise InputError("kappa", kappa, "the effective scale is omega / (1 - kappa), so give a "
                         "kappa from 0 to below 1, in float32 too")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance(abc.ABC):
    """A kind of guidance in training. A class derived from it defines `coefficients`.

    Attributes:
      uses_teacher: whether the velocities are those of a frozen teacher.
      is_drawn: whether a scale and an interval are drawn for each sample, by a method `draw` as
        that of `DrawnGuidance`, and given to the network as an input.
      needs_conditional: whether v_g contains the conditional velocity: kappa is not always 0.
      needs_unconditional: whether v_g contains the unconditional velocity: omega + kappa is not
        always 1.
    """

    uses_teacher = is_drawn = False
    needs_conditional = needs_unconditional = True

    @abc.abstractmethod
    def coefficients(
        self, t: Times, dropped: Dropped, guidance: GuidanceInput | None = None
    ) -> Coefficients:
        """(omega, kappa), each [b].

        Args:
          t: [b] times.
          dropped: [b] bool, where the condition was dropped.
          guidance: the guidance drawn for each sample, where it is drawn.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoGuidance(Guidance):
    """No guidance: v_g = v_t."""

    needs_conditional = needs_unconditional = False

    def coefficients(
        self, t: Times, dropped: Dropped, guidance: GuidanceInput | None = None
    ) -> Coefficients:
        """(omega, kappa) = (1, 0) for every sample."""
        return jnp.ones_like(t), jnp.zeros_like(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfGuidance(Guidance):
    """The network guides itself: (omega, kappa) where t lies in the closed interval and the
    condition is not dropped, v_t elsewhere.

    MeanFlow gives omega and kappa directly; the "model guidance" of strength w in Decoupled
    MeanFlow is omega = 1 and kappa = w. With omega = 1 and kappa = 0 there is no guidance, at no
    cost.

    Attributes:
      omega: coefficient of v_t.
      kappa: coefficient of the network's own conditional velocity, below 1.
      interval: (start, end) of the closed interval of times t that are guided.
      decay_start: time from which the effective scale omega / (1 - kappa) falls smoothly to 1 at
        t = 1, with kappa as it is (SoFlow, arXiv:2512.15657, has 0.8); 1 for none.
    """

    omega: float = 1.0
    kappa: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    decay_start: float = 1.0

    def __post_init__(self):
        check_interval("interval", self.interval)
        check_between(self, 0, LARGEST_SCALE, "omega")
        check_between(self, 0.0, 1.0, "decay_start")
        _check_kappa(self.kappa)
        if self.decay_start < 1 and not self.needs_unconditional:
            raise InputError("decay_start", self.decay_start, "the effective scale omega / (1 - "
                             "kappa) is 1 already; give another omega or kappa, or 1 for no decay")
        if self.decay_start < 1 and self.interval[1] <= self.decay_start:
            raise InputError("decay_start", self.decay_start, "no time in the interval "
                             f"{self.interval} is later; give less, or 1 for no decay")

    @property
    def needs_conditional(self) -> bool:
        """Whether v_g contains the network's conditional velocity."""
        return self.kappa != 0

    @property
    def needs_unconditional(self) -> bool:
        """Whether v_g contains the network's unconditional velocity."""
        return self.omega + self.kappa != 1

    def coefficients(
        self, t: Times, dropped: Dropped, guidance: GuidanceInput | None = None
    ) -> Coefficients:
        """(omega, kappa), each [b]."""
        active = in_interval(t, self.interval) & ~dropped
        omega = self.omega
        if self.decay_start < 1:
            unguided = 1 - self.kappa
            omega = unguided + smooth_decay(t, self.decay_start) * (omega - unguided)
        return jnp.where(active, omega, 1.0), jnp.where(active, self.kappa, 0.0)


def smooth_decay(t: Times, start: float) -> Times:
    """[b] factor of the guidance: 1 up to the time `start`, then falling smoothly to 0 at t = 1,
    as 1 - exp(-0.025 z / (1 - z)) of z = (1 - t) / (1 - start) (SoFlow, arXiv:2512.15657).

    >>> decay = smooth_decay(jnp.array([0.5, 0.8, 0.82, 0.9, 1.0]), 0.8)
    >>> [round(factor, 2) for factor in decay.tolist()]
    [1.0, 1.0, 0.2, 0.02, 0.0]
    """
    z = jnp.clip((1 - t) / (1 - start), 0.0, 1.0)
    return -jnp.expm1(-0.025 * z / jnp.maximum(1 - z, 1e-12))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherGuidance(Guidance):
    """Distillation: v_g is the classifier-free guided velocity of a frozen teacher, for every
    sample, its condition dropped or not.

    Attributes:
      scale: guidance scale of the teacher where t lies in the closed interval; 1 elsewhere.
      interval: (start, end) of the interval.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    uses_teacher = True

    def __post_init__(self):
        check_interval("interval", self.interval)
        check_between(self, 0, LARGEST_SCALE, "scale")

    @property
    def needs_unconditional(self) -> bool:
        """Whether v_g contains the teacher's unconditional velocity."""
        return self.scale != 1

    def coefficients(
        self, t: Times, dropped: Dropped, guidance: GuidanceInput | None = None
    ) -> Coefficients:
        """(omega, kappa) = (0, scale) inside the interval and (0, 1) outside."""
        active = in_interval(t, self.interval)
        return jnp.zeros_like(t), jnp.where(active, self.scale, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnGuidance(Guidance):
    """The network guides itself by a scale and in an interval that are drawn for each sample and
    given to it as an input, to be chosen at sampling (improved MeanFlow, arXiv:2512.02012).

    Attributes:
      kappa: coefficient of the network's own conditional velocity, below 1; omega is
        scale (1 - kappa), so that the drawn scale is the effective one. None for 1 - 1 / scale,
        which makes omega 1.
      max_scale: largest guidance scale, above 1; the scale is drawn from [1, max_scale].
      power: exponent p of the density of the scale, which is in proportion to scale^-p.
      start_range: (low, high) that the start of the interval is drawn from, uniformly.
      end_range: (low, high) that the end of the interval is drawn from, uniformly.
    """

    kappa: float | None = 0.0
    max_scale: float = 8.0
    power: float = 1.0
    start_range: tuple[float, float] = (0.0, 0.5)
    end_range: tuple[float, float] = (0.5, 1.0)
    is_drawn = True

    def __post_init__(self):
        check_interval("start_range", self.start_range)
        check_interval("end_range", self.end_range)
        if self.kappa is not None:
            _check_kappa(self.kappa)
        check_between(self, -100.0, 100.0, "power")
        if not 1 < self.max_scale <= LARGEST_SCALE:
            raise InputError("max_scale", self.max_scale, "scales are drawn from 1 up to it; give "
                             f"more than 1, and at most {LARGEST_SCALE}")
        if self.start_range[1] > self.end_range[0]:
            raise InputError("start_range", self.start_range, "it must end before end_range="
                             f"{self.end_range} begins")

    @property
    def needs_conditional(self) -> bool:
        """Whether v_g contains the network's conditional velocity."""
        return self.kappa != 0

    def draw(self, key: PRNGKey, count: int) -> GuidanceInput:
        """A scale and an interval for each of `count` samples."""
        keys, shape = jax.random.split(key, 3), (count,)
        scale = self._scale_of(jax.random.uniform(keys[0], shape))
        ends = (jax.random.uniform(k, shape, minval=low, maxval=high)
                for k, (low, high) in zip(keys[1:], (self.start_range, self.end_range),
                                          strict=True))
        return GuidanceInput(scale, *ends)

    def _scale_of(self, z: PerSample) -> PerSample:
        """The scale at which the distribution function is z in [0, 1), with p the power and M the
        largest scale: (1 + z (M^(1 - p) - 1))^(1 / (1 - p)), and M^z for p = 1. It is computed in
        logarithms, from the end where M^(1 - p) or its inverse is below 1, so that no power
        overflows."""
        exponent, log_max = 1 - self.power, math.log(self.max_scale)
        if exponent == 0:
            log_scale = z * log_max
        elif exponent < 0:
            log_scale = jnp.log1p(z * math.expm1(exponent * log_max)) / exponent
        else:
            from_max = jnp.log1p((1 - z) * math.expm1(-exponent * log_max)) / exponent
            log_scale = log_max + from_max
        return jnp.clip(jnp.exp(log_scale), 1.0, self.max_scale)

    def coefficients(
        self, t: Times, dropped: Dropped, guidance: GuidanceInput | None = None
    ) -> Coefficients:
        """(omega, kappa), each [b], of the guidance drawn for each sample."""
        active = in_drawn_interval(t, guidance) & ~dropped
        if self.kappa is None:
            omega, kappa = 1.0, 1 - 1 / guidance.scale
        else:
            omega, kappa = guidance.scale * (1 - self.kappa), self.kappa
        return jnp.where(active, omega, 1.0), jnp.where(active, kappa, 0.0)


def in_drawn_interval(t: Times, guidance: GuidanceInput) -> Bool[Array, "b"]:
    """[b] bool: whether t lies in the closed interval that was drawn for the sample."""
    return (guidance.start <= t) & (t <= guidance.end)


def check_guides_itself(name: str, guidance: Guidance) -> None:
    """Raises InputError where an objective without a teacher is given a teacher's guidance."""
    if guidance.uses_teacher:
        raise InputError("guidance.name", "teacher", f"{name} guides itself; choose none, self or "
                         "drawn, or distil with the decoupled_mean_flow objective")


class GuidedVelocity(NamedTuple):
    """v_g as a function of the conditional velocity: base + kappa u(x_t, t, t, y).

    Attributes:
      base: [b, h, w, c], omega v_t + (1 - omega - kappa) u(x_t, t, t, null).
      kappa: [b], or None where v_g does not contain the conditional velocity.
    """

    base: jax.Array
    kappa: jax.Array | None

    def at(self, conditional: Images | None) -> Images:
        """v_g [b, h, w, c], without gradient.

        Args:
          conditional: u(x_t, t, t, y); ignored where v_g does not contain it.
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
    guidance_input: GuidanceInput | None = None,
) -> GuidedVelocity:
    """v_g as a function of the conditional velocity of the network, or of its teacher.

    Args:
      guidance: chooses the coefficients.
      t: [b] times.
      dropped: [b] bool, where the condition was dropped.
      v_t: [b, h, w, c] velocity of the path.
      unconditional: u(x_t, t, t, null); ignored unless `guidance.needs_unconditional`.
      guidance_input: the guidance drawn for each sample, where it is drawn.
    """
    omega, kappa = _coefficients(guidance, t, dropped, guidance_input)
    base = per_sample(omega, v_t) * v_t
    if guidance.needs_unconditional:
        base += per_sample(1 - omega - kappa, v_t) * unconditional
    return GuidedVelocity(base, kappa if guidance.needs_conditional else None)


def unconditional_needed(
    guidance: Guidance, t: Times, dropped: Dropped, guidance_input: GuidanceInput | None = None
) -> Bool[Array, "b"]:
    """[b] bool: for which samples the unconditional velocity has a coefficient other than 0."""
    omega, kappa = _coefficients(guidance, t, dropped, guidance_input)
    return omega + kappa != 1


def _coefficients(
    guidance: Guidance, t: Times, dropped: Dropped, guidance_input: GuidanceInput | None
) -> Coefficients:
    """The coefficients of each sample.

    Raises:
      InputError: they are no pair of arrays [b].
    """
    pair = guidance.coefficients(t, dropped, guidance_input)
    shapes = [jnp.shape(each) for each in pair] if isinstance(pair, tuple) else type(pair).__name__
    if shapes != [t.shape, t.shape]:
        raise InputError("objective.guidance", type(guidance).__name__, "its coefficients have "
                         f"shapes {shapes}; return (omega, kappa), each of shape {t.shape}")
    return pair
