"""TAESD (diffusers' AutoencoderTiny): a small convolutional autoencoder without a distribution.

It is distilled from a large autoencoder and encodes to the scaled latents of that one: the latents
of the released `taesd` are those of Stable Diffusion times 0.18215, so that either autoencoder
decodes the samples of a network that is trained on them. The release (MIT licence, no paper) is
github.com/madebyollin/taesd. The default fields are those of `taesd` and `taesdxl`; `taesd3` and
`taef1` have 16 latent channels.
"""

import dataclasses
import functools

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dmf.errors import check_at_least, check_valid
from dmf.models.encoders.autoencoder import EncoderDecoder, Latents
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.types import Images

# The decoder limits latents softly to this magnitude.
_LIMIT = 3.0

Maps = Float[Array, "b h w _"]

Convolution = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TAESD(EncoderDecoder):
    """A small convolutional autoencoder; images have one latent each, without a distribution.

    Attributes:
      channels: channels of the images, >= 1.
      latent_channels: channels of the latents, >= 1.
      width: channels of all layers between, >= 1.
      encoder_blocks: residual blocks of the levels of the encoder, finest first, each >= 0; each
        level halves the height and width of the one before.
      decoder_blocks: residual blocks of as many levels of the decoder, coarsest first.
      default_scaling: the published scaling of the latents, after which they have about unit
        variance; none for the released networks, whose latents are scaled.
      dtype: dtype of the computation, "float32" or "bfloat16"; parameters are always float32.
    """

    channels: int = 3
    latent_channels: int = 4
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    default_scaling: LatentScaling = LatentScaling()
    dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "width")
        for field in ("encoder_blocks", "decoder_blocks"):
            blocks = getattr(self, field)
            check_valid(self, blocks and min(blocks) >= 0, field,
                        "give a whole number >= 0 for each of at least one level")
        check_valid(self, len(self.decoder_blocks) == len(self.encoder_blocks), "decoder_blocks",
                    f"give as many levels as encoder_blocks={self.encoder_blocks}")

    @property
    def factor(self) -> int:
        """The ratio of an image's height and width to those of its latents."""
        return 2 ** (len(self.encoder_blocks) - 1)

    @property
    def decoder_reach(self) -> int:
        """How many latents to each side of a pixel the decoder depends on."""
        reach = 1  # of the last convolution, in pixels of the level
        for i, blocks in reversed(list(enumerate(self.decoder_blocks))):
            reach += 3 * blocks + 1
            reach = -(-reach // 2) if i else reach
        return reach

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """The encoder and the decoder."""
        return Encoder(self), Decoder(self)


class Block(nn.Module):
    """Three convolutions with ReLU between them, plus the input, and ReLU of the sum."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        y = x
        for i in range(3):
            y = nn.relu(y) if i else y
            y = Convolution(self.width, dtype=self.dtype, name=f"convolution_{i}")(y)
        return nn.relu(x + y)


class Encoder(nn.Module):
    """Images in [-1, 1] to latents; the layers see images in [0, 1]."""

    config: TAESD

    @nn.compact
    def __call__(self, images: Images) -> Latents:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        x = Convolution(config.width, dtype=dtype, name="in")((images + 1) / 2)
        for i, blocks in enumerate(config.encoder_blocks):
            if i:
                x = Convolution(config.width, strides=2, use_bias=False, dtype=dtype,
                                name=f"level_{i}_resize")(x)
            for j in range(blocks):
                x = Block(config.width, dtype, name=f"level_{i}_block_{j}")(x)
        return Convolution(config.latent_channels, dtype=dtype, name="out")(x)


class Decoder(nn.Module):
    """Latents to images; levels are numbered from the coarsest."""

    config: TAESD

    @nn.compact
    def __call__(self, latents: Latents) -> Images:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        x = jnp.tanh(latents / _LIMIT) * _LIMIT
        x = nn.relu(Convolution(config.width, dtype=dtype, name="in")(x))
        for i, blocks in enumerate(config.decoder_blocks):
            for j in range(blocks):
                x = Block(config.width, dtype, name=f"level_{i}_block_{j}")(x)
            if i + 1 < len(config.decoder_blocks):
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = Convolution(config.width, use_bias=False, dtype=dtype,
                                name=f"level_{i}_resize")(x)
        return 2 * Convolution(config.channels, dtype=dtype, name="out")(x) - 1
