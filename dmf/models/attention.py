"""Scaled dot-product attention, by the formula or by kernels."""

from jaxtyping import Array, Float

from dmf.kernels.flash import choose, flash_attention
from dmf.kernels.formula import formula


def attention(
    q: Float[Array, "b l n d"],
    k: Float[Array, "b l n d"],
    v: Float[Array, "b l n d"],
    implementation: str = "xla",
) -> Float[Array, "b l n d"]:
    """softmax(q k^T / sqrt(d)) v for n heads of width d; the softmax is in float32.

    Args:
      q, k, v: in any type of floating-point numbers.
      implementation: "xla" (the formula), "flash" (kernels), or "auto" for the faster one.
    """
    attend = flash_attention if choose(implementation, q, k) == "flash" else formula
    return attend(q, k, v)
