"""Exponential moving averages (EMA) of the parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dmf.errors import InputError
from dmf.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantEma:
    """EMA with a constant decay rate: ema_params <- decay ema_params + (1 - decay) params.

    Attributes:
      decay: decay rate, in [0, 1).
    """

    decay: float = 0.9999

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise InputError("decay", self.decay, "a decay rate lies in [0, 1)")

    def rate(self, step: jax.Array, batch_size: int) -> jax.Array:
        """The decay rate after a training step.

        >>> round(float(ConstantEma(decay=0.99).rate(jnp.int32(0), batch_size=256)), 6)
        0.99

        Args:
          step: int scalar, number of steps taken before this one.
          batch_size: global batch size.

        Returns:
          Float32 scalar in [0, 1).
        """
        del step, batch_size
        return jnp.float32(self.decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfLifeEma:
    """EMA with a half-life in images, which ramps up with the images seen (EDM, arXiv:2206.00364).

    The decay rate is 0.5^(batch size / min(images, ramp x images seen)).

    Attributes:
      images: half-life in images; positive.
      ramp: maximum half-life as a fraction of the images seen so far; 0 for no ramp-up.
    """

    images: float = 500_000.0
    ramp: float = 0.05

    def __post_init__(self):
        if not 0 < self.images <= 1e12:
            raise InputError("images", self.images, "a half-life is positive, and at most 1e12")
        if not 0 <= self.ramp <= 1:
            raise InputError("ramp", self.ramp, "give 0, for no ramp-up, or more, up to 1")

    def rate(self, step: jax.Array, batch_size: int) -> jax.Array:
        """The decay rate after a training step.

        >>> ema = HalfLifeEma(images=1000.0, ramp=0.0)
        >>> round(float(ema.rate(jnp.int32(0), batch_size=1000)), 6)
        0.5

        Args:
          step: int scalar, number of steps taken before this one.
          batch_size: global batch size.

        Returns:
          Float scalar in [0, 1).
        """
        images_seen = step.astype(jnp.float32) * batch_size
        half_life = jnp.minimum(self.images, images_seen * self.ramp) if self.ramp else self.images
        return 0.5 ** (batch_size / jnp.maximum(half_life, 1e-8))


Ema = ConstantEma | HalfLifeEma


def update_ema(
    ema: Ema, ema_params: Params, params: Params, step: Any, batch_size: int
) -> Params:
    """The EMA parameters after a training step.

    Args:
      ema: the decay rate.
      ema_params: EMA parameters before the step.
      params: parameters after the step.
      step: int scalar, number of steps taken before this one.
      batch_size: global batch size.

    Returns:
      decay ema_params + (1 - decay) params.
    """
    decay = ema.rate(jnp.asarray(step), batch_size)
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, ema_params, params)
