"""Scaled dot-product attention as plain JAX operations, for any device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Queries = Float[Array, "b l n d"]
Keys = Float[Array, "b s n d"]


def dot_product_attention(q: Queries, k: Keys, v: Keys) -> Queries:
    """softmax(q k^T / sqrt(d)) v for n heads of width d; the softmax is in float32.

    Args:
      q: [b, l, n, d] queries.
      k, v: [b, s, n, d] keys and values.

    Returns:
      [b, l, n, d] in the dtype of v. Memory holds the weights, b n l s numbers.
    """
    # The matrices of a head lie together, and the sum of the weights divides the output: on a CPU
    # this takes half the time of weights that are normalised and contracted as they lie.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    logits = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp((logits - largest) * q.shape[-1] ** -0.5)
    total = weights.sum(axis=-1, keepdims=True)
    summed = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (summed / total).astype(v.dtype).swapaxes(1, 2)
