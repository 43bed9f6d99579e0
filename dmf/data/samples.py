"""What the rows of a dataset become on the device: samples of the network.

A row is an image, uint8 [h, w, c], or the moments of its latents, [f, h, w, 2c] in half or single
precision: mean, then standard deviation; f is 1, or 2 where those of the mirror image follow. The
moments of a mirror image are not the mirrored moments: the autoencoder sees left and right apart.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from dmf.scaling import Scaling
from dmf.typing import Images, InputError, PRNGKey


def sample_shape(row: tuple[int, ...]) -> tuple[int, int, int]:
    """(h, w, c) of the samples of rows of a shape."""
    if len(row) == 3:
        return row
    _, height, width, moments = row
    return height, width, moments // 2


def pixels(images: Shaped[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n h w c"]:
    """uint8 images as float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToSamples:
    """Turns rows into samples, drawn anew each time they are seen.

    Attributes:
      scaling: of latents; images are in [-1, 1] always.
      mirror: whether each sample is mirrored with probability one half.
    """

    scaling: Scaling
    mirror: bool = False

    def check(self, row: tuple[int, ...]) -> None:
        """Raises InputError where rows of a shape cannot be mirrored."""
        if self.mirror and len(row) == 4 and row[0] != 2:
            raise InputError("data.mirror=True: the dataset has no moments of mirror images; "
                             "prepare it with them, or set data.mirror to False")

    def samples(self, key: PRNGKey, rows: Shaped[Array, "b ..."]) -> Images:
        """Samples [b, h, w, c] in float32.

        Args:
          key: of the mirroring and of the latents' draw.
          rows: [b, h, w, c] uint8 images, or [b, f, h, w, 2c] moments.
        """
        for_mirror, for_latents = jax.random.split(key)
        mirrored = jnp.zeros(len(rows), bool)
        if self.mirror:
            mirrored = jax.random.bernoulli(for_mirror, shape=mirrored.shape)
        if rows.ndim == 4:
            images = rows.astype(jnp.float32) / 127.5 - 1
            return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        moments = rows[jnp.arange(len(rows)), mirrored.astype(jnp.int32)]
        mean, std = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return self.scaling.apply(mean + std * jax.random.normal(for_latents, mean.shape))
