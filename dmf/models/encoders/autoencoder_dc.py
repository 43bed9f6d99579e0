"""The deep compression autoencoder DC-AE (diffusers' AutoencoderDC), without a distribution.

Its levels of residual blocks and of linear attention reduce images 32 or 64 times in height and
width. From arXiv:2410.10733; the default fields are those of the released `f32c32` of SANA
(arXiv:2410.10629). The releases for ImageNet have `batch_norm`, `downsample="unshuffle"`,
`upsample="shuffle"`, no `attention_scales` and no layers at the first level; those of f64c128 have
a level more.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dmf.errors import check_at_least, check_choice, check_valid
from dmf.models.encoders.autoencoder import EncoderDecoder, Latents
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.types import Images

# Published scale of the latents of SANA, after which they have about unit variance.
SANA_SCALE = 0.41407

Maps = Float[Array, "b _ _ _"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderDC(EncoderDecoder):
    """A convolutional autoencoder with linear attention; images have one latent each.

    Attributes:
      channels: channels of the images, >= 1.
      latent_channels: channels of the latents; it must divide the last of `widths`.
      widths: channels of the resolution levels, finest first; each level halves the height and
        width of the one before. A level without layers does not use its width.
      encoder_layers: blocks of each level of the encoder, >= 1; 0 for the first level makes the
        first convolution halve the resolution.
      decoder_layers: the same of the decoder, also finest first.
      attention_from: the first level whose blocks have attention, from 0; the levels before have
        residual blocks.
      attention_scales: kernel sizes, odd, of the convolutions whose outputs attention takes beside
        its queries, keys and values.
      head_dim: channels of a head of the attention; it must divide the widths of its levels.
      batch_norm: whether residual blocks of the decoder have BatchNorm and ReLU; RMSNorm and SiLU
        otherwise.
      downsample: "conv" for strided convolutions, "unshuffle" for convolutions whose pixels become
        channels.
      upsample: "interpolate" for convolutions after repeating pixels, "shuffle" for convolutions
        whose channels become pixels.
      default_scaling: the published scaling of the latents, after which they have about unit
        variance.
      dtype: dtype of the computation, "float32" or "bfloat16"; parameters are always float32.
    """

    channels: int = 3
    latent_channels: int = 32
    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    attention_from: int = 3
    attention_scales: tuple[int, ...] = (5,)
    head_dim: int = 32
    batch_norm: bool = False
    downsample: str = "conv"
    upsample: str = "interpolate"
    default_scaling: LatentScaling = LatentScaling(scale=SANA_SCALE)
    dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "head_dim")
        check_at_least(self, 0, "attention_from")
        widths, levels = self.widths, len(self.widths)
        check_valid(self, levels >= 2 and min(widths) >= 1, "widths",
                    "give a whole number >= 1 for each of at least two levels")
        for field in ("encoder_layers", "decoder_layers"):
            layers = getattr(self, field)
            check_valid(self, len(layers) == levels and min(layers[1:]) >= 1 and layers[0] >= 0,
                        field, f"give a whole number >= 1 for each of widths={widths}, the first "
                        ">= 0")
        check_valid(self, widths[-1] % self.latent_channels == 0, "latent_channels",
                    f"it must divide the last of widths={widths}")
        check_valid(self, all(4 * a % b == 0 for a, b in itertools.pairwise(widths)),
                    "widths", "each must divide 4 times the one before")
        check_valid(self, all(w % self.head_dim == 0 for w in widths[self.attention_from:]),
                    "head_dim", f"it must divide widths={widths} from attention_from on")
        check_valid(self, all(size > 0 and size % 2 for size in self.attention_scales),
                    "attention_scales", "give odd whole numbers >= 1")
        check_choice(self, "downsample", ("conv", "unshuffle"))
        check_valid(self, self.downsample == "conv" or all(w % 4 == 0 for w in widths[1:]),
                    "downsample", f"4 must divide each of widths={widths}")
        check_choice(self, "upsample", ("interpolate", "shuffle"))

    @property
    def factor(self) -> int:
        """The ratio of an image's height and width to those of its latents."""
        return 2 ** (len(self.widths) - 1)

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """The encoder and the decoder."""
        return Encoder(self), Decoder(self)


def pixels_to_channels(x: Maps) -> Maps:
    """Blocks of 2 x 2 pixels as channels: the channel, then the row, then the column."""
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return blocks.reshape(b, h // 2, w // 2, 4 * c)


def channels_to_pixels(x: Maps) -> Maps:
    """The inverse of `pixels_to_channels`."""
    b, h, w, c = x.shape
    blocks = x.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return blocks.reshape(b, 2 * h, 2 * w, c // 4)


def mean_of_groups(x: Maps, count: int) -> Maps:
    """The means of `count` groups of neighbouring channels."""
    return jnp.mean(x.reshape(*x.shape[:-1], count, -1), axis=-1)


class RMSNorm(nn.Module):
    """Root mean square normalisation over channels, with scale and bias; float32 inside."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])[None, None, None]
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])[None, None, None]
        x = x.astype(jnp.float32)
        y = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)
        return (y * scale + bias).astype(self.dtype)


class BatchNorm(nn.Module):
    """Normalisation with the stored statistics of a training; float32 inside."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        mean, bias, var, scale = (
            self.param(name, initial, x.shape[-1:])[None, None, None]
            for name, initial in (("mean", zeros), ("bias", zeros), ("var", ones), ("scale", ones))
        )
        y = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(var + 1e-5)
        return (y * scale + bias).astype(self.dtype)


class ResidualBlock(nn.Module):
    """Two convolutions with an activation between them, norm, plus the input."""

    width: int
    batch_norm: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        norm, activation = (BatchNorm, nn.relu) if self.batch_norm else (RMSNorm, nn.silu)
        y = nn.Conv(self.width, (3, 3), dtype=self.dtype, name="convolution_0")(x)
        y = nn.Conv(self.width, (3, 3), use_bias=False, dtype=self.dtype, name="convolution_1")(
            activation(y))
        return x + norm(self.dtype, name="norm")(y)


class LinearAttention(nn.Module):
    """Attention whose weights are products of ReLU of queries and keys, plus the input.

    The channels of queries, keys and values, of each scale one after the other, are cut into heads
    of 3 head_dim channels, as in the released networks: a head has its queries, keys and values
    there. Sums over pixels are float32.
    """

    config: AutoencoderDC

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        b, h, w, width = x.shape
        dim, dtype = self.config.head_dim, jnp.dtype(self.config.dtype)
        qkv = jnp.concatenate([
            nn.Dense(width, use_bias=False, dtype=dtype, name=name)(x)
            for name in ("query", "key", "value")
        ], axis=-1)  # fmt: skip
        scales = [qkv]
        for i, size in enumerate(self.config.attention_scales):
            y = nn.Conv(3 * width, (size, size), feature_group_count=3 * width, use_bias=False,
                        dtype=dtype, name=f"scale_{i}_pixels")(qkv)
            scales.append(nn.Conv(3 * width, (1, 1), feature_group_count=3 * width // dim,
                                  use_bias=False, dtype=dtype, name=f"scale_{i}_channels")(y))
        heads = jnp.concatenate(scales, axis=-1).astype(jnp.float32).reshape(b, h * w, -1, 3, dim)
        q, k, v = nn.relu(heads[..., 0, :]), nn.relu(heads[..., 1, :]), heads[..., 2, :]
        sums = jnp.einsum("bngd,bnge->bgde", k, v)
        weights = jnp.einsum("bngd,bgd->bng", q, jnp.sum(k, axis=1))
        out = jnp.einsum("bngd,bgde->bnge", q, sums) / (weights[..., None] + 1e-15)
        out = out.reshape(b, h, w, -1).astype(dtype)
        out = nn.Dense(width, use_bias=False, dtype=dtype, name="out")(out)
        return x + RMSNorm(dtype, name="norm")(out)


class GatedConvolution(nn.Module):
    """A 3 x 3 convolution of each of 8 times the channels, half of them gates, plus the input."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        width = x.shape[-1]
        y = nn.silu(nn.Conv(8 * width, (1, 1), dtype=self.dtype, name="in")(x))
        y = nn.Conv(8 * width, (3, 3), feature_group_count=8 * width, dtype=self.dtype,
                    name="pixels")(y)
        y, gates = jnp.split(y, 2, axis=-1)
        y = nn.Conv(width, (1, 1), use_bias=False, dtype=self.dtype, name="out")(y * nn.silu(gates))
        return x + RMSNorm(self.dtype, name="norm")(y)


class AttentionBlock(nn.Module):
    """Linear attention and a gated convolution."""

    config: AutoencoderDC

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        x = LinearAttention(self.config, name="attention")(x)
        return GatedConvolution(jnp.dtype(self.config.dtype), name="gated")(x)


def block(config: AutoencoderDC, level: int, name: str, *, batch_norm: bool = False) -> nn.Module:
    """A block of a level."""
    if level >= config.attention_from:
        return AttentionBlock(config, name=name)
    return ResidualBlock(config.widths[level], batch_norm, jnp.dtype(config.dtype), name=name)


class Downsample(nn.Module):
    """Half the resolution by a convolution; `shortcut` adds means of the pixels' channels."""

    width: int
    config: AutoencoderDC
    shortcut: bool = True

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        dtype = jnp.dtype(self.config.dtype)
        if self.config.downsample == "conv":
            y = nn.Conv(self.width, (3, 3), strides=2, padding=1, dtype=dtype, name="conv")(x)
        else:
            y = pixels_to_channels(nn.Conv(self.width // 4, (3, 3), dtype=dtype, name="conv")(x))
        return y + mean_of_groups(pixels_to_channels(x), self.width) if self.shortcut else y


class Upsample(nn.Module):
    """Twice the resolution by a convolution; `shortcut` adds repeated channels as pixels."""

    width: int
    config: AutoencoderDC
    shortcut: bool = True

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        dtype = jnp.dtype(self.config.dtype)
        if self.config.upsample == "interpolate":
            y = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            y = nn.Conv(self.width, (3, 3), dtype=dtype, name="conv")(y)
        else:
            y = channels_to_pixels(nn.Conv(4 * self.width, (3, 3), dtype=dtype, name="conv")(x))
        if not self.shortcut:
            return y
        return y + channels_to_pixels(jnp.repeat(x, 4 * self.width // x.shape[-1], axis=-1))


class Encoder(nn.Module):
    """Images to latents."""

    config: AutoencoderDC

    @nn.compact
    def __call__(self, images: Images) -> Latents:
        config, dtype, widths = self.config, jnp.dtype(self.config.dtype), self.config.widths
        if config.encoder_layers[0]:
            x = nn.Conv(widths[0], (3, 3), dtype=dtype, name="in")(images)
        else:
            x = Downsample(widths[1], config, shortcut=False, name="in")(images)
        for i, layers in enumerate(config.encoder_layers):
            for j in range(layers):
                x = block(config, i, f"level_{i}_block_{j}")(x)
            if layers and i + 1 < len(widths):
                x = Downsample(widths[i + 1], config, name=f"level_{i}_resize")(x)
        out = nn.Conv(config.latent_channels, (3, 3), dtype=dtype, name="out")(x)
        return out + mean_of_groups(x, config.latent_channels)


class Decoder(nn.Module):
    """Latents to images; levels are numbered from the finest."""

    config: AutoencoderDC

    @nn.compact
    def __call__(self, latents: Latents) -> Images:
        config, dtype, widths = self.config, jnp.dtype(self.config.dtype), self.config.widths
        x = nn.Conv(widths[-1], (3, 3), dtype=dtype, name="in")(latents)
        x = x + jnp.repeat(latents.astype(dtype), widths[-1] // config.latent_channels, axis=-1)
        for i, layers in reversed(list(enumerate(config.decoder_layers))):
            if layers and i + 1 < len(widths):
                x = Upsample(widths[i], config, name=f"level_{i}_resize")(x)
            for j in range(layers):
                x = block(config, i, f"level_{i}_block_{j}", batch_norm=config.batch_norm)(x)
        x = nn.relu(RMSNorm(dtype, name="norm")(x))
        if config.decoder_layers[0]:
            return nn.Conv(config.channels, (3, 3), dtype=dtype, name="out")(x)
        return Upsample(config.channels, config, shortcut=False, name="out")(x)
