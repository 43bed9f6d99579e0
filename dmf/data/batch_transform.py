"""From the batches of a data loader to samples of the network, on the device.

A stored sample is an image, uint8 [h, w, c], or the moments of latents, [f, h, w, 2c] in half or
single precision: the mean, then the standard deviation. f is 1, or 2 where the moments of the
mirror image follow. (They are not the mirrored moments: an autoencoder does not treat left and
right alike.)

For representation alignment, a batch also holds the images that latents were encoded from, uint8
[h, w, c], or patch features of a frozen encoder, [f, n, d]. One draw decides whether all that
belongs to a sample is mirrored.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from dmf.data.pixels import from_uint8
from dmf.errors import InputError
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.types import Batch, Images, PRNGKey


def sample_shape(stored_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape of a sample of the network.

    >>> sample_shape((2, 32, 32, 8))
    (32, 32, 4)

    Args:
      stored_shape: (h, w, c) of a stored image, or (f, h, w, 2c) of stored moments.

    Returns:
      (h, w, c).
    """
    if len(stored_shape) == 3:
        return stored_shape
    _, height, width, moments = stored_shape
    return height, width, moments // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchTransform:
    """Turns stored samples into samples of the network, with new draws each time.

    Attributes:
      scaling: scaling of latents; the pixels of images are always in [-1, 1].
      mirror: whether each sample is mirrored with probability 1/2.
    """

    scaling: LatentScaling
    mirror: bool = False

    def check(self, stored_shape: tuple[int, ...]) -> None:
        """Checks that stored samples can be mirrored.

        Args:
          stored_shape: (h, w, c) of a stored image, or (f, h, w, 2c) of stored moments.

        Raises:
          InputError: they cannot, though `mirror` is set.
        """
        if self.mirror and len(stored_shape) == 4 and stored_shape[0] != 2:
            raise InputError(
                "mirror", "True",
                "the dataset has no moments of mirror images; prepare it with them, or set "
                "data.mirror to False",
            )

    def batch(self, key: PRNGKey, stored: Batch) -> Batch:
        """A training batch, in which images or features are mirrored as their samples are.

        Args:
          key: random key of the mirroring and of the draw of latents.
          stored: a batch of `dmf.data.data_loader`: `x` as `samples` takes it, `images`
            [b, h, w, c] uint8 or None, and `features` [b, f, n, d] or None.

        Returns:
          The batch: `x` [b, h, w, c] and `features` [b, n, d] in float32, `images` in uint8.
        """
        mirrored = self._mirrored(key, len(stored.x))
        images, features = stored.images, stored.features
        if images is not None:
            images = _flip(images, mirrored)
        if features is not None:
            features = _select_view(features, mirrored).astype(jnp.float32)
        return Batch(self.samples(key, stored.x), stored.y, features, images)

    def samples(self, key: PRNGKey, stored: Shaped[Array, "b ..."]) -> Images:
        """Samples of the network, [b, h, w, c] float32.

        Args:
          key: random key of the mirroring and of the draw of latents.
          stored: [b, h, w, c] uint8 images, or [b, f, h, w, 2c] moments.
        """
        mirrored = self._mirrored(key, len(stored))
        if stored.ndim == 4:
            return _flip(from_uint8(stored), mirrored)
        mean, std = jnp.split(_select_view(stored, mirrored).astype(jnp.float32), 2, axis=-1)
        noise_key = jax.random.split(key)[1]
        return self.scaling.apply(mean + std * jax.random.normal(noise_key, mean.shape))

    def _mirrored(self, key: PRNGKey, count: int) -> Bool[Array, "b"]:
        """Which samples are mirrored."""
        if not self.mirror:
            return jnp.zeros(count, bool)
        return jax.random.bernoulli(jax.random.split(key)[0], shape=(count,))


def _flip(images: Shaped[Array, "b h w c"], mirrored: Bool[Array, "b"]) -> jax.Array:
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def _select_view(stored: Shaped[Array, "b f ..."], mirrored: Bool[Array, "b"]) -> jax.Array:
    """What is stored for the image, or for its mirror image where the sample is mirrored."""
    if stored.shape[1] == 1:
        return stored[:, 0]
    # Indexing by an array would gather the whole batch on every device.
    mirrored = mirrored.reshape(-1, *(1,) * (stored.ndim - 2))
    return jnp.where(mirrored, stored[:, 1], stored[:, 0])
