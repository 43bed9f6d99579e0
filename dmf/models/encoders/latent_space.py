"""The space of a network over latents: how images become its samples, and samples images."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmf.errors import check_at_least, check_choice
from dmf.models.encoders.autoencoder import Autoencoder, as_moments, with_dtype
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.models.encoders.tiled_decoding import check_tiles, decode_in_tiles
from dmf.types import COMPUTE_DTYPES, Images, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """The scaled latents of an autoencoder.

    Images are decoded whole, or in tiles, see `decode_in_tiles`; then memory is that of a tile, and
    images differ unless the autoencoder has a `decoder_reach`. With the
    published `AutoencoderKL` in float32, decoding takes 224 MiB for an image of 256 x 256 and 896
    MiB for one of 512 x 512, times `decode_batch`; the attention in its middle, there a matrix of
    4,096 x 4,096 or 64 MiB, comes before that peak. A larger `decode_batch` fills an accelerator
    better at the coarse levels, and launches fewer programs; on a CPU it makes no difference. The
    last bits of an image can depend on `decode_batch`.

    In bfloat16, images whose levels have a standard deviation of 64 differ by 0.6 of 255 levels on
    average and by 5 at most, in every second value by one or more (measured with random weights of
    the published sizes, and with the golden ones of the tests). The difference is not visible, but
    it moves scores: decode in float32 where scores are compared with published ones. On a CPU
    bfloat16 is no faster, and takes more memory.

    Attributes:
      autoencoder: the autoencoder of the latents.
      scaling: scaling between its latents and the samples.
      decode_batch: samples decoded at a time, >= 1.
      decode_dtype: dtype of decoding, "float32" or "bfloat16"; it replaces the dtype of
        `autoencoder`.
      decode_tiles: side of the tiles in which images are decoded, and the overlap of neighbours,
        both in latents; () to decode images whole.
    """

    autoencoder: Autoencoder
    scaling: LatentScaling
    decode_batch: int = 8
    decode_dtype: str = "float32"
    decode_tiles: tuple[int, ...] = ()

    def __post_init__(self):
        check_at_least(self, 1, "decode_batch")
        check_choice(self, "decode_dtype", COMPUTE_DTYPES)
        check_tiles(self)

    def image_shape(self, sample_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape (h, w, c) of the image of a sample of shape (h, w, c)."""
        height, width, _ = sample_shape
        factor = self.autoencoder.factor
        return height * factor, width * factor, self.autoencoder.channels

    def encode(self, params: Params, images: Images) -> Float[Array, "b y x k"]:
        """The samples of images, `decode_batch` at a time: the means of their latents, scaled.

        Args:
          params: parameters of the autoencoder.
          images: [b, h, w, channels] in [-1, 1]; h and w are multiples of the factor.

        Raises:
          InputError: the images do not have such a shape.
        """
        encode = functools.partial(self.autoencoder.encode, params)
        return self.scaling.apply(self._in_groups(lambda x: as_moments(encode(x)).mean, images))

    def decode(self, params: Params, x: Float[Array, "b y x k"]) -> Images:
        """Decodes samples, `decode_batch` at a time and the remaining ones together.

        Args:
          params: parameters of the autoencoder.
          x: [b, h, w, latent_channels] samples; b may be symbolic, in an export.

        Returns:
          Images [b, h factor, w factor, channels] of about [-1, 1], float32.

        Raises:
          InputError: the autoencoder cannot compute in `decode_dtype`.
        """
        network = with_dtype(self.autoencoder, self.decode_dtype)
        decode = functools.partial(network.decode, params)
        if self.decode_tiles:
            tile, overlap = self.decode_tiles
            decode = functools.partial(
                decode_in_tiles, decode, tile=tile, overlap=overlap, autoencoder=network
            )
        return self._in_groups(decode, self.scaling.invert(x))

    def _in_groups(
        self, function: Callable[[jax.Array], jax.Array], inputs: Float[Array, "b *d"]
    ) -> Float[Array, "b *e"]:
        """A function of `decode_batch` rows at a time, and of the remaining ones together; it is
        never called with no rows."""
        # The count may be a symbol, of an export: then no branch depends on its value.
        size, count = self.decode_batch, inputs.shape[0]
        groups = count // size

        def add_group(i: jax.Array, outputs: jax.Array) -> jax.Array:
            rows = i * size + jnp.arange(size)
            return outputs.at[rows].set(function(inputs[rows]))

        no_rest = isinstance(count, int) and count % size == 0
        group = jax.ShapeDtypeStruct((size, *inputs.shape[1:]), inputs.dtype)
        rest = jax.eval_shape(function, group) if no_rest else function(inputs[groups * size :])
        outputs = jnp.zeros((count, *rest.shape[1:]), rest.dtype)
        outputs = jax.lax.fori_loop(0, jnp.asarray(groups), add_group, outputs)
        return outputs if no_rest else outputs.at[groups * size :].set(rest)
