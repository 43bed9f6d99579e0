"""What the samples of a network over latents are, and how they become images."""

import dataclasses

import jax
from jaxtyping import Array, Float

from dmf.encoders.autoencoder import Autoencoder
from dmf.scaling import Scaling
from dmf.typing import Images, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """Scaled latents of an autoencoder.

    Attributes:
      autoencoder: whose latents they are.
      scaling: how they were scaled.
    """

    autoencoder: Autoencoder
    scaling: Scaling

    def decode(self, params: Params, x: Float[Array, "b y x k"]) -> Images:
        """Images about [-1, 1], float32, of samples; one at a time, for the memory of a decoder is
        that of images many times over."""
        return jax.lax.map(
            lambda sample: self.autoencoder.decode(params, sample[None])[0], self.scaling.invert(x)
        )
