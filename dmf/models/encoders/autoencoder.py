"""What every autoencoder has in common: the protocol of those that make latents of images.

A new autoencoder is a frozen dataclass with these methods, registered under the kind "autoencoder"
in `dmf.models` or by a file that `--plugins` names; nothing else refers to its class. Everything
that stores, scales, samples or decodes latents is written against the protocol.
"""

import dataclasses
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from dmf.errors import InputError
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.types import Images, Params, PRNGKey

Latents = Float[Array, "b y x k"]
Network = TypeVar("Network")


class Moments(NamedTuple):
    """The normal distribution of the latents of images, independent in each value.

    Attributes:
      mean: [b, h / factor, w / factor, latent_channels] float32.
      std: standard deviation, of the same shape, >= 0.
    """

    mean: Latents
    std: Latents


@runtime_checkable
class Autoencoder(Protocol):
    """A frozen network from images to smaller latents and back.

    `dmf.models.AutoencoderKL` is one. An autoencoder that can compute in bfloat16 has a field
    `dtype`, see `with_dtype`.
    """

    @property
    def factor(self) -> int:
        """The ratio of an image's height and width to those of its latents."""
        ...

    @property
    def channels(self) -> int:
        """Channels of the images."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        ...

    @property
    def default_scaling(self) -> LatentScaling:
        """The published scaling of the latents, after which they have about unit variance."""
        ...

    def init(self, key: PRNGKey) -> Params:
        """Random parameters, float32."""
        ...

    def encode(self, params: Params, images: Images) -> Moments | Latents:
        """The latents of images, or their distribution.

        Args:
          params: parameters, as `init` returns them.
          images: [b, h, w, channels] in [-1, 1]; h and w are multiples of `factor`.
        """
        ...

    def decode(self, params: Params, latents: Latents) -> Images:
        """The images [b, h factor, w factor, channels] of latents, float32, not clipped.

        Args:
          params: parameters, as `init` returns them.
          latents: [b, h, w, latent_channels], unscaled, as `encode` returns them.
        """
        ...


def as_moments(encoded: Moments | Latents) -> Moments:
    """What `Autoencoder.encode` returns, as a distribution; latents alone have a std of 0."""
    if isinstance(encoded, Moments):
        return encoded
    return Moments(encoded, jnp.zeros_like(encoded))


def check_images(autoencoder: Autoencoder, images: Images) -> None:
    """Raises InputError where an autoencoder cannot encode images of this shape."""
    *_, height, width, channels = images.shape
    factor = autoencoder.factor
    if channels != autoencoder.channels or height % factor or width % factor:
        raise InputError(
            f"images have shape {images.shape}",
            remedy=f"give [b, h, w, {autoencoder.channels}], h and w multiples of {factor}",
        )


def check_latents(autoencoder: Autoencoder, latents: Latents) -> None:
    """Raises InputError where an autoencoder cannot decode latents of this shape."""
    if latents.shape[-1] != autoencoder.latent_channels:
        raise InputError(
            f"latents have shape {latents.shape}",
            remedy=f"give [b, h, w, {autoencoder.latent_channels}]",
        )


def with_dtype(network: Network, dtype: str) -> Network:
    """A frozen network that computes in another dtype.

    Args:
      network: a dataclass. One without a field `dtype` computes in float32 alone.
      dtype: "float32" or "bfloat16".

    Raises:
      InputError: the network cannot compute in that dtype.
    """
    if any(field.name == "dtype" for field in dataclasses.fields(network)):
        return dataclasses.replace(network, dtype=dtype)
    if dtype != "float32":
        raise InputError("dtype", dtype, f"{type(network).__name__} computes in float32 alone")
    return network
