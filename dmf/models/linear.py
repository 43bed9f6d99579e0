"""Linear layers whose gradients are summed in float32, whatever dtype they compute in.

A bias is added to every token, and a modulation vector is applied to every token of a sample, so
their gradients are sums over tokens. A bfloat16 sum stops growing when its next summand is below
1/256 of it. `spread` broadcasts in float32 and casts afterwards: the values are the same, and the
backward pass casts to float32 before it sums.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dmf.models.parameters import parameter
from dmf.types import Size

Tokens = Float[Array, "b l d"]
Vectors = Float[Array, "b d"]


def over_tokens(vectors: jax.Array) -> jax.Array:
    """Vectors of samples [b, d] as [b, 1, d]; those of tokens [b, l, d] as they are."""
    return vectors[:, None, :] if vectors.ndim == 2 else vectors


def spread(x: jax.Array, shape: tuple[Size, ...], dtype: jnp.dtype) -> jax.Array:
    """x broadcast to `shape` and cast to `dtype`; its gradient is summed in float32."""
    return jnp.broadcast_to(x.astype(jnp.float32), shape).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def scale_tokens(x: Tokens, factor: Vectors | Tokens, dtype: jnp.dtype) -> Tokens:
    """x * factor in `dtype`, with a vector of factors per sample or per token; gradients are summed
    in float32.

    Only the derivative by `factor` broadcasts by `spread`, so that the backward pass stores the
    vectors and not their copies for each token.
    """
    return x.astype(dtype) * over_tokens(factor.astype(dtype))


@scale_tokens.defjvp
def _scale_tokens_jvp(
    dtype: jnp.dtype, primals: tuple[Tokens, Any], tangents: tuple[Tokens, Any]
) -> tuple[Tokens, Tokens]:
    (x, factor), (x_tangent, factor_tangent) = primals, tangents
    by_factor = x.astype(dtype) * spread(over_tokens(factor_tangent), x.shape, dtype)
    return scale_tokens(x, factor, dtype), scale_tokens(x_tangent, factor, dtype) + by_factor


class Linear(nn.Module):
    """x W + b, from the last `input_axes` axes of x to axes of the sizes `features`.

    The matmul is in `dtype`, the bias is added in float32, and the result is in `output_dtype`, by
    default `dtype`. Kernel and bias are float32 parameters; with `use_bias=False` there is no bias.
    The gradient of the kernel is computed in `gradient_dtype`, by default `dtype`: the matmuls then
    give float32, and multiply in `dtype`.
    """

    features: tuple[int, ...]
    kernel_init: Callable[..., jax.Array]
    dtype: jnp.dtype
    input_axes: int = 1
    output_dtype: jnp.dtype | None = None
    gradient_dtype: jnp.dtype | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, axes = x.shape[-self.input_axes :], range(self.input_axes)
        contracted = (tuple(x.ndim - self.input_axes + i for i in axes), tuple(axes))
        kernel = parameter(self, "kernel", self._kernel, (*inputs, *self.features))
        widened = self.dtype == jnp.bfloat16 and self.gradient_dtype == jnp.float32
        operands = [part.astype(jnp.float32 if widened else self.dtype)
                    for part in (x.astype(self.dtype), kernel)]
        precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if widened else None
        y = jax.lax.dot_general(*operands, (contracted, ((), ())), precision)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, self.features)
            y = y.astype(jnp.float32) + jnp.broadcast_to(bias, y.shape)
        return y.astype(self.output_dtype or self.dtype)

    def _kernel(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """An initial kernel, drawn as the matrix that it is."""
        inputs, outputs = map(math.prod, (shape[: self.input_axes], self.features))
        return self.kernel_init(key, (inputs, outputs)).reshape(shape)
