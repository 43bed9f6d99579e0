"""From the squared error of a sample to its loss.

Every weighting takes the summed squared errors [b], the number of values that were summed, and the
learned log-variance phi [b] (None unless `learned`), and returns losses [b]. Nothing couples two
samples.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dmf.errors import InputError
from dmf.types import PerSample

Weighting = Callable[[PerSample, int, PerSample | None], PerSample]


def is_learned(weighting: Weighting) -> bool:
    """Whether a weighting needs the log-variance head: its `learned`, False where it has none."""
    return getattr(weighting, "learned", False)


def weighted(
    weighting: Weighting, error: PerSample, size: int, phi: PerSample | None = None
) -> PerSample:
    """The losses [b] of a weighting, called as it is.

    Raises:
      InputError: they have another shape.
    """
    losses = weighting(error, size, phi)
    if jnp.shape(losses) != error.shape:
        raise InputError("objective.weighting", type(weighting).__name__, "its losses have shape "
                         f"{jnp.shape(losses)}; return one for each sample, of shape {error.shape}")
    return losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformWeighting:
    """The mean squared error itself.

    >>> UniformWeighting()(jnp.array([8.0]), size=4).tolist()
    [2.0]
    """

    learned = False

    def __call__(self, error: PerSample, size: int, phi: PerSample | None = None) -> PerSample:
        return error / size


def _check_offset(weighting: Any) -> None:
    """Raises InputError where the field `offset` is out of range."""
    if not 1e-6 <= weighting.offset <= 1e6:
        raise InputError("offset", weighting.offset, "it is positive, so that no error divides by "
                         "0; give 1e-6 to 1e6")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveWeighting:
    """e / sg((e + offset)^power) of the summed squared error e (MeanFlow, arXiv:2505.13447,
    "adaptive loss weighting").

    Attributes:
      power: exponent p, from 0 to 5; 0 for the summed squared error itself.
      offset: c, from 1e-6 to 1e6, so that no error divides by 0.
    """

    power: float = 1.0
    offset: float = 0.01
    learned = False

    def __post_init__(self):
        # Beyond, float32 does not hold the power of an image's error.
        if not 0 <= self.power <= 5:
            raise InputError("power", self.power, "give 0, for the error itself, or up to 5")
        _check_offset(self)

    def __call__(self, error: PerSample, size: int, phi: PerSample | None = None) -> PerSample:
        return error / jax.lax.stop_gradient((error + self.offset) ** self.power)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizedWeighting:
    """e / sg(sqrt(e) + offset) of the summed squared error e = |g|^2: its gradient is that of a
    regression on a target from which the prediction differs by g / (|g| + offset) (tangent
    normalization of sCM, arXiv:2410.11081).

    >>> NormalizedWeighting(offset=1.0)(jnp.array([9.0]), size=4).tolist()
    [2.25]

    Attributes:
      offset: c, from 1e-6 to 1e6, so that no error divides by 0; 0.1 as published.
    """

    offset: float = 0.1
    learned = False

    def __post_init__(self):
        _check_offset(self)

    def __call__(self, error: PerSample, size: int, phi: PerSample | None = None) -> PerSample:
        return error / (jnp.sqrt(jax.lax.stop_gradient(error)) + self.offset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CauchyWeighting:
    """log(m e^-phi + 1) + phi / 2 of the mean squared error m: the Cauchy negative log-likelihood
    up to constants, minimal in phi at phi = log m (arXiv:2510.24474)."""

    learned = True

    def __call__(self, error: PerSample, size: int, phi: PerSample | None) -> PerSample:
        return jnp.log1p(error / size * jnp.exp(-phi)) + phi / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedCauchyWeighting:
    """log(m e^-phi + 0.01) + phi, as the published code of Decoupled MeanFlow computes it, but per
    sample. It grows with phi whatever m is, so phi drifts to minus infinity and the loss becomes
    log m. Choose it to repeat that run, `CauchyWeighting` otherwise."""

    learned = True

    def __call__(self, error: PerSample, size: int, phi: PerSample | None) -> PerSample:
        return jnp.log(error / size * jnp.exp(-phi) + 0.01) + phi
