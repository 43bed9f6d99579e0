"""The affine map between the latents of an autoencoder and the samples x of a network."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dmf.errors import InputError, check_between

Latents = Float[Array, "b h w c"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentScaling:
    """x = (latent - shift) * scale; or, by channel, x = (latent - mean) / std.

    >>> scaling = LatentScaling(scale=0.5, shift=1.0)
    >>> x = scaling.apply(jnp.full((1, 2, 2, 4), 3.0))
    >>> x.shape, float(x[0, 0, 0, 0]), float(scaling.invert(x)[0, 0, 0, 0])
    ((1, 2, 2, 4), 1.0, 3.0)

    Attributes:
      scale: factor of the latents, > 0, so that x has about unit variance; 0.18215 for the latents
        of Stable Diffusion. Leave it at 1 with `mean` and `std`.
      shift: offset that is subtracted from the latents before scaling; leave it at 0 with `mean`
        and `std`.
      mean: mean of each latent channel, as many values as channels; empty to use scale and shift.
      std: standard deviation of each latent channel, > 0, as many values as `mean`; empty to use
        scale and shift.
    """

    scale: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self):
        if len(self.mean) != len(self.std):
            raise InputError(
                "std", self.std,
                f"latents.mean has {len(self.mean)} channels; give as many, or neither",
            )
        if self.mean and (self.scale, self.shift) != (1.0, 0.0):
            raise InputError(
                "scale", self.scale,
                "with latents.mean and latents.std, leave it at 1, and latents.shift at 0",
            )
        if not (self.scale > 0 and all(std > 0 for std in self.std)):
            raise InputError(
                "scale", self.scale,
                f"it and latents.std={self.std} must be positive",
            )
        check_between(self, 1e-6, 1e6, "scale")
        check_between(self, -1e6, 1e6, "shift")

    def apply(self, latents: Latents) -> Latents:
        """The samples x [b, h, w, c] of latents [b, h, w, c].

        Raises:
          InputError: `mean` and `std` are of another number of channels.
        """
        offset, factor = self._offset_and_factor(latents.shape[-1])
        return (latents - offset) * factor

    def invert(self, x: Latents) -> Latents:
        """The latents [b, h, w, c] of samples x [b, h, w, c]; the inverse of `apply`.

        Raises:
          InputError: `mean` and `std` are of another number of channels.
        """
        offset, factor = self._offset_and_factor(x.shape[-1])
        return x / factor + offset

    def _offset_and_factor(
        self, channels: int
    ) -> tuple[Float[Array, "1 1 1 c"], Float[Array, "1 1 1 c"]]:
        terms = self.offset_and_factor(channels)
        return tuple(jnp.asarray(term, jnp.float32)[None, None, None] for term in terms)

    def offset_and_factor(
        self, channels: int
    ) -> tuple[Float[np.ndarray, "c"], Float[np.ndarray, "c"]]:
        """The float64 terms of x = (latent - offset) * factor, by channel.

        Raises:
          InputError: `mean` and `std` are of another number of channels.
        """
        if self.mean and len(self.mean) != channels:
            raise InputError("mean", self.mean, f"the latents have {channels} channels")
        offset = np.broadcast_to(np.float64(self.mean or self.shift), channels)
        return offset, 1 / np.asarray(self.std) if self.std else np.full(channels, self.scale)


def scaling_of_other(
    samples: LatentScaling, published: LatentScaling, other: LatentScaling, *, channels: int
) -> LatentScaling:
    """The scaling between samples x and the latents of another autoencoder, where the latents of
    two autoencoders are equal after the published scaling of each.

    >>> stable_diffusion, taesd = LatentScaling(scale=0.18215), LatentScaling()
    >>> normalised = LatentScaling(mean=(1.0,), std=(2.0,))
    >>> scaling = scaling_of_other(normalised, stable_diffusion, taesd, channels=1)
    >>> round(float(scaling.invert(jnp.full((1, 1, 1, 1), 3.0))[0, 0, 0, 0]) / 0.18215, 5)
    7.0

    Args:
      samples: between the samples and the latents of the first autoencoder.
      published: of the first autoencoder.
      other: of the other autoencoder.
      channels: of the latents.

    Raises:
      InputError: a scaling is of another number of channels.
    """
    (mean, factor), (shift, scale), (other_shift, other_scale) = (
        scaling.offset_and_factor(channels) for scaling in (samples, published, other)
    )
    return LatentScaling(
        mean=tuple(((mean - shift) * scale / other_scale + other_shift).tolist()),
        std=tuple((scale / factor / other_scale).tolist()),
    )
