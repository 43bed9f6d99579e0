"""The Inception-v3 of the Frechet inception distance: the TensorFlow graph of 2015-12-05.

The architecture is data: a block is a tuple of branches, a branch is a tuple of steps from the
block's input, and the outputs of the branches are concatenated. Names of blocks and convolutions
are those of the published weights. What differs from the Inception-v3 of arXiv:1512.00567 that is
common elsewhere: average pools do not count padding, the last block pools by maximum, and there
are 1,008 outputs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dmf.typing import Images, InputError, Params, PRNGKey

SIDE = 299
# The spatial FID reads the first channels of this block's first branch, which is 17 x 17.
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7


class Convolution(NamedTuple):
    """A convolution without bias, then normalisation by stored statistics, then ReLU."""

    name: str
    features: int
    rows: int = 1
    columns: int = 1
    stride: int = 1
    padding: str = "SAME"


class Fork(NamedTuple):
    """Two convolutions of the same input, their outputs concatenated."""

    wide: Convolution
    tall: Convolution


Maps = Float[Array, "b _ _ _"]
Pool = Callable[[Maps], Maps]
Branch = tuple[Convolution | Fork | Pool, ...]
Block = tuple[Branch, ...]

AVERAGE = functools.partial(
    nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
)
MAXIMUM = functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
HALVE = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
HALVING = (2, "VALID")

STEM: Branch = (
    Convolution("Conv2d_1a_3x3", 32, 3, 3, *HALVING),
    Convolution("Conv2d_2a_3x3", 32, 3, 3, 1, "VALID"),
    Convolution("Conv2d_2b_3x3", 64, 3, 3),
    HALVE,
    Convolution("Conv2d_3b_1x1", 80),
    Convolution("Conv2d_4a_3x3", 192, 3, 3, 1, "VALID"),
    HALVE,
)


def _chain(name: str, *convolutions: tuple) -> Branch:
    """One convolution of that name, or several that are numbered from 1."""
    if len(convolutions) == 1:
        return (Convolution(name, *convolutions[0]),)
    return tuple(Convolution(f"{name}_{i}", *c) for i, c in enumerate(convolutions, 1))


def _fork(name: str, features: int) -> Fork:
    return Fork(Convolution(f"{name}a", features, 1, 3), Convolution(f"{name}b", features, 3, 1))


def _block_35(pooled: int) -> Block:
    """A block of the 35 x 35 stage."""
    return (
        _chain("branch1x1", (64,)),
        _chain("branch5x5", (48,), (64, 5, 5)),
        _chain("branch3x3dbl", (64,), (96, 3, 3), (96, 3, 3)),
        (AVERAGE, *_chain("branch_pool", (pooled,))),
    )


def _block_17(inner: int) -> Block:
    """A block of the 17 x 17 stage, with convolutions of 7 rows or 7 columns."""
    row, column = (inner, 1, 7), (inner, 7, 1)
    return (
        _chain("branch1x1", (192,)),
        _chain("branch7x7", (inner,), row, (192, 7, 1)),
        _chain("branch7x7dbl", (inner,), column, row, column, (192, 1, 7)),
        (AVERAGE, *_chain("branch_pool", (192,))),
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
        _chain("branch3x3", (384, 3, 3, *HALVING)),
        _chain("branch3x3dbl", (64,), (96, 3, 3), (96, 3, 3, *HALVING)),
        (HALVE,),
    ),
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": (
        _chain("branch3x3", (192,), (320, 3, 3, *HALVING)),
        _chain("branch7x7x3", (192,), (192, 1, 7), (192, 7, 1), (192, 3, 3, *HALVING)),
        (HALVE,),
    ),
    "Mixed_7b": _block_8(AVERAGE),
    "Mixed_7c": _block_8(MAXIMUM),
}


class InceptionFeatures(NamedTuple):
    """What the protocols of evaluation read, in float32.

    Attributes:
      pool3: the mean over the last 8 x 8 positions, for FID, precision and recall.
      spatial: the first 7 channels of the 17 x 17 output of Mixed_6d's 1x1 branch (after ReLU),
        flattened as (row, column, channel), for sFID.
      logits: the outputs, bias included.
      unbiased_logits: the outputs without their bias, for the Inception score.
    """

    pool3: Float[Array, "b 2048"]
    spatial: Float[Array, "b 2023"]
    logits: Float[Array, "b k"]
    unbiased_logits: Float[Array, "b k"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inception:
    """The network; frozen: its normalisation knows no batch statistics.

    Attributes:
      num_outputs: length of the logits.
      dtype: of the computation, "float32" or "bfloat16"; parameters are float32 always.
    """

    num_outputs: int = 1008
    dtype: str = "float32"

    def __post_init__(self):
        if self.num_outputs < 1:
            raise InputError(f"inception.num_outputs={self.num_outputs}: give a whole number >= 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"inception.dtype={self.dtype}: choose float32 or bfloat16")

    def init(self, key: PRNGKey) -> Params:
        """Random parameters in float32, with means 0 and variances 1."""
        # No parameter's shape depends on the image; of a smaller one the strides leave nothing.
        return _Network(self).init(key, jnp.zeros((1, 75, 75, 3)))["params"]

    def apply(self, params: Params, images: Images) -> InceptionFeatures:
        """Features of [b, 299, 299, 3] images in [-1, 1].

        Raises:
          InputError: the images are of another size.
        """
        if images.shape[1:] != (SIDE, SIDE, 3):
            raise InputError(f"images have shape {images.shape}: Inception takes [b, {SIDE}, "
                             f"{SIDE}, 3]; resize them by the rule of the protocol")
        # Published statistics are of full float32, which accelerators do not use by themselves.
        with jax.default_matmul_precision("highest"):
            return _Network(self).apply({"params": params}, images)


class _StoredNorm(nn.Module):
    """Batch normalisation by mean and variance that are parameters; in float32."""

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


class _Unit(nn.Module):
    """What a `Convolution` says."""

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


def _follow(branch: Branch, x: Maps, dtype: jnp.dtype) -> Maps:
    """The steps of a branch, one after the other; to be called within a module."""
    for step in branch:
        if isinstance(step, Convolution):
            x = _Unit(step, dtype, name=step.name)(x)
        elif isinstance(step, Fork):
            x = jnp.concatenate([_follow((side,), x, dtype) for side in step], axis=-1)
        else:
            x = step(x)
    return x


class _Block(nn.Module):
    """The output of each branch of a block."""

    block: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Maps) -> list[Maps]:
        return [_follow(branch, x, self.dtype) for branch in BLOCKS[self.block]]


class _Network(nn.Module):
    config: Inception

    @nn.compact
    def __call__(self, images: Images) -> InceptionFeatures:
        dtype = jnp.dtype(self.config.dtype)
        x = _follow(STEM, images.astype(dtype), dtype)
        for name in BLOCKS:
            outputs = _Block(name, dtype, name=name)(x)
            if name == SPATIAL_BLOCK:
                spatial = outputs[0][..., :SPATIAL_CHANNELS].astype(jnp.float32)
            x = jnp.concatenate(outputs, axis=-1)
        pool3 = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        # Apart from its bias, which the Inception score leaves out.
        unbiased = nn.Dense(self.config.num_outputs, use_bias=False, name="output")(pool3)
        bias = self.param("output_bias", nn.initializers.zeros, unbiased.shape[-1:])
        return InceptionFeatures(
            pool3, spatial.reshape(len(images), -1), unbiased + bias[None], unbiased
        )
