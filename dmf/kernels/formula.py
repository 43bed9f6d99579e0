"""Scaled dot-product attention as it is written, for any device; the softmax is in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Queries = Float[Array, "b l n d"]
Keys = Float[Array, "b s n d"]


def formula(q: Queries, k: Keys, v: Keys) -> Queries:
    """softmax(q k^T / sqrt(d)) v for n heads of width d, with b n l s numbers in memory."""
    logits = jnp.einsum("blnd,bsnd->bnls", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bnls,bsnd->blnd", weights.astype(v.dtype), v)
