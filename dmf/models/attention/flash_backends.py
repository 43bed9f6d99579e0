"""Flash attention of established libraries, one for each platform: forward and backward pass.

All of them have reverse mode alone (`jax.vjp`, `jax.grad`). The residuals of a backward pass hold
q, k and v as the function received them. So these functions take the layout of their library, and
the caller converts a network's arrays to it once for all passes.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float

from dmf.errors import InputError
from dmf.models.attention.dot_product import Keys, Queries, dot_product_attention

# Tokens per block: the first that divides their number, padded to a multiple of 128. One block
# holds all keys of a network for images of 256 x 256 (256 tokens, or with in-context conditioning
# 276, padded to 384), and then one pass computes the gradients of queries and keys together.
SPLASH_BLOCKS = (512, 384, 256, 128)
CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)
# The head width is padded to a multiple of the first, and is at most the second.
CUDNN_WIDTH_MULTIPLE, CUDNN_MAX_WIDTH = 8, 128


def tpu_attention(
    q: Float[Array, "b n l d"],
    k: Float[Array, "b n s d"],
    v: Float[Array, "b n s d"],
    *,
    interpret: bool = False,
) -> Float[Array, "b n l d"]:
    """softmax(q k^T) v by splash attention, a Pallas kernel that comes with JAX.

    Like splash attention it takes heads before tokens, and does not scale. For the backward pass it
    saves one number per query beside q, k, v and o. JAX's older `flash_attention` saves 256, which
    at 256 keys is as much as the weights themselves.

    Args:
      q: [b, n, l, d] scaled queries.
      k, v: [b, n, s, d] keys and values.
      interpret: run the kernel as plain JAX operations, on any platform.
    """
    lengths = q.shape[2], k.shape[2]
    padded = [-(-length // SPLASH_BLOCKS[-1]) * SPLASH_BLOCKS[-1] for length in lengths]
    q, k, v = (
        x if length == x.shape[2] else jnp.pad(x, _padding_after(length - x.shape[2]))
        for x, length in zip((q, k, v), (padded[0], padded[1], padded[1]), strict=True)
    )
    # A query attends to the keys of its own segment: 0 for tokens, 1 for padding.
    segments = splash.SegmentIds(
        *((jnp.arange(padded_length) >= length).astype(jnp.int32)
          for padded_length, length in zip(padded, lengths, strict=True))
    ) if tuple(padded) != lengths else None  # fmt: skip
    block_q, block_k = (next(n for n in SPLASH_BLOCKS if length % n == 0) for length in padded)
    fused = block_k == padded[1]
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.FullMask(tuple(padded))] * q.shape[1]),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_q_dq=None if fused else block_q,
            block_kv_dq=None if fused else block_k,
            use_fused_bwd_kernel=fused,
        ),
    )
    o = jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q, k, v)
    return o[:, :, : lengths[0]]


def _padding_after(count: int) -> tuple[tuple[int, int], ...]:
    """`count` tokens of padding, after the others."""
    return (0, 0), (0, 0), (0, count), (0, 0)


def cudnn_takes(q: Queries) -> bool:
    """Whether cuDNN has flash attention for this dtype and head width."""
    return q.dtype in CUDNN_DTYPES and q.shape[-1] <= CUDNN_MAX_WIDTH


def gpu_attention(q: Queries, k: Keys, v: Keys) -> Queries:
    """softmax(q k^T / sqrt(d)) v by cuDNN's flash attention.

    Args:
      q: [b, l, n, d] queries, bfloat16 or float16, d <= 128.
      k, v: [b, s, n, d] keys and values, of the same dtype.

    Raises:
      InputError: cuDNN has no kernel for this dtype or head width.
    """
    width = q.shape[-1]
    if not cudnn_takes(q):
        raise InputError(
            "model.attention", "flash",
            f"cuDNN takes bfloat16 and heads up to {CUDNN_MAX_WIDTH} wide, not {q.dtype} and "
            f"{width}; choose auto or xla",
        )
    padding = -width % CUDNN_WIDTH_MULTIPLE
    if padding:
        q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, padding),)) for x in (q, k, v))
    o = jax.nn.dot_product_attention(q, k, v, scale=width**-0.5, implementation="cudnn")
    return o[..., :width]


@jax.custom_vjp
def cpu_attention(q: Queries, k: Keys, v: Keys) -> Queries:
    """A stand-in where there is no library: plain operations, with reverse mode alone."""
    return dot_product_attention(q, k, v)


cpu_attention.defvjp(
    lambda q, k, v: (dot_product_attention(q, k, v), (q, k, v)),
    lambda residuals, cotangent: jax.vjp(dot_product_attention, *residuals)[1](cotangent),
)
