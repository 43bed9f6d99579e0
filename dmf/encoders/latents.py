"""What the samples of a network over latents are, and how they become images."""

import dataclasses

import jax
from jaxtyping import Array, Float

from dmf.encoders.autoencoder import Autoencoder
from dmf.typing import Images, InputError, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """Samples x = (latent - shift) * scale of an autoencoder's latents.

    Attributes:
      autoencoder: whose latents they are.
      scale: 0.18215 for Stable Diffusion's, which gives them about unit variance.
      shift: the mean that is taken away.
    """

    autoencoder: Autoencoder
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self):
        if not self.scale > 0:
            raise InputError(f"latents.scale={self.scale}: give a positive number")

    def decode(self, params: Params, x: Float[Array, "b y x k"]) -> Images:
        """Images about [-1, 1], float32, of samples; one at a time, for the memory of a decoder is
        that of images many times over."""
        return jax.lax.map(
            lambda sample: self.autoencoder.decode(params, sample[None])[0],
            x / self.scale + self.shift,
        )
