"""Scaled dot-product attention, by the formula or by kernels; the softmax is in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmf.kernels.flash import choose, flash_attention


def attention(
    q: Float[Array, "b l n d"],
    k: Float[Array, "b l n d"],
    v: Float[Array, "b l n d"],
    implementation: str = "xla",
) -> Float[Array, "b l n d"]:
    """softmax(q k^T / sqrt(d)) v for n heads of width d.

    Args:
      q, k, v: in any type of floating-point numbers.
      implementation: "xla" (the formula), "flash", or "auto" for the faster one.
    """
    if choose(implementation, q, k) == "flash":
        return flash_attention(q, k, v)
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bnqk,bknd->bqnd", weights.astype(v.dtype), v)
