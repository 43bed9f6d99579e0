"""Exponential moving averages (EMA) of the parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmf.checkpoints.power_ema import exponent
from dmf.errors import InputError
from dmf.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantEma:
    """EMA with a constant decay rate: ema_params <- decay ema_params + (1 - decay) params.

    Attributes:
      decay: decay rate, in [0, 1), in float32 too.
    """

    decay: float = 0.9999

    def __post_init__(self):
        if not (0 <= self.decay < 1 and np.float32(self.decay) < 1):
            raise InputError("decay", self.decay, "a decay rate lies in [0, 1), in float32 too")

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
      images: half-life in images; positive, and at most 1e9.
      ramp: maximum half-life as a fraction of the images seen so far; 0 for no ramp-up.
    """

    images: float = 500_000.0
    ramp: float = 0.05

    def __post_init__(self):
        # Beyond, float32 rounds the decay rate to 1 for batches of 32 samples.
        if not 0 < self.images <= 1e9:
            raise InputError("images", self.images, "a half-life is positive, and at most 1e9")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerEma:
    """EMA whose width is a fraction of the steps so far, weights in proportion to step^gamma
    (arXiv:2312.02696).

    From two of them, and the snapshots that a run keeps of them (`run.keep_snapshots`), the average
    of any other width is synthesised afterwards: `dmf export --ema-std=0.15`.

    Attributes:
      std: width of the average, the standard deviation of its weights over the steps, as a fraction
        of the number of steps so far; from 0.001 to below 0.29. For synthesis, 0.05 and 0.1.
    """

    std: float = 0.1

    def __post_init__(self):
        exponent(self.std)

    def rate(self, step: jax.Array, batch_size: int) -> jax.Array:
        """The decay rate after a training step: (1 - 1 / (step + 1))^(gamma + 1).

        >>> ema = PowerEma(std=0.2886751)  # gamma is 0: the mean of all steps
        >>> [round(float(ema.rate(jnp.int32(step), batch_size=1)), 4) for step in (0, 1, 2)]
        [0.0, 0.5, 0.6667]

        Args:
          step: int scalar, number of steps taken before this one.
          batch_size: global batch size.

        Returns:
          Float scalar in [0, 1).
        """
        del batch_size
        steps = step.astype(jnp.float32) + 1
        # By `expm1`, because a decay rate close to 1 is known as well as its distance from 1.
        return 1 + jnp.expm1((exponent(self.std) + 1) * jnp.log1p(-1 / steps))


Ema = ConstantEma | HalfLifeEma | PowerEma


def power_emas(emas: Mapping[str, Ema]) -> tuple[str, ...]:
    """The names of the power EMAs among EMAs by name.

    >>> power_emas({"main": ConstantEma(), "wide": PowerEma()})
    ('wide',)
    """
    return tuple(name for name, ema in emas.items() if isinstance(ema, PowerEma))


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
