"""The optimizer, its schedule, and the exponential moving averages of the parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dmf.skipping import skipping
from dmf.typing import InputError, Params

SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (arXiv:1711.05101) behind a clip of the global gradient norm.

    Attributes:
      learning_rate: after the warm-up.
      b1, b2, eps, weight_decay: of AdamW.
      clip_norm: largest global norm of a gradient; 0 for no clipping.
      warmup_steps: over which the learning rate rises linearly from 0.
      schedule: "constant", or "cosine" or "linear" decay to 0.
      decay_steps: at which the decay ends, counted from the first step.
      skip_nonfinite: how many steps in a row may be skipped, because their loss or the norm of
        their gradient is not finite; 0 for none.
    """

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    warmup_steps: int = 0
    schedule: str = "constant"
    decay_steps: int = 0
    skip_nonfinite: int = 0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise InputError(f"optimizer.schedule={self.schedule}: choose one of "
                             f"{', '.join(SCHEDULES)}")
        if self.schedule != "constant" and self.decay_steps <= self.warmup_steps:
            raise InputError(f"optimizer.decay_steps={self.decay_steps}: a {self.schedule} decay "
                             f"ends after optimizer.warmup_steps={self.warmup_steps}")
        decay, none = "a decay lies in [0, 1)", "give 0, for none, or more"
        for name, good, remedy in (
            ("learning_rate", self.learning_rate > 0, "it is positive"),
            ("b1", 0 <= self.b1 < 1, decay),
            ("b2", 0 <= self.b2 < 1, decay),
            ("eps", self.eps > 0, "it is positive"),
            ("weight_decay", self.weight_decay >= 0, none),
            ("clip_norm", self.clip_norm >= 0, none),
            ("warmup_steps", self.warmup_steps >= 0, none),
            ("skip_nonfinite", self.skip_nonfinite >= 0,
             "give 0, for none, or how many steps in a row may be skipped"),
        ):  # fmt: skip
            if not good:
                raise InputError(f"optimizer.{name}={getattr(self, name)}: {remedy}")

    def rate(self, step: jax.Array) -> jax.Array:
        """The learning rate of a step."""
        length = max(self.decay_steps - self.warmup_steps, 1)
        after = {
            "constant": optax.constant_schedule(self.learning_rate),
            "cosine": optax.cosine_decay_schedule(self.learning_rate, length),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, length),
        }[self.schedule]
        warmup = optax.linear_schedule(0.0, self.learning_rate, max(self.warmup_steps, 1))
        return optax.join_schedules([warmup, after], [self.warmup_steps])(step)

    def transform(self) -> optax.GradientTransformation:
        """The gradient transformation, which takes `finite` too where steps may be skipped."""
        adamw = optax.adamw(
            self.rate, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay
        )
        clip = optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity()
        chain = optax.chain(clip, adamw)
        return skipping(chain) if self.skip_nonfinite else chain


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantEma:
    """average <- decay average + (1 - decay) params, from the first step on."""

    decay: float = 0.9999

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise InputError(f"decay={self.decay}: a decay lies in [0, 1)")

    def rate(self, step: jax.Array, batch_size: int) -> jax.Array:
        """The decay after `step` (counted from 0)."""
        del step, batch_size
        return jnp.float32(self.decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfLifeEma:
    """Decay by half-life, with a warm-up in proportion to the images seen (EDM,
    arXiv:2206.00364): 0.5^(batch / min(half-life, ramp x images seen)).

    Attributes:
      images: half-life in images.
      ramp: largest half-life as a share of the images seen so far; 0 for no warm-up.
    """

    images: float = 500_000.0
    ramp: float = 0.05

    def __post_init__(self):
        if not self.images > 0:
            raise InputError(f"images={self.images}: a half-life is positive")
        if not self.ramp >= 0:
            raise InputError(f"ramp={self.ramp}: give 0, for no warm-up, or more")

    def rate(self, step: jax.Array, batch_size: int) -> jax.Array:
        """The decay after `step` (counted from 0)."""
        seen = step.astype(jnp.float32) * batch_size
        half_life = jnp.minimum(self.images, seen * self.ramp) if self.ramp else self.images
        return 0.5 ** (batch_size / jnp.maximum(half_life, 1e-8))


Ema = ConstantEma | HalfLifeEma


def averaged(ema: Ema, average: Params, params: Params, step: Any, batch_size: int) -> Params:
    """The average after one more step."""
    decay = ema.rate(jnp.asarray(step), batch_size)
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
