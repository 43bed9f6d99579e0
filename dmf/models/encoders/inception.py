"""The Inception-v3 of the Frechet inception distance: the TensorFlow graph of 2015-12-05.

The architecture is data: a block is a tuple of branches, a branch is a tuple of layers that are
applied to the input of the block in turn, and the outputs of the branches are concatenated. Blocks
and convolutions have the names of the published weights. It differs from the usual Inception-v3 of
arXiv:1512.00567 in that average pools do not count padding, the last block uses a maximum pool, and
there are 1,008 outputs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Shaped

from dmf.errors import InputError, check_at_least, check_choice
from dmf.types import COMPUTE_DTYPES, Images, Params, PRNGKey

SIDE = 299
# The spatial FID reads the first channels of the first branch of this block, which is 17 x 17.
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7


class Convolution(NamedTuple):
    """The shape of a convolution without bias, then batch normalisation, then ReLU.

    Attributes:
      name: name in the published weights.
      features: number of output channels.
      rows, columns: size of the kernel.
      stride: stride in both directions.
      padding: "SAME" or "VALID".
    """

    name: str
    features: int
    rows: int = 1
    columns: int = 1
    stride: int = 1
    padding: str = "SAME"


class Fork(NamedTuple):
    """Two convolutions of one input, whose outputs are concatenated."""

    wide: Convolution
    tall: Convolution


Maps = Float[Array, "b _ _ _"]
Pool = Callable[[Maps], Maps]
Branch = tuple[Convolution | Fork | Pool, ...]
Block = tuple[Branch, ...]

AVG_POOL = functools.partial(
    nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
)
MAX_POOL = functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
MAX_POOL_STRIDE_2 = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
STRIDE_2 = (2, "VALID")

STEM: Branch = (
    Convolution("Conv2d_1a_3x3", 32, 3, 3, *STRIDE_2),
    Convolution("Conv2d_2a_3x3", 32, 3, 3, 1, "VALID"),
    Convolution("Conv2d_2b_3x3", 64, 3, 3),
    MAX_POOL_STRIDE_2,
    Convolution("Conv2d_3b_1x1", 80),
    Convolution("Conv2d_4a_3x3", 192, 3, 3, 1, "VALID"),
    MAX_POOL_STRIDE_2,
)


def _chain(name: str, *convolutions: tuple) -> Branch:
    """One convolution with this name, or several, numbered from 1."""
    if len(convolutions) == 1:
        return (Convolution(name, *convolutions[0]),)
    return tuple(Convolution(f"{name}_{i}", *c) for i, c in enumerate(convolutions, 1))


def _fork(name: str, features: int) -> Fork:
    return Fork(Convolution(f"{name}a", features, 1, 3), Convolution(f"{name}b", features, 3, 1))


def _block_35(pool_features: int) -> Block:
    """A block of the 35 x 35 stage."""
    return (
        _chain("branch1x1", (64,)),
        _chain("branch5x5", (48,), (64, 5, 5)),
        _chain("branch3x3dbl", (64,), (96, 3, 3), (96, 3, 3)),
        (AVG_POOL, *_chain("branch_pool", (pool_features,))),
    )


def _block_17(inner: int) -> Block:
    """A block of the 17 x 17 stage, with convolutions of 1 x 7 and 7 x 1."""
    row, column = (inner, 1, 7), (inner, 7, 1)
    return (
        _chain("branch1x1", (192,)),
        _chain("branch7x7", (inner,), row, (192, 7, 1)),
        _chain("branch7x7dbl", (inner,), column, row, column, (192, 1, 7)),
        (AVG_POOL, *_chain("branch_pool", (192,))),
    )


def _block_8(pool: Pool) -> Block:
    """A block of the 8 x 8 stage."""
    return (
        _chain("branch1x1", (320,)),
        (Convolution("branch3x3_1", 384), _fork("branch3x3_2", 384)),
        (*_chain("branch3x3dbl", (448,), (384, 3, 3)), _fork("branch3x3dbl_3", 384)),
        (pool, *_chain("branch_pool", (192,))),
    )


BLOCKS: dict[str, Block] = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": (
        _chain("branch3x3", (384, 3, 3, *STRIDE_2)),
        _chain("branch3x3dbl", (64,), (96, 3, 3), (96, 3, 3, *STRIDE_2)),
        (MAX_POOL_STRIDE_2,),
    ),
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": (
        _chain("branch3x3", (192,), (320, 3, 3, *STRIDE_2)),
        _chain("branch7x7x3", (192,), (192, 1, 7), (192, 7, 1), (192, 3, 3, *STRIDE_2)),
        (MAX_POOL_STRIDE_2,),
    ),
    "Mixed_7b": _block_8(AVG_POOL),
    "Mixed_7c": _block_8(MAX_POOL),
}


class InceptionFeatures(NamedTuple):
    """The features that evaluation protocols use, float32.

    Attributes:
      pool3: [b, 2048] mean over the last 8 x 8 positions, for FID, precision and recall.
      spatial: [b, 2023] first 7 channels of the 17 x 17 output of Mixed_6d's 1x1 branch (after
        ReLU), flattened as (row, column, channel), for sFID.
      logits: [b, num_outputs] outputs.
      unbiased_logits: [b, num_outputs] outputs without the bias, for the Inception score.
    """

    pool3: Float[Array, "b 2048"]
    spatial: Float[Array, "b 2023"]
    logits: Float[Array, "b k"]
    unbiased_logits: Float[Array, "b k"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inception:
    """The frozen Inception-v3 of FID, which normalises by stored statistics.

    Attributes:
      num_outputs: number of logits, >= 1; 1008 in the published weights.
      dtype: dtype of the computation, "float32" or "bfloat16"; parameters are always float32.
    """

    num_outputs: int = 1008
    dtype: str = "float32"

    def __post_init__(self):
        check_at_least(self, 1, "num_outputs")
        check_choice(self, "dtype", COMPUTE_DTYPES)

    def init(self, key: PRNGKey) -> Params:
        """Random parameters, float32, with means 0 and variances 1."""
        # Parameters do not depend on the size of the images; 75 is the smallest that the strides
        # leave a pixel of.
        return _Network(self).init(key, jnp.zeros((1, 75, 75, 3)))["params"]

    def apply(self, params: Params, images: Images) -> InceptionFeatures:
        """The features of images.

        Args:
          params: parameters, as `init` returns them.
          images: [b, 299, 299, 3] in [-1, 1].

        Raises:
          InputError: the images are of another size.
        """
        if images.shape[1:] != (SIDE, SIDE, 3):
            raise InputError(
                f"images have shape {images.shape}",
                remedy=f"Inception takes [b, {SIDE}, {SIDE}, 3]; resize them by the rule of the "
                       "protocol",
            )
        # Published statistics are of float32 matmuls, which accelerators do not use by default.
        with jax.default_matmul_precision("highest"):
            return _Network(self).apply({"params": params}, images)


class _StoredNorm(nn.Module):
    """Batch normalisation in float32, with a stored mean and variance."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        initializers = {"scale": ones, "bias": zeros, "mean": zeros, "var": ones}
        scale, bias, mean, var = (
            self.param(name, initializer, x.shape[-1:])[None, None, None]
            for name, initializer in initializers.items()
        )
        normalised = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(var + 1e-3)
        return (normalised * scale + bias).astype(self.dtype)


class _ConvNormRelu(nn.Module):
    """A convolution, batch normalisation and ReLU, as a `Convolution` describes them."""

    convolution: Convolution
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        _, features, rows, columns, stride, padding = self.convolution
        x = nn.Conv(
            features, (rows, columns), (stride, stride), padding, use_bias=False,
            kernel_init=nn.initializers.he_normal(), dtype=self.dtype, name="convolution",
        )(x)  # fmt: skip
        return nn.relu(_StoredNorm(self.dtype, name="norm")(x))


def _apply_branch(branch: Branch, x: Maps, dtype: jnp.dtype) -> Maps:
    """The layers of a branch in turn; it is called in a module, which owns the parameters."""
    for layer in branch:
        if isinstance(layer, Convolution):
            x = _ConvNormRelu(layer, dtype, name=layer.name)(x)
        elif isinstance(layer, Fork):
            x = jnp.concatenate([_apply_branch((tine,), x, dtype) for tine in layer], axis=-1)
        else:
            x = layer(x)
    return x


class _Block(nn.Module):
    """The outputs of the branches of a block."""

    block: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Maps) -> list[Maps]:
        return [_apply_branch(branch, x, self.dtype) for branch in BLOCKS[self.block]]


class _Network(nn.Module):
    """Stem, blocks, mean over positions, outputs."""

    config: Inception

    @nn.compact
    def __call__(self, images: Images) -> InceptionFeatures:
        dtype = jnp.dtype(self.config.dtype)
        x = _apply_branch(STEM, images.astype(dtype), dtype)
        for name in BLOCKS:
            outputs = _Block(name, dtype, name=name)(x)
            if name == SPATIAL_BLOCK:
                spatial = outputs[0][..., :SPATIAL_CHANNELS].astype(jnp.float32)
            x = jnp.concatenate(outputs, axis=-1)
        pool3 = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        # The bias is a parameter of its own, as the Inception score leaves it out.
        unbiased = nn.Dense(self.config.num_outputs, use_bias=False, name="output")(pool3)
        bias = self.param("output_bias", nn.initializers.zeros, unbiased.shape[-1:])
        return InceptionFeatures(
            pool3, spatial.reshape(len(images), -1), unbiased + bias[None], unbiased
        )


def resize_for_inception(
    images: Shaped[Array, "b h w c"], size: int = SIDE
) -> Float[Array, "b {size} {size} c"]:
    """Images resized and scaled as in the Inception graph of 2015-12-05.

    Interpolation is bilinear between source coordinates i * side / size: no half-pixel shift, no
    antialiasing, clamped at the far border. Pixels become (x - 128) / 128.

    Args:
      images: [b, h, w, c] in [0, 255], uint8 or floating point.
      size: the new height and width.

    Returns:
      [b, size, size, c] float32 in about [-1, 1].
    """
    rows, columns = (_linear_matrix(side, size) for side in images.shape[1:3])
    resized = jnp.einsum(
        "ih,jw,bhwc->bijc", rows, columns, images.astype(jnp.float32), precision="highest"
    )
    return (resized - 128) / 128


def _linear_matrix(inputs: int, outputs: int) -> np.ndarray:
    """[outputs, inputs] float32 weights of linear interpolation along one axis."""
    positions = np.arange(outputs) * np.float32(inputs / outputs)
    low = np.floor(positions).astype(int)
    matrix = np.zeros((outputs, inputs))
    np.add.at(matrix, (np.arange(outputs), low), 1 - (positions - low))
    np.add.at(matrix, (np.arange(outputs), np.minimum(low + 1, inputs - 1)), positions - low)
    return matrix.astype(np.float32)
