"""The representation autoencoder RAE: a frozen DINOv2 with registers, and a decoder to pixels.

From arXiv:2510.11690. Latents are the patch tokens of the DINOv2, normalised by a mean and a
standard deviation of each value; a vision transformer with the blocks of a masked autoencoder
(arXiv:2111.06377) makes pixels of them. The default fields are those of the release with DINOv2-B
and the decoder ViT-XL for images of 256 x 256. The noise that latents had in the training of the
decoder is left out.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float

from dmf.errors import check_at_least, check_valid
from dmf.models.encoders import dinov2
from dmf.models.encoders.autoencoder import EncoderDecoder, Latents
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.models.layers import position_table, unpatchify
from dmf.models.parameters import parameter, stacked_parameters
from dmf.types import Features, Images, Params, PRNGKey

_normal = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RAE(EncoderDecoder):
    """A frozen DINOv2 with registers and a decoder of its tokens; images have one latent each.

    Attributes:
      latent_channels: channels of the latents, the width of the DINOv2.
      side: height and width of the latents; the network takes images of no other size.
      patch_size: height and width of the pixels of a latent, >= 1.
      encoder_depth: transformer blocks of the DINOv2, >= 1.
      encoder_heads: attention heads of the DINOv2; it must divide `latent_channels`.
      encoder_patch_size: patch size of the DINOv2, to which images are resized, >= 1.
      encoder_table_side: rows and columns of its position table, >= 1.
      registers: register tokens of the DINOv2, >= 0.
      decoder_width: width of the decoder, a multiple of 4.
      decoder_depth: transformer blocks of the decoder, >= 1.
      decoder_heads: attention heads of the decoder; it must divide `decoder_width`.
      decoder_hidden: hidden width of the MLPs of the decoder, >= 1.
      stored_mean: whether a stored mean of each latent value is subtracted.
      stored_std: whether latents are divided by a stored standard deviation of each value.
      default_scaling: a scaling of the latents beside that normalisation; the release has none.
      dtype: dtype of the computation, "float32" or "bfloat16"; parameters are always float32.
    """

    latent_channels: int = 768
    side: int = 16
    patch_size: int = 16
    encoder_depth: int = 12
    encoder_heads: int = 12
    encoder_patch_size: int = 14
    encoder_table_side: int = 37
    registers: int = 4
    decoder_width: int = 1152
    decoder_depth: int = 28
    decoder_heads: int = 16
    decoder_hidden: int = 4096
    stored_mean: bool = False
    stored_std: bool = True
    default_scaling: LatentScaling = LatentScaling()
    dtype: str = "float32"

    # DINOv2 takes RGB images.
    channels = 3

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "side", "patch_size", "encoder_depth", "encoder_heads",
                       "encoder_patch_size", "encoder_table_side", "decoder_width",
                       "decoder_depth", "decoder_heads", "decoder_hidden")
        check_at_least(self, 0, "registers")
        for heads, width in (("encoder_heads", "latent_channels"),
                             ("decoder_heads", "decoder_width")):
            check_valid(self, getattr(self, width) % getattr(self, heads) == 0, heads,
                        f"it must divide {width}={getattr(self, width)}")
        check_valid(self, self.decoder_width % 4 == 0, "decoder_width", "give a multiple of 4")

    @property
    def factor(self) -> int:
        """The ratio of an image's height and width to those of its latents."""
        return self.patch_size

    @property
    def vision_transformer(self) -> dinov2.DinoV2:
        """The DINOv2 of the encoder."""
        return dinov2.DinoV2(
            width=self.latent_channels, depth=self.encoder_depth, heads=self.encoder_heads,
            patch_size=self.encoder_patch_size, table_side=self.encoder_table_side,
            registers=self.registers, dtype=self.dtype,
        )  # fmt: skip

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """The encoder and the decoder."""
        return Encoder(self), Decoder(self)

    def decode(self, params: Params, latents: Latents) -> Images:
        """The images of latents: [b, side factor, side factor, 3] float32, not clipped.

        Args:
          params: parameters, as `init` returns them; the normalisation is that of `encoder`.
          latents: [b, side, side, latent_channels], as `encode` returns them.

        Raises:
          InputError: the latents do not have such a shape.
        """
        self.check_latents(latents)
        if self.stored_std:
            latents = latents * params["encoder"]["std"][None]
        if self.stored_mean:
            latents = latents + params["encoder"]["mean"][None]
        return super().decode(params, latents)

    def positions(self) -> Float[np.ndarray, "tokens width"]:
        """[1 + side * side, decoder_width] float32: the positions of the decoder's tokens, sines
        and cosines; that of the class token is zero."""
        table = position_table(self.side, self.decoder_width)
        return np.concatenate([np.zeros_like(table[:1]), table])


class Encoder(nn.Module):
    """Images to the normalised patch tokens of a DINOv2, whose last norm has no scale and bias."""

    config: RAE

    @nn.compact
    def __call__(self, images: Images) -> Latents:
        config = self.config
        side, width = config.side, config.latent_channels
        mean, std = (jnp.asarray(x, jnp.float32)[None, None, None]
                     for x in (dinov2.IMAGENET_MEAN, dinov2.IMAGENET_STD))
        resized = dinov2.resize_bicubic((images + 1) / 2, side * config.encoder_patch_size)
        network = dinov2.Transformer(config.vision_transformer, affine=False, name="dinov2")
        # The statistics are of float32 matmuls, which accelerators do not use by default.
        with jax.default_matmul_precision("highest"):
            tokens = network((resized - mean) / std)
        latents, shape = tokens[:, 1:].reshape(-1, side, side, width), (side, side, width)
        if config.stored_mean:
            latents -= parameter(self, "mean", nn.initializers.zeros, shape)[None]
        if config.stored_std:
            latents /= parameter(self, "std", nn.initializers.ones, shape)[None]
        return latents


class Decoder(nn.Module):
    """Patch tokens that are not normalised to images, through the blocks of a transformer."""

    config: RAE

    @nn.compact
    def __call__(self, latents: Latents) -> Images:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        b, width = latents.shape[0], config.decoder_width
        x = nn.Dense(width, dtype=dtype, name="in")(latents.reshape(b, -1, latents.shape[-1]))
        class_token = parameter(self, "class_token", _normal, (1, width)).astype(dtype)
        x = jnp.concatenate([jnp.broadcast_to(class_token[None], (b, 1, width)), x], axis=1)
        x += jnp.asarray(config.positions(), dtype)[None]
        blocks = stacked_parameters(self, "blocks", self._init_blocks, config.decoder_depth)
        block = DecoderBlock(config, parent=None)
        x, _ = jax.lax.scan(lambda x, params: (block.apply({"params": params}, x), None), x, blocks)
        x = _norm(dtype, "norm")(x)[:, 1:]
        pixels = nn.Dense(config.patch_size**2 * config.channels, dtype=dtype, name="out")(x)
        mean, std = (jnp.asarray(x, jnp.float32) for x in (dinov2.IMAGENET_MEAN,
                                                            dinov2.IMAGENET_STD))
        images = unpatchify(pixels.astype(jnp.float32), config.patch_size)
        return 2 * (images * std[None, None, None] + mean[None, None, None]) - 1

    def _init_blocks(self, key: PRNGKey) -> Params:
        """Parameters of all blocks, each leaf stacked on a leading depth axis."""
        block = DecoderBlock(self.config, parent=None)
        tokens = jnp.zeros((1, 1, self.config.decoder_width))
        return jax.vmap(lambda key: block.init(key, tokens)["params"])(
            jax.random.split(key, self.config.decoder_depth)
        )


class DecoderBlock(nn.Module):
    """A pre-norm transformer block."""

    config: RAE

    @nn.compact
    def __call__(self, x: Features) -> Features:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        attention = dinov2.Attention(config.decoder_heads, dtype, name="attention")
        mlp = dinov2.MLP(config.decoder_hidden, dtype, name="mlp")
        for i, layer in enumerate((attention, mlp), 1):
            x += layer(_norm(dtype, f"norm_{i}")(x))
        return x


def _norm(dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-12, dtype=dtype, name=name, use_fast_variance=False)
