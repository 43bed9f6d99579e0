"""The vision transformer of DINOv2 (arXiv:2304.07193), and its image resizing.

Representation alignment (REPA) aligns with its patch tokens, FD-DINOv2 measures with its class
token. Representation autoencoders (RAE) encode with one that has registers (arXiv:2309.16588).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from dmf.errors import InputError, check_at_least, check_choice
from dmf.models.parameters import parameter, stacked_parameters
from dmf.types import COMPUTE_DTYPES, Features, Images, Params, PRNGKey

# Mean and standard deviation of ImageNet's pixels in [0, 1], by which input images are normalised.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

DINOV2_SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
}

_small_normal = nn.initializers.truncated_normal(0.02)
_zeros, _ones = nn.initializers.zeros, nn.initializers.ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class DinoV2:
    """A frozen DINOv2 encoder of images; `DINOV2_SIZES` holds the published sizes.

    Attributes:
      width: width of the tokens and of the features, a multiple of `heads`; published: S 384, B
        768, L 1024.
      depth: number of transformer blocks, >= 1; published: S and B 12, L 24.
      heads: number of attention heads; published: S 6, B 12, L 16.
      patch_size: height and width of a patch, which becomes one token; >= 1.
      mlp_ratio: hidden width of the MLPs over `width`.
      table_side: rows and columns of the position table, which is resized for other grids; >= 1.
      registers: number of register tokens, which no features are read from, >= 0; published: 0 or
        4.
      dtype: dtype of the computation, "float32" or "bfloat16"; parameters are always float32.
    """

    width: int
    depth: int
    heads: int
    patch_size: int = 14
    mlp_ratio: float = 4.0
    table_side: int = 37
    registers: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        check_at_least(self, 1, "width", "depth", "heads", "patch_size", "table_side")
        check_at_least(self, 0, "registers")
        if self.width % self.heads:
            raise InputError("heads", self.heads, f"it must divide width={self.width}")
        check_choice(self, "dtype", COMPUTE_DTYPES)

    def init(self, key: PRNGKey) -> Params:
        """Random parameters, float32: a nested dictionary, block parameters stacked by depth."""
        image = jnp.zeros((1, self.patch_size, self.patch_size, 3))
        return Transformer(self).init(key, image)["params"]

    def apply(self, params: Params, images: Images) -> Features:
        """The tokens of images after the last norm.

        Args:
          params: parameters, as `init` returns them.
          images: [b, h, w, 3], normalised by `IMAGENET_MEAN` and `IMAGENET_STD`; h and w are
            multiples of the patch size.

        Returns:
          [b, 1 + n, width] float32: the class token, then the n patches row by row.

        Raises:
          InputError: the images cannot be cut into patches.
        """
        _, h, w, channels = images.shape
        if channels != 3 or h % self.patch_size or w % self.patch_size:
            raise InputError(
                f"images have shape {images.shape}",
                remedy="DINOv2 takes 3 channels, and sides that are multiples of "
                       f"patch_size={self.patch_size}",
            )
        # Published features are of float32 matmuls, which accelerators do not use by default.
        with jax.default_matmul_precision("highest"):
            return Transformer(self).apply({"params": params}, images)


def resize_bicubic(
    images: Images, size: int, a: float = -0.75
) -> Float[Array, "b {size} {size} c"]:
    """Images resized to size x size by plain cubic convolution, as PyTorch's `interpolate` does.

    Pixel centres lie at halves, borders are repeated, and there is no antialiasing.

    Args:
      images: [b, h, w, c] of any height and width.
      size: the new height and width.
      a: slope of the cubic kernel at distance 1 (-0.5 in Keys, 1981).

    Returns:
      [b, size, size, c] float32.
    """
    rows, columns = (_cubic_matrix(side, size, a) for side in images.shape[1:3])
    return jnp.einsum(
        "ih,jw,bhwc->bijc", rows, columns, images.astype(jnp.float32), precision="highest"
    )


def _cubic_matrix(inputs: int, outputs: int, a: float) -> np.ndarray:
    """[outputs, inputs] float32 weights of cubic convolution along one axis."""
    centres = (np.arange(outputs) + 0.5) * inputs / outputs - 0.5
    matrix = np.zeros((outputs, inputs))
    for tap in range(-1, 3):
        pixel = np.floor(centres).astype(int) + tap
        weights = _cubic_kernel(np.abs(centres - pixel), a)
        np.add.at(matrix, (np.arange(outputs), pixel.clip(0, inputs - 1)), weights)
    return matrix.astype(np.float32)


def _cubic_kernel(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel at distances in [0, 2]."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)


class Attention(nn.Module):
    """Multi-head self-attention; the first axis of the kernel is query, key, value."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Features) -> Features:
        width = x.shape[-1]
        heads = (self.heads, width // self.heads)
        kernel = parameter(self, "qkv_kernel", _small_normal, (3, width, *heads))
        bias = parameter(self, "qkv_bias", _zeros, (3, *heads)).astype(self.dtype)
        q, k, v = jnp.einsum("bld,sdnh->sblnh", x, kernel.astype(self.dtype)) + bias[:, None, None]
        logits = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * heads[1] ** -0.5, axis=-1).astype(self.dtype)
        return nn.DenseGeneral(
            width, axis=(-2, -1), kernel_init=_small_normal, dtype=self.dtype, name="out"
        )(jnp.einsum("bnqk,bknh->bqnh", weights, v))


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Features) -> Features:
        dense = functools.partial(nn.Dense, kernel_init=_small_normal, dtype=self.dtype)
        return dense(x.shape[-1], name="out")(
            nn.gelu(dense(self.hidden, name="in")(x), approximate=False)
        )


class _Block(nn.Module):
    """A pre-norm transformer block, each residual scaled by a learned vector (layer scale)."""

    config: DinoV2

    @nn.compact
    def __call__(self, x: Features) -> Features:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        attention = Attention(config.heads, dtype, name="attention")
        mlp = MLP(round(config.width * config.mlp_ratio), dtype, name="mlp")
        for i, layer in enumerate((attention, mlp), 1):
            scale = parameter(self, f"scale_{i}", _ones, (config.width,)).astype(dtype)
            x += scale[None, None] * layer(_norm(dtype, f"norm_{i}")(x))
        return x


class Transformer(nn.Module):
    """Patch and position embedding, transformer blocks, final norm.

    Attributes:
      config: its sizes.
      affine: whether the final norm has a scale and a bias.
    """

    config: DinoV2
    affine: bool = True

    @nn.compact
    def __call__(self, images: Images) -> Features:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        patch = (config.patch_size, config.patch_size)
        grid = nn.Conv(config.width, patch, patch, "VALID", dtype=dtype, name="patch_embedding")(
            images
        )
        b, rows, columns, width = grid.shape
        class_token = parameter(self, "class_token", _small_normal, (1, width)).astype(dtype)
        tokens = jnp.concatenate(
            [jnp.broadcast_to(class_token[None], (b, 1, width)), grid.reshape(b, -1, width)], axis=1
        )
        table = parameter(self, "positions", _small_normal, (1 + config.table_side**2, width))
        tokens += _resize_positions(table, rows, columns).astype(dtype)[None]
        if config.registers:
            registers = parameter(self, "registers", _small_normal, (config.registers, width))
            registers = jnp.broadcast_to(registers.astype(dtype)[None], (b, *registers.shape))
            tokens = jnp.concatenate([tokens[:, :1], registers, tokens[:, 1:]], axis=1)
        blocks = stacked_parameters(self, "blocks", self._init_blocks, config.depth)
        block = _Block(config, parent=None)
        tokens, _ = jax.lax.scan(
            lambda x, params: (block.apply({"params": params}, x), None), tokens, blocks
        )
        if config.registers:
            patches = tokens[:, 1 + config.registers :]
            tokens = jnp.concatenate([tokens[:, :1], patches], axis=1)
        return _norm(dtype, "norm", affine=self.affine)(tokens).astype(jnp.float32)

    def _init_blocks(self, key: PRNGKey) -> Params:
        """Parameters of all blocks, each leaf stacked on a leading depth axis."""
        block, tokens = _Block(self.config, parent=None), jnp.zeros((1, 1, self.config.width))
        return jax.vmap(lambda key: block.init(key, tokens)["params"])(
            jax.random.split(key, self.config.depth)
        )


def _norm(dtype: jnp.dtype, name: str, *, affine: bool = True) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name, use_fast_variance=False,
                        use_scale=affine, use_bias=affine)


def _resize_positions(
    table: Float[Array, "positions d"], rows: int, columns: int
) -> Float[Array, "tokens d"]:
    """The position table of a grid of patches: the class token's row, then the patches row by row.

    The square table is resized by cubic convolution (a = -0.5) with antialiasing.
    """
    side, width = round((len(table) - 1) ** 0.5), table.shape[1]
    # `jax.image.resize` antialiases by default, has a = -0.5, and leaves a side of the same length.
    grid = jax.image.resize(
        table[1:].reshape(side, side, width), (rows, columns, width), method="cubic"
    )
    return jnp.concatenate([table[:1], grid.reshape(-1, width)])
