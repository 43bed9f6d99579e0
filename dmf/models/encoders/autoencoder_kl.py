"""The autoencoder of Stable Diffusion (diffusers' AutoencoderKL): images to latents and back.

It is frozen here: latent diffusion is trained on the latents that `encode` returns, and `decode`
turns samples into images. From arXiv:2112.10752; the default fields are those of the released
`sd-vae-ft-mse` and `sd-vae-ft-ema`. The autoencoder of SDXL has another scale of the latents,
0.13025. Those of Stable Diffusion 3 (arXiv:2403.03206) and FLUX have 16 latent channels, a shift of
the latents, and no quant convolutions. VA-VAE (arXiv:2501.01423) has 32 latent channels, a factor
of 16, and attention at the coarsest level.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dmf.errors import check_at_least, check_valid
from dmf.models.encoders.autoencoder import EncoderDecoder, Latents, Moments
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.types import Images

# Published scale of the four-channel latents, after which they have about unit variance.
STABLE_DIFFUSION_SCALE = 0.18215

Maps = Float[Array, "b h w _"]

Convolution = functools.partial(nn.Conv, kernel_size=(3, 3))
# The variance is computed in two passes, as mean(x^2) - mean(x)^2 loses digits where the mean is
# large. The statistics are float32 in every dtype of the computation.
GroupNorm = functools.partial(nn.GroupNorm, epsilon=1e-6, use_fast_variance=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderKL(EncoderDecoder):
    """A convolutional autoencoder whose encoder returns the distribution of the latents.

    Attributes:
      channels: channels of the images, >= 1.
      latent_channels: channels of the latents, >= 1.
      widths: channels of the resolution levels, finest first; each level halves the height and
        width of the one before.
      layers_per_block: residual blocks of each level of the encoder, >= 1; the decoder has one
        more.
      groups: groups of the group normalisations; it must divide each of `widths`.
      quant_conv: whether a 1 x 1 convolution is the last layer of the encoder.
      post_quant_conv: whether a 1 x 1 convolution is the first layer of the decoder.
      encoder_attention: levels of the encoder whose residual blocks are each followed by attention,
        as indices into `widths`.
      decoder_attention: the same for the decoder, also as indices into `widths`.
      default_scaling: the published scaling of the latents, after which they have about unit
        variance; by channel, it has as many values as latent channels.
      dtype: dtype of the computation, "float32" or "bfloat16"; parameters are always float32.
    """

    channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    groups: int = 32
    quant_conv: bool = True
    post_quant_conv: bool = True
    encoder_attention: tuple[int, ...] = ()
    decoder_attention: tuple[int, ...] = ()
    default_scaling: LatentScaling = LatentScaling(scale=STABLE_DIFFUSION_SCALE)
    dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "layers_per_block", "groups")
        check_valid(self, self.widths and min(self.widths) >= 1, "widths",
                    "give a whole number >= 1 for each of at least one level")
        check_valid(self, all(width % self.groups == 0 for width in self.widths), "groups",
                    f"it must divide each of widths={self.widths}")
        for field in ("encoder_attention", "decoder_attention"):
            check_valid(self, set(getattr(self, field)) <= set(range(len(self.widths))), field,
                        f"give indices of levels, from 0 to {len(self.widths) - 1}")

    @property
    def factor(self) -> int:
        """The ratio of an image's height and width to those of its latents."""
        return 2 ** (len(self.widths) - 1)

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """The encoder and the decoder."""
        return Encoder(self), Decoder(self)


class Resnet(nn.Module):
    """Twice norm, SiLU and convolution, plus a skip connection (1 x 1 where the width changes)."""

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
    """Norm and self-attention of one head over all pixels, plus a skip connection.

    The softmax is in float32.
    """

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        batch, height, width, channels = x.shape
        pixels = GroupNorm(self.groups, dtype=self.dtype, name="norm")(x)
        pixels = pixels.reshape(batch, height * width, channels)
        q, k, v = (
            nn.Dense(channels, dtype=self.dtype, name=name)(pixels)
            for name in ("query", "key", "value")
        )
        logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * channels**-0.5, axis=-1)
        out = jnp.einsum("bqk,bkc->bqc", weights.astype(v.dtype), v)
        return x + nn.Dense(channels, dtype=self.dtype, name="out")(out).reshape(x.shape)


class Middle(nn.Module):
    """Residual block, attention, residual block, all of the input's width."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        width = x.shape[-1]
        x = Resnet(width, self.groups, self.dtype, name="resnet_0")(x)
        x = Attention(self.groups, self.dtype, name="attention")(x)
        return Resnet(width, self.groups, self.dtype, name="resnet_1")(x)


class Encoder(nn.Module):
    """Images to the distribution of their latents; the last layer gives means and log-variances."""

    config: AutoencoderKL

    @nn.compact
    def __call__(self, images: Images) -> Moments:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        last, outputs = len(config.widths) - 1, 2 * config.latent_channels
        x = Convolution(config.widths[0], dtype=dtype, name="in")(images)
        for i, width in enumerate(config.widths):
            for j in range(config.layers_per_block):
                x = Resnet(width, config.groups, dtype, name=f"level_{i}_resnet_{j}")(x)
                if i in config.encoder_attention:
                    x = Attention(config.groups, dtype, name=f"level_{i}_attention_{j}")(x)
            if i != last:
                # Padding at the bottom and right alone, as in the training of the released weights.
                x = Convolution(width, strides=2, padding=((0, 1), (0, 1)), dtype=dtype,
                                name=f"level_{i}_resize")(x)
        x = Middle(config.groups, dtype, name="middle")(x)
        x = nn.silu(GroupNorm(config.groups, dtype=dtype, name="norm")(x))
        x = Convolution(outputs, dtype=dtype, name="out")(x)
        x = nn.Conv(outputs, (1, 1), dtype=dtype, name="moments")(x) if config.quant_conv else x
        mean, log_variance = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return Moments(mean, jnp.exp(jnp.clip(log_variance, -30, 20) / 2))


class Decoder(nn.Module):
    """Latents to images; levels are numbered from the coarsest."""

    config: AutoencoderKL

    @nn.compact
    def __call__(self, latents: Latents) -> Images:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        last, widths = len(config.widths) - 1, config.widths[::-1]
        x = latents
        if config.post_quant_conv:
            x = nn.Conv(config.latent_channels, (1, 1), dtype=dtype, name="latents")(x)
        x = Convolution(widths[0], dtype=dtype, name="in")(x)
        x = Middle(config.groups, dtype, name="middle")(x)
        for i, width in enumerate(widths):
            for j in range(config.layers_per_block + 1):
                x = Resnet(width, config.groups, dtype, name=f"level_{i}_resnet_{j}")(x)
                if last - i in config.decoder_attention:
                    x = Attention(config.groups, dtype, name=f"level_{i}_attention_{j}")(x)
            if i != last:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = Convolution(width, dtype=dtype, name=f"level_{i}_resize")(x)
        x = nn.silu(GroupNorm(config.groups, dtype=dtype, name="norm")(x))
        return Convolution(config.channels, dtype=dtype, name="out")(x)
