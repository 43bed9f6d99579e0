"""The layers of a diffusion transformer (DiT, arXiv:2212.09748), in Flax Linen.

Whatever `dtype` is, these are computed in float32, with inputs and outputs in `dtype`: the
sinusoidal features of times; normalization (statistics, difference, division and scale); the logits
and the softmax of attention, in every implementation; the sums inside matmuls; the sums over
samples and tokens in gradients; and the whole log-variance head. `FLOAT32_PARTS` names the further
parts that a config can compute in float32.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from dmf.models.activations import gelu, layer_norm
from dmf.models.attention.attention import attention
from dmf.models.linear import Linear, Tokens, Vectors, over_tokens, scale_tokens, spread
from dmf.models.rotary import Rotation, rotate

# Parts of a network that can be in float32 where the rest is in bfloat16: the matmuls of the time
# embeddings and the sum with the label embedding; shift, scale and gate of the blocks, and the
# tokens that they are applied to; the residual stream, with the sums that update it; the whole
# final layer.
FLOAT32_PARTS = ("time_embedding", "modulation", "residual", "final_layer")

# What layers are conditioned on: a vector of each sample, or of each token.
Condition = Vectors | Tokens

xavier = nn.initializers.xavier_uniform()
small_normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros


def sinusoidal_features(t: Float[Array, "b"], count: int) -> Float[Array, "b count"]:
    """[cos(w t), sin(w t)] with w from 1 down to 1e-4: `count` values per time, float32.

    Args:
      t: [b] times in [0, 1], which are not scaled to 1000.
      count: number of features, even.
    """
    half = count // 2
    frequencies = jnp.asarray(10000.0 ** (-np.arange(half) / half), jnp.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_table(side: int, width: int) -> np.ndarray:
    """[side * side, width] float32 sines and cosines of the position of each token, row by row.

    The first half of the channels encodes the column, the second half the row, each as
    [sin, cos] of position / 10000^(i / (width / 4)), computed in float64.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, column = np.divmod(np.arange(side * side), side)
    angles = [position[:, None] * frequencies for position in (column, row)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1).astype(np.float32)


def patchify(x: Float[Array, "b h w c"], patch: int) -> Tokens:
    """Cuts images into non-overlapping patches, each flattened as (row, column, channel)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def unpatchify(tokens: Tokens, patch: int) -> Float[Array, "b h h c"]:
    """The inverse of `patchify`, for square images."""
    b, count, values = tokens.shape
    side, c = math.isqrt(count), values // patch**2
    x = tokens.reshape(b, side, side, patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, side * patch, side * patch, c)


def modulate(x: Tokens, shift: Condition, scale: Condition) -> Tokens:
    """x (1 + scale) + shift in the dtype of x, with one shift and scale vector per sample or per
    token."""
    return scale_tokens(x, 1 + scale, x.dtype) + spread(over_tokens(shift), x.shape, x.dtype)


class TimeEmbedding(nn.Module):
    """256 sinusoidal features of a time, then Linear, SiLU, Linear.

    Kernels are drawn by `kernel_init`; with `zero_init` the embedding is zero at initialisation.
    """

    width: int
    dtype: jnp.dtype
    zero_init: bool = False
    kernel_init: Callable[..., jax.Array] = small_normal

    @nn.compact
    def __call__(self, t: Float[Array, "b"]) -> Vectors:
        x = sinusoidal_features(t, 256).astype(self.dtype)
        x = Linear((self.width,), self.kernel_init, self.dtype, name="in")(x)
        init = zeros if self.zero_init else self.kernel_init
        return Linear((self.width,), init, self.dtype, name="out")(nn.silu(x))


class GuidanceEmbedding(nn.Module):
    """The embedding of a guidance scale and interval.

    It is zero at initialisation, so that fine-tuning with it starts from the same function.
    """

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, scale: Float[Array, "b"], start: Float[Array, "b"], end: Float[Array, "b"]
    ) -> Vectors:
        # 1 / scale lies in (0, 1], like the times, for every scale >= 1.
        # "low" and "high" are the names of the parameters in checkpoints.
        inputs = {"scale": 1 / scale, "low": start, "high": end}
        return sum(TimeEmbedding(self.width, self.dtype, zero_init=True, name=name)(value)
                   for name, value in inputs.items())


class Modulation(nn.Module):
    """`count` modulation vectors Linear(SiLU(c)) of a condition c, zero at initialisation.

    The matmul is in `dtype`. The vectors of samples are float32: XLA's compiler for TPUs would sum
    their gradients in the dtype that they are cast to. Those of tokens, of which there are many
    more and whose gradients are no sums over tokens, are in `dtype`.
    """

    count: int
    dtype: jnp.dtype
    gradient_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, c: Condition) -> list[Condition]:
        output_dtype = jnp.dtype("float32") if c.ndim == 2 else self.dtype
        linear = Linear((self.count, c.shape[-1]), zeros, self.dtype, output_dtype=output_dtype,
                        gradient_dtype=self.gradient_dtype, name="linear")
        out = linear(nn.silu(c))
        return [out[..., i, :] for i in range(self.count)]


class SelfAttention(nn.Module):
    """Multi-head self-attention; with `qk_norm`, q and k pass an RMSNorm over the head width.

    With a `rotation`, q and k are then turned by the positions of their tokens. `attention` names
    the implementation, see `dmf.models.attention.attention`.
    """

    heads: int
    qk_norm: bool
    dtype: jnp.dtype
    attention: str = "xla"
    gradient_dtype: jnp.dtype | None = None
    kernel_init: Callable[..., jax.Array] = xavier
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Tokens, rotation: Rotation | None = None) -> Tokens:
        width = x.shape[-1]
        linear = functools.partial(
            Linear, kernel_init=self.kernel_init, dtype=self.dtype,
            gradient_dtype=self.gradient_dtype, use_bias=self.use_bias,
        )  # fmt: skip
        features = (3, self.heads, width // self.heads)
        qkv = linear(features, name="qkv")(x)
        q, k, v = (qkv[:, :, i] for i in range(3))
        if self.qk_norm:
            q, k = (
                nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=name)(y)
                for name, y in (("q_norm", q), ("k_norm", k))
            )
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        # Initialisation runs on one token of one sample, and no kernel takes that.
        out = attention(q, k, v, "xla" if self.is_initializing() else self.attention)
        return linear((width,), input_axes=2, name="out")(out)


class MLP(nn.Module):
    """Linear, GELU (tanh approximation), Linear."""

    ratio: float
    dtype: jnp.dtype
    gradient_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width = x.shape[-1]
        hidden = int(width * self.ratio)
        linear = functools.partial(
            Linear, kernel_init=xavier, dtype=self.dtype, gradient_dtype=self.gradient_dtype
        )
        x = linear((hidden,), name="in")(x)
        return linear((width,), name="out")(gelu(x))


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning (DiT, section 3.2), by one vector c for each
    sample, or for each token.

    Shift, scale and gate, and the tokens that they are applied to, are in `modulation_dtype` (by
    default `dtype`), the rest in `dtype`, and the gradients of the kernels in `gradient_dtype` (by
    default `dtype`). The output has the dtype of the input.
    """

    heads: int
    mlp_ratio: float
    qk_norm: bool
    dtype: jnp.dtype
    attention: str = "xla"
    modulation_dtype: jnp.dtype | None = None
    gradient_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Tokens, c: Condition) -> Tokens:
        dtype, gradient_dtype = self.modulation_dtype or self.dtype, self.gradient_dtype
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = Modulation(
            6, dtype, gradient_dtype, name="modulation"
        )(c)
        attend = SelfAttention(
            self.heads, self.qk_norm, self.dtype, self.attention, gradient_dtype, name="attention"
        )
        step = scale_tokens(attend(modulate(layer_norm(x, dtype), shift_1, scale_1)), gate_1, dtype)
        x = (x + step).astype(x.dtype)
        mlp = MLP(self.mlp_ratio, self.dtype, gradient_dtype, name="mlp")
        step = scale_tokens(mlp(modulate(layer_norm(x, dtype), shift_2, scale_2)), gate_2, dtype)
        return (x + step).astype(x.dtype)


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then Linear from each token to its patch; zero at initialisation."""

    patch_values: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens, c: Condition) -> Float[Array, "b l p"]:
        shift, scale = Modulation(2, self.dtype, name="modulation")(c)
        linear = Linear((self.patch_values,), zeros, self.dtype, name="linear")
        return linear(modulate(layer_norm(x, self.dtype), shift, scale))


class LogVariance(nn.Module):
    """The log-variance phi(t, r): 128 sinusoidal features of each time, then Linear.

    It is computed in float32, and zero at initialisation.
    """

    @nn.compact
    def __call__(self, t: Float[Array, "b"], r: Float[Array, "b"]) -> Float[Array, "b"]:
        x = jnp.concatenate([sinusoidal_features(time, 128) for time in (t, r)], axis=-1)
        return nn.Dense(1, kernel_init=zeros, name="linear")(x)[:, 0]


class Projector(nn.Module):
    """Three Linears with SiLU between, from tokens to an encoder's features (REPA)."""

    hidden: int
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Float[Array, "b l features"]:
        for i, width in enumerate((self.hidden, self.hidden, self.features)):
            x = nn.silu(x) if i else x
            x = Linear((width,), xavier, self.dtype, name=f"linear_{i}")(x)
        return x
