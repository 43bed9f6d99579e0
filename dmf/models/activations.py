"""LayerNorm and GELU whose derivatives store little.

JAX would store each intermediate value of them for the backward pass. Their rules here need the
result and one more value: of LayerNorm one per token, of GELU one per input.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Rows = Float[Array, "*rows d"]

_EPSILON = 1e-6
# Of the tanh approximation of GELU.
_SCALE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def layer_norm(x: Rows, dtype: jnp.dtype) -> Rows:
    """(x - mean) / sqrt(variance + 1e-6) over the last axis, computed in float32, in `dtype`.

    The variance is the mean of squared differences: E[x^2] - E[x]^2 would cancel where the mean is
    much larger than the standard deviation.
    """
    return _normalize(x)[0].astype(dtype)


@layer_norm.defjvp
def _layer_norm_jvp(
    dtype: jnp.dtype, primals: tuple[Rows], tangents: tuple[Rows]
) -> tuple[Rows, Rows]:
    y, inverse = _normalize(*primals)
    dx = tangents[0].astype(jnp.float32)
    along_y = jnp.mean(y * dx, axis=-1, keepdims=True)
    dy = inverse * (dx - jnp.mean(dx, axis=-1, keepdims=True) - y * along_y)
    return y.astype(dtype), dy.astype(dtype)


def _normalize(x: Rows) -> tuple[Rows, Float[Array, "*rows 1"]]:
    """The normalized x, and 1 / sqrt(variance + 1e-6) with a last axis of 1; float32."""
    x = x.astype(jnp.float32)
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + _EPSILON)
    return centered * inverse, inverse


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, the tanh approximation of GELU."""
    return x * _gate(x)


@gelu.defjvp
def _gelu_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    gate = _gate(x)
    growth = 2 * _SCALE * (1 + 3 * _CUBIC * x * x)
    return x * gate, (gate + x * gate * (1 - gate) * growth) * dx


def _gate(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * jnp.tanh(_SCALE * (x + _CUBIC * x * x * x))
