"""What the rows of a dataset become on the device: samples of the network.

A row is an image, uint8 [h, w, c], or the moments of its latents, [f, h, w, 2c] in half or single
precision: mean, then standard deviation; f is 1, or 2 where those of the mirror image follow. The
moments of a mirror image are not the mirrored moments: the autoencoder sees left and right apart.

Beside a row there may be, for representation alignment, the image it was made of, uint8 [h, w, c],
or patch features of a frozen encoder, [f, n, d]; one draw decides whether all of it is mirrored.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from dmf.scaling import Scaling
from dmf.typing import Batch, Images, InputError, PRNGKey


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

    def batch(self, key: PRNGKey, rows: Batch) -> Batch:
        """Rows, with what is beside them, as training samples in the same mirrored state.

        Args:
          key: of the mirroring and of the latents' draw.
          rows: `x` as `samples` takes it, and none or one of `images` [b, h, w, c] uint8, and
            `features` [b, f, n, d].

        Returns:
          The batch; features are [b, n, d] in float32.
        """
        mirrored, images, features = self._mirrored(key, len(rows.x)), rows.images, rows.features
        if images is not None:
            images = _flipped(images, mirrored)
        if features is not None:
            features = _side(features, mirrored).astype(jnp.float32)
        return Batch(self.samples(key, rows.x), rows.y, features, images)

    def samples(self, key: PRNGKey, rows: Shaped[Array, "b ..."]) -> Images:
        """Samples [b, h, w, c] in float32.

        Args:
          key: of the mirroring and of the latents' draw.
          rows: [b, h, w, c] uint8 images, or [b, f, h, w, 2c] moments.
        """
        mirrored = self._mirrored(key, len(rows))
        if rows.ndim == 4:
            return _flipped(rows.astype(jnp.float32) / 127.5 - 1, mirrored)
        mean, std = jnp.split(_side(rows, mirrored).astype(jnp.float32), 2, axis=-1)
        for_latents = jax.random.split(key)[1]
        return self.scaling.apply(mean + std * jax.random.normal(for_latents, mean.shape))

    def _mirrored(self, key: PRNGKey, count: int) -> Bool[Array, "b"]:
        """Which of the rows are mirrored."""
        if not self.mirror:
            return jnp.zeros(count, bool)
        return jax.random.bernoulli(jax.random.split(key)[0], shape=(count,))


def _flipped(images: Shaped[Array, "b h w c"], mirrored: Bool[Array, "b"]) -> jax.Array:
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def _side(stored: Shaped[Array, "b f ..."], mirrored: Bool[Array, "b"]) -> jax.Array:
    """Of what is stored for an image and perhaps for its mirror image, that of the one seen."""
    if stored.shape[1] == 1:
        return stored[:, 0]
    # Indexed by an array, all of it would be gathered on every device.
    chosen = mirrored.reshape(-1, *(1,) * (stored.ndim - 2))
    return jnp.where(chosen, stored[:, 1], stored[:, 0])
