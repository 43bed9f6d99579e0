"""Scaled dot-product attention; the softmax is taken in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attention(
    q: Float[Array, "b l n d"], k: Float[Array, "b l n d"], v: Float[Array, "b l n d"]
) -> Float[Array, "b l n d"]:
    """softmax(q k^T / sqrt(d)) v for n heads of width d."""
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bnqk,bknd->bqnd", weights.astype(v.dtype), v)
