"""The parts of a diffusion transformer (DiT, arXiv:2212.09748), in Linen.

Whatever `dtype` is, these are computed in float32, from inputs and to outputs of that type: the
sinusoidal features of times, normalization (statistics, difference, division and scale), the logits
of attention and their softmax, by the formula and by the kernels of flash attention, and the sums
inside products; and all of the log-variance head. `FLOAT32` names what may be besides.
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from dmf.models.attention import attention

Tokens = Float[Array, "b l d"]
Vectors = Float[Array, "b d"]

# Parts of a network that may be in float32 where the rest is in bfloat16: the products of the time
# embeddings and the sum with the label's; shift, scale and gate of the blocks, and what they are
# applied to; the tokens between blocks, and the sums that make them; the whole final layer.
FLOAT32 = ("time_embedding", "modulation", "residual", "final_layer")

xavier = nn.initializers.xavier_uniform()
small_normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros


def sinusoidal_features(t: Float[Array, "b"], count: int) -> Float[Array, "b count"]:
    """[cos(w t), sin(w t)] with w from 1 down to 1e-4; `count` values in float32.

    t is taken as it is, in [0, 1], not scaled to 1000.
    """
    half = count // 2
    frequencies = jnp.asarray(10000.0 ** (-np.arange(half) / half), jnp.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_table(side: int, width: int) -> np.ndarray:
    """[side * side, width] float32 sines and cosines of each token's place, row by row.

    The first half of the channels encodes the column, the second half the row, each as
    [sin, cos] of place / 10000^(i / (width / 4)); computed in float64.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, column = np.divmod(np.arange(side * side), side)
    angles = [place[:, None] * frequencies for place in (column, row)]
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


def modulate(x: Tokens, shift: Vectors, scale: Vectors) -> Tokens:
    """x (1 + scale) + shift, one shift and scale a sample."""
    return x * (1 + scale[:, None, :]) + shift[:, None, :]


class TimeEmbedding(nn.Module):
    """256 sinusoidal features of a time, then Linear, SiLU, Linear; zero at first if `silent`."""

    width: int
    dtype: jnp.dtype
    silent: bool = False

    @nn.compact
    def __call__(self, t: Float[Array, "b"]) -> Vectors:
        x = sinusoidal_features(t, 256).astype(self.dtype)
        x = nn.Dense(self.width, kernel_init=small_normal, dtype=self.dtype, name="in")(x)
        init = zeros if self.silent else small_normal
        return nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="out")(nn.silu(x))


class GuidanceEmbedding(nn.Module):
    """A vector of a guidance's scale and interval, zero at first, so that a network that learnt
    without it starts as it was."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, scale: Float[Array, "b"], low: Float[Array, "b"], high: Float[Array, "b"]
    ) -> Vectors:
        # 1 / scale, like the others, lies in (0, 1] for all scales that guide.
        embed = {"scale": 1 / scale, "low": low, "high": high}
        return sum(TimeEmbedding(self.width, self.dtype, silent=True, name=name)(value)
                   for name, value in embed.items())


class Modulation(nn.Module):
    """`count` vectors from the condition, Linear(SiLU(c)), zero at initialisation."""

    count: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, c: Vectors) -> list[Vectors]:
        features = (self.count, c.shape[-1])
        out = nn.DenseGeneral(features, kernel_init=zeros, dtype=self.dtype, name="linear")(
            nn.silu(c)
        )
        return [out[:, i] for i in range(self.count)]


class SelfAttention(nn.Module):
    """Multi-head self-attention; with `qk_norm`, q and k pass an RMSNorm over the head width.

    `attention` is the implementation, see `dmf.models.attention`.
    """

    heads: int
    qk_norm: bool
    dtype: jnp.dtype
    attention: str = "xla"

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width = x.shape[-1]
        features = (3, self.heads, width // self.heads)
        qkv = nn.DenseGeneral(features, kernel_init=xavier, dtype=self.dtype, name="qkv")(x)
        q, k, v = (qkv[:, :, i] for i in range(3))
        if self.qk_norm:
            q, k = (
                nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=name)(y)
                for name, y in (("q_norm", q), ("k_norm", k))
            )
        # Parameters are drawn from one token of one sample, and depend on no implementation.
        out = attention(q, k, v, "xla" if self.is_initializing() else self.attention)
        return nn.DenseGeneral(
            width, axis=(-2, -1), kernel_init=xavier, dtype=self.dtype, name="out"
        )(out)


class MLP(nn.Module):
    """Linear, tanh GELU, Linear."""

    ratio: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width = x.shape[-1]
        hidden = int(width * self.ratio)
        x = nn.Dense(hidden, kernel_init=xavier, dtype=self.dtype, name="in")(x)
        return nn.Dense(width, kernel_init=xavier, dtype=self.dtype, name="out")(
            nn.gelu(x, approximate=True)
        )


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning (DiT, section 3.2).

    Shift, scale and gate, and what they are applied to, are in `modulation_dtype` if it is given,
    and in `dtype`, as the rest, if not. Tokens leave in the type they came in.
    """

    heads: int
    mlp_ratio: float
    qk_norm: bool
    dtype: jnp.dtype
    attention: str = "xla"
    modulation_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Tokens, c: Vectors) -> Tokens:
        dtype = self.modulation_dtype or self.dtype
        norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=dtype)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = Modulation(
            6, dtype, name="modulation"
        )(c)
        attend = SelfAttention(
            self.heads, self.qk_norm, self.dtype, self.attention, name="attention"
        )
        step = gate_1[:, None, :] * attend(modulate(norm(x), shift_1, scale_1))
        x = (x + step).astype(x.dtype)
        mlp = MLP(self.mlp_ratio, self.dtype, name="mlp")
        step = gate_2[:, None, :] * mlp(modulate(norm(x), shift_2, scale_2))
        return (x + step).astype(x.dtype)


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the projection of each token to its patch, zero at first."""

    patch_values: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens, c: Vectors) -> Float[Array, "b l p"]:
        norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=self.dtype)
        shift, scale = Modulation(2, self.dtype, name="modulation")(c)
        return nn.Dense(self.patch_values, kernel_init=zeros, dtype=self.dtype, name="linear")(
            modulate(norm(x), shift, scale)
        )


class LogVariance(nn.Module):
    """phi(t, r): 128 sinusoidal features of each time and one Linear, in float32, zero at first."""

    @nn.compact
    def __call__(self, t: Float[Array, "b"], r: Float[Array, "b"]) -> Float[Array, "b"]:
        x = jnp.concatenate([sinusoidal_features(time, 128) for time in (t, r)], axis=-1)
        return nn.Dense(1, kernel_init=zeros, name="linear")(x)[:, 0]


class Projector(nn.Module):
    """Three Linears with SiLU between, from tokens to the width of an encoder's features (REPA)."""

    hidden: int
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Float[Array, "b l features"]:
        for i, width in enumerate((self.hidden, self.hidden, self.features)):
            x = nn.silu(x) if i else x
            x = nn.Dense(width, kernel_init=xavier, dtype=self.dtype, name=f"linear_{i}")(x)
        return x
