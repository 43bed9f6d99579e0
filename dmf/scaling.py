"""The affine map between an autoencoder's latents and what a network is trained on."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dmf.typing import InputError

# Of the latents of Stable Diffusion's autoencoder (arXiv:2112.10752).
STABLE_DIFFUSION_SCALE = 0.18215

Latents = Float[Array, "b h w c"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """x = (latent - shift) * scale; or, channel by channel, x = (latent - mean) / std.

    Attributes:
      scale: as `STABLE_DIFFUSION_SCALE`, so that latents have about unit variance.
      shift: taken away before.
      mean, std: of each channel, in place of the two; both or neither.
    """

    scale: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self):
        if len(self.mean) != len(self.std):
            raise InputError(f"latents.std={self.std}: latents.mean has {len(self.mean)} channels; "
                             "give as many, or neither")
        if self.mean and (self.scale, self.shift) != (1.0, 0.0):
            raise InputError(f"latents.scale={self.scale}: with latents.mean and latents.std, "
                             "leave it at 1, and latents.shift at 0")
        if not (self.scale > 0 and all(std > 0 for std in self.std)):
            raise InputError(f"latents.scale={self.scale}: it and latents.std={self.std} must be "
                             "positive")

    def apply(self, latents: Latents) -> Latents:
        """What the network sees of latents."""
        offset, factor = self._terms(latents.shape[-1])
        return (latents - offset) * factor

    def invert(self, x: Latents) -> Latents:
        """The latents of what the network makes."""
        offset, factor = self._terms(x.shape[-1])
        return x / factor + offset

    def _terms(self, channels: int) -> tuple[Float[Array, "1 1 1 c"], Float[Array, "1 1 1 c"]]:
        if self.mean and len(self.mean) != channels:
            raise InputError(f"latents.mean={self.mean}: the latents have {channels} channels")
        offset = np.broadcast_to(self.mean or self.shift, channels)
        factor = 1 / np.asarray(self.std) if self.std else np.full(channels, self.scale)
        return tuple(jnp.asarray(term, jnp.float32)[None, None, None] for term in (offset, factor))
