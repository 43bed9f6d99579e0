"""Scaled dot-product attention as networks call it, and the choice of its implementation."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from dmf.errors import InputError
from dmf.models.attention import flash_backends, jvp_kernel
from dmf.models.attention.dot_product import Keys, Queries, dot_product_attention
from dmf.models.attention.forward_mode import Attention, with_forward_mode
from dmf.models.attention.kernel_sharding import (
    can_shard_kernels,
    has_cudnn_attention,
    head_shards,
    shard_kernel,
    target_platform,
)

IMPLEMENTATIONS = ("auto", "xla", "flash")
# "auto" takes flash attention from this number of keys on. Plain operations write and read float32
# logits and their softmax, some 10 bytes for each pair of tokens; a kernel reads and writes q, k, v
# and o alone, 8 bytes per token and channel. With heads 72 wide (128 in memory) that is 2.5 times
# less at 256 tokens, and at 128 no gain worth the start of the kernel. The 276 tokens of an
# in-context network are padded to 384 on a TPU, and the kernel still moves 1.9 times less.
FLASH_MIN_KEYS = 256


class Kernels(NamedTuple):
    """The two kernels of a platform.

    Attributes:
      attend: a library's attention, which has reverse mode alone.
      attend_with_jvp: our attention with its tangent.
      heads_first: whether they take [b, n, l, d] and a scaled q, instead of [b, l, n, d].
    """

    attend: Attention
    attend_with_jvp: Callable[..., Any]
    heads_first: bool = False


KERNELS = {
    "tpu": Kernels(
        flash_backends.tpu_attention, jvp_kernel.heads_first_attention_jvp, heads_first=True
    ),
    "gpu": Kernels(
        flash_backends.gpu_attention, partial(jvp_kernel.attention_jvp, platform="gpu")
    ),
    # For tests: much slower than plain operations.
    "cpu": Kernels(
        flash_backends.cpu_attention,
        partial(jvp_kernel.attention_jvp, platform="tpu", interpret=True),
    ),
}


def attention(
    q: Float[Array, "b l n d"],
    k: Float[Array, "b l n d"],
    v: Float[Array, "b l n d"],
    implementation: str = "xla",
) -> Float[Array, "b l n d"]:
    """softmax(q k^T / sqrt(d)) v for n heads of width d; the softmax is in float32.

    Args:
      q, k, v: queries, keys and values [b, l, n, d], of any floating-point dtype.
      implementation: "xla" (plain JAX operations), "flash" (kernels), or "auto" for the faster one.

    Returns:
      [b, l, n, d] in the dtype of v.
    """
    flash = choose_implementation(implementation, q, k) == "flash"
    attend = flash_attention if flash else dot_product_attention
    return attend(q, k, v)


def choose_implementation(name: str, q: Queries, k: Keys) -> str:
    """The implementation that a name stands for, with these queries and keys: "xla" or "flash".

    "auto" is "flash" from FLASH_MIN_KEYS keys on, on TPUs, and on NVIDIA GPUs where cuDNN takes the
    arrays and JAX has Pallas for Triton, if the mesh in context divides the heads. It is "xla"
    otherwise, and always where there are several devices but no mesh in context to shard a kernel
    over. Other names are returned as they are.
    """
    if name != "auto":
        return name
    kernels_for_gpus = has_cudnn_attention() and jvp_kernel.triton_module() is not None
    fast = {"tpu": True, "gpu": kernels_for_gpus and flash_backends.cudnn_takes(q)}
    fits = k.shape[1] >= FLASH_MIN_KEYS and q.shape[2] % head_shards() == 0
    return "flash" if fast.get(target_platform(), False) and fits and can_shard_kernels() else "xla"


def flash_attention(q: Queries, k: Keys, v: Keys) -> Queries:
    """softmax(q k^T / sqrt(d)) v by kernels, without b n l s numbers in memory.

    The forward and the backward pass are kernels of a library (`flash_backends`), the tangent is a
    kernel of ours (`jvp_kernel`). `forward_mode` says what can be differentiated and how often,
    `kernel_sharding` which device a kernel is traced for and how it is split over a mesh.

    Args:
      q: [b, l, n, d] queries, bfloat16 or float32; on GPUs bfloat16 alone.
      k, v: [b, s, n, d] keys and values, of the same dtype.

    Raises:
      InputError: there is no kernel for these arrays, this platform or this mesh.
    """
    platform = target_platform()
    if platform not in KERNELS:
        raise InputError(
            "model.attention", "flash",
            f"there is no kernel for {platform}; choose auto or xla",
        )
    batch, _, heads, _ = q.shape
    *kernels, heads_first = KERNELS[platform]
    head_axis = 1 if heads_first else 2
    attend = with_forward_mode(*(shard_kernel(x, batch, heads, head_axis) for x in kernels))
    return (from_heads_first(attend) if heads_first else attend)(q, k, v)


def from_heads_first(attend: Attention) -> Attention:
    """Attention of [b, l, n, d], from a function of [b, n, l, d] that does not scale q."""

    def attention(q: Queries, k: Keys, v: Keys) -> Queries:
        swapped = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        return attend(*swapped).swapaxes(1, 2)

    return attention
