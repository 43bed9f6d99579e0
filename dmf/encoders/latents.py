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

    Images are decoded whole: in tiles, group normalisation would have other statistics. With the
    published autoencoder in float32, decoding takes 224 MiB for an image of 256 x 256 and 896 MiB
    for one of 512 x 512, times `decode_batch`; the attention in its middle, there a matrix of 4,096
    x 4,096 or 64 MiB, comes before that peak. More at a time should fill an accelerator at the
    coarse levels, and start fewer of its programs; to a CPU it is all the same. Another number may
    round otherwise.

    In bfloat16, images whose levels have a standard deviation of 64 differ by 0.6 of 255 levels on
    average and by 5 at most, in every second value by one or more (random weights of the published
    sizes, and the golden ones of the tests). That is not seen, but measured: take float32 where
    scores are compared with others'. On a CPU it is no faster, and takes more memory.

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
        network = dataclasses.replace(self.autoencoder, dtype=self.decode_dtype)
        latents, decode = self.scaling.invert(x), functools.partial(network.decode, params)
        # The count may be a symbol, of an export: nothing here asks how large it is.
        size, count = self.decode_batch, x.shape[0]
        groups = count // size

        def decode_group(i: jax.Array, images: Images) -> Images:
            rows = i * size + jnp.arange(size)
            return images.at[rows].set(decode(latents[rows]))

        rest = decode(latents[groups * size :])
        images = jnp.zeros((count, *rest.shape[1:]), rest.dtype)
        images = jax.lax.fori_loop(0, jnp.asarray(groups), decode_group, images)
        return images.at[groups * size :].set(rest)
