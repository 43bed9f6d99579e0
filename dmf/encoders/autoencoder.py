"""The autoencoder of Stable Diffusion (AutoencoderKL): images to smaller latents, and back.

It is frozen here: latent diffusion is trained on what `encode` gives, and `decode` makes images of
what is sampled. From arXiv:2112.10752; the released weights are those of `sd-vae-ft-mse` and
`sd-vae-ft-ema`, which the default fields describe.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dmf.typing import Images, InputError, Params, PRNGKey

Latents = Float[Array, "b y x k"]
Maps = Float[Array, "b h w _"]

Convolution = functools.partial(nn.Conv, kernel_size=(3, 3))
# Two passes over the values, for their variance: mean(x^2) - mean(x)^2 loses the digits of maps
# whose mean is large. The statistics are float32 in every dtype of the computation.
GroupNorm = functools.partial(nn.GroupNorm, epsilon=1e-6, use_fast_variance=False)


class Moments(NamedTuple):
    """The normal distribution of the latents of images, independent in each value.

    Attributes:
      mean: [b, h / factor, w / factor, latent_channels] float32.
      std: of the same shape, positive.
    """

    mean: Latents
    std: Latents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """A convolutional autoencoder whose latents have a distribution.

    Attributes:
      channels: of the images.
      latent_channels: of the latents.
      widths: channels of the levels, finest first; each level halves the side of the one before.
      layers_per_block: residual blocks of a level of the encoder; the decoder has one more.
      groups: of the group normalisations.
      dtype: of the computation, "float32" or "bfloat16"; parameters are float32 always.
    """

    channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    groups: int = 32
    dtype: str = "float32"

    def __post_init__(self):
        check = _check_field
        for name in ("channels", "latent_channels", "layers_per_block", "groups"):
            check(getattr(self, name) >= 1, self, name, "give a whole number >= 1")
        check(len(self.widths) >= 1, self, "widths", "give the channels of at least one level")
        check(min(self.widths) >= 1, self, "widths", "give whole numbers >= 1")
        check(all(width % self.groups == 0 for width in self.widths), self, "groups",
              f"it must divide each of autoencoder.widths={self.widths}")
        check(self.dtype in ("float32", "bfloat16"), self, "dtype", "choose float32 or bfloat16")

    @property
    def factor(self) -> int:
        """How many times smaller the sides of latents are than those of their images."""
        return 2 ** (len(self.widths) - 1)

    def init(self, key: PRNGKey) -> Params:
        """Random parameters in float32: a nested dictionary, `encoder` and `decoder` apart."""
        for_encoder, for_decoder = jax.random.split(key)
        images = jnp.zeros((1, self.factor, self.factor, self.channels))
        latents = jnp.zeros((1, 1, 1, self.latent_channels))
        return {
            "encoder": Encoder(self).init(for_encoder, images)["params"],
            "decoder": Decoder(self).init(for_decoder, latents)["params"],
        }

    def encode(self, params: Params, images: Images) -> Moments:
        """The distribution of the latents of images.

        Args:
          params: as `init` gives them; only `encoder` is read.
          images: [b, h, w, channels] in [-1, 1]; h and w are multiples of `factor`.

        Raises:
          InputError: the images have other sides or channels.
        """
        *_, height, width, channels = images.shape
        if channels != self.channels or height % self.factor or width % self.factor:
            raise InputError(f"images have shape {images.shape}: give [b, h, w, {self.channels}], "
                             f"h and w multiples of {self.factor}")
        moments = Encoder(self).apply({"params": params["encoder"]}, images)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Moments(mean, jnp.exp(jnp.clip(log_variance, -30, 20) / 2))

    def decode(self, params: Params, latents: Latents) -> Images:
        """The images of latents: [b, h factor, w factor, channels] float32, not clipped.

        Args:
          params: as `init` gives them; only `decoder` is read.
          latents: [b, h, w, latent_channels], in the scale of `encode`.

        Raises:
          InputError: the latents have another number of channels.
        """
        if latents.shape[-1] != self.latent_channels:
            raise InputError(f"latents have shape {latents.shape}: give [b, h, w, "
                             f"{self.latent_channels}]")
        images = Decoder(self).apply({"params": params["decoder"]}, latents)
        return images.astype(jnp.float32)


def _check_field(good: bool, network: Autoencoder, field: str, remedy: str) -> None:
    if not good:
        raise InputError(f"autoencoder.{field}={getattr(network, field)}: {remedy}")


class Resnet(nn.Module):
    """Norm, SiLU, convolution, twice, and a skip (a 1x1 convolution where the width changes)."""

    width: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        y = x
        for i in range(2):
            y = nn.silu(GroupNorm(self.groups, dtype=self.dtype, name=f"norm_{i}")(y))
            y = Convolution(self.width, dtype=self.dtype, name=f"convolution_{i}")(y)
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), dtype=self.dtype, name="skip")(x)
        return x + y


class Attention(nn.Module):
    """Norm, self-attention of one head over all places, and a skip; the softmax is in float32."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        batch, height, width, channels = x.shape
        places = GroupNorm(self.groups, dtype=self.dtype, name="norm")(x)
        places = places.reshape(batch, height * width, channels)
        q, k, v = (
            nn.Dense(channels, dtype=self.dtype, name=name)(places)
            for name in ("query", "key", "value")
        )
        logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * channels**-0.5, axis=-1)
        out = jnp.einsum("bqk,bkc->bqc", weights.astype(v.dtype), v)
        return x + nn.Dense(channels, dtype=self.dtype, name="out")(out).reshape(x.shape)


class Middle(nn.Module):
    """Residual block, attention, residual block, all of the width of what comes in."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        width = x.shape[-1]
        x = Resnet(width, self.groups, self.dtype, name="resnet_0")(x)
        x = Attention(self.groups, self.dtype, name="attention")(x)
        return Resnet(width, self.groups, self.dtype, name="resnet_1")(x)


class Encoder(nn.Module):
    """Images to the mean and the log-variance of their latents, one after the other in channels."""

    config: Autoencoder

    @nn.compact
    def __call__(self, images: Images) -> Latents:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        last, outputs = len(config.widths) - 1, 2 * config.latent_channels
        x = Convolution(config.widths[0], dtype=dtype, name="in")(images)
        for i, width in enumerate(config.widths):
            for j in range(config.layers_per_block):
                x = Resnet(width, config.groups, dtype, name=f"level_{i}_resnet_{j}")(x)
            if i != last:
                # At the far ends alone: so the released weights were trained.
                x = Convolution(width, strides=2, padding=((0, 1), (0, 1)), dtype=dtype,
                                name=f"level_{i}_resize")(x)
        x = Middle(config.groups, dtype, name="middle")(x)
        x = nn.silu(GroupNorm(config.groups, dtype=dtype, name="norm")(x))
        x = Convolution(outputs, dtype=dtype, name="out")(x)
        return nn.Conv(outputs, (1, 1), dtype=dtype, name="moments")(x)


class Decoder(nn.Module):
    """Latents to images; its levels are numbered as it runs them, coarsest first."""

    config: Autoencoder

    @nn.compact
    def __call__(self, latents: Latents) -> Images:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        last, widths = len(config.widths) - 1, config.widths[::-1]
        x = nn.Conv(config.latent_channels, (1, 1), dtype=dtype, name="latents")(latents)
        x = Convolution(widths[0], dtype=dtype, name="in")(x)
        x = Middle(config.groups, dtype, name="middle")(x)
        for i, width in enumerate(widths):
            for j in range(config.layers_per_block + 1):
                x = Resnet(width, config.groups, dtype, name=f"level_{i}_resnet_{j}")(x)
            if i != last:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = Convolution(width, dtype=dtype, name=f"level_{i}_resize")(x)
        x = nn.silu(GroupNorm(config.groups, dtype=dtype, name="norm")(x))
        return Convolution(config.channels, dtype=dtype, name="out")(x)
