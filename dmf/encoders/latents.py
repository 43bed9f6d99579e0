"""What the samples of a network over latents are, and how they become images."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmf.encoders.autoencoder import Autoencoder
from dmf.scaling import Scaling
from dmf.typing import Images, InputError, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """Scaled latents of an autoencoder.

    Attributes:
      autoencoder: whose latents they are.
      scaling: how they were scaled.
      decode_batch: samples that are decoded at a time.
      decode_dtype: of decoding, "float32" or "bfloat16", whatever that of `autoencoder`.
    """

    autoencoder: Autoencoder
    scaling: Scaling
    decode_batch: int = 8
    decode_dtype: str = "float32"

    def __post_init__(self):
        if self.decode_batch < 1:
            raise InputError(f"sampling.decode_batch={self.decode_batch}: give a whole number >= 1")
        if self.decode_dtype not in ("float32", "bfloat16"):
            raise InputError(f"sampling.decode_dtype={self.decode_dtype}: choose float32 or "
                             "bfloat16")

    def decode(self, params: Params, x: Float[Array, "b y x k"]) -> Images:
        """Images about [-1, 1], float32, of samples; `decode_batch` at a time, and what is left of
        them together."""
        autoencoder = dataclasses.replace(self.autoencoder, dtype=self.decode_dtype)
        size, decode = self.decode_batch, functools.partial(autoencoder.decode, params)
        latents = self.scaling.invert(x)
        # The count may be a symbol, of an export: so both parts are there, if empty.
        groups = latents.shape[0] // size
        grouped = latents[: groups * size].reshape(groups, size, *latents.shape[1:])
        images = jax.lax.map(decode, grouped)
        images = images.reshape(groups * size, *images.shape[2:])
        return jnp.concatenate([images, decode(latents[groups * size :])])
