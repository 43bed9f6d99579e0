"""What every autoencoder has in common: the protocol of those that make latents of images.

A new autoencoder is a frozen dataclass with these methods, registered under the kind "autoencoder"
in `dmf.models` or by a file that `--plugins` names; nothing else refers to its class. Everything
that stores, scales, samples or decodes latents is written against the protocol. `EncoderDecoder`
has the methods of those that are two Flax networks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dmf.errors import InputError, check_at_least, check_choice, check_valid
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.types import COMPUTE_DTYPES, Images, Params, PRNGKey

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


class EncoderDecoder:
    """The methods of an autoencoder that is two Flax networks, an encoder and a decoder.

    A class that is derived from it is a dataclass with the fields of `Autoencoder` and `dtype`. It
    has `factor`, and `networks`, which makes the two networks.
    """

    # Height and width of the latents, where the networks take no other ones.
    side: int | None = None

    def __post_init__(self):
        check_at_least(self, 1, "channels", "latent_channels")
        check_valid(self, len(self.default_scaling.mean) in (0, self.latent_channels),
                    "default_scaling",
                    f"give a mean and a std for each of latent_channels={self.latent_channels}")
        check_choice(self, "dtype", COMPUTE_DTYPES)

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """The encoder, from images to latents or `Moments`, and the decoder, from latents to
        images."""
        raise NotImplementedError(f"{type(self).__name__} needs its networks")

    def init(self, key: PRNGKey) -> Params:
        """Random parameters, float32: {"encoder": ..., "decoder": ...}."""
        encoder, decoder = self.networks()
        encoder_key, decoder_key = jax.random.split(key)
        side = self.side or 1
        pixels = side * self.factor
        images = jnp.zeros((1, pixels, pixels, self.channels))
        latents = jnp.zeros((1, side, side, self.latent_channels))
        return {
            "encoder": encoder.init(encoder_key, images)["params"],
            "decoder": decoder.init(decoder_key, latents)["params"],
        }

    def encode(self, params: Params, images: Images) -> Moments | Latents:
        """The latents of images, or their distribution: [b, h / factor, w / factor,
        latent_channels] float32.

        Args:
          params: parameters, as `init` returns them; only `encoder` is read.
          images: [b, h, w, channels] in [-1, 1]; h and w are multiples of `factor`.

        Raises:
          InputError: the images do not have such a shape.
        """
        check_images(self, images)
        self._check_side("images", images.shape, self.factor)
        encoder, _ = self.networks()
        encoded = encoder.apply({"params": params["encoder"]}, images)
        return jax.tree.map(lambda x: x.astype(jnp.float32), encoded)

    def decode(self, params: Params, latents: Latents) -> Images:
        """The images of latents: [b, h factor, w factor, channels] float32, not clipped.

        Args:
          params: parameters, as `init` returns them.
          latents: [b, h, w, latent_channels], unscaled, as `encode` returns them.

        Raises:
          InputError: the latents do not have such a shape.
        """
        self.check_latents(latents)
        _, decoder = self.networks()
        return decoder.apply({"params": params["decoder"]}, latents).astype(jnp.float32)

    def check_latents(self, latents: Latents) -> None:
        """Raises InputError where this autoencoder cannot decode latents of this shape."""
        check_latents(self, latents)
        self._check_side("latents", latents.shape, 1)

    def _check_side(self, name: str, shape: Sequence[Any], factor: int) -> None:
        """Raises InputError where arrays [b, h, w, c] have another size than the networks take."""
        if self.side and shape[1:3] != (self.side * factor,) * 2:
            raise InputError(f"{name} have shape {shape}",
                             remedy=f"this {type(self).__name__} takes {self.side * factor} x "
                             f"{self.side * factor} alone")


def as_moments(encoded: Moments | Latents) -> Moments:
    """What `Autoencoder.encode` returns, as a distribution; latents alone have a std of 0."""
    if isinstance(encoded, Moments):
        return encoded
    return Moments(encoded, jnp.zeros_like(encoded))


def latent_side(autoencoder: Autoencoder) -> int | None:
    """Height and width of the latents, where an autoencoder takes no others; None for any."""
    return getattr(autoencoder, "side", None)


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
