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
    logits = jnp.einsum("blnd,bsnd->bnls", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bnls,bsnd->blnd", weights.astype(v.dtype), v)
