"""Flash attention of well-kept libraries, one for each platform: forward and backward pass.

All can be differentiated in reverse mode alone, with `jax.vjp` and `jax.grad`. What a backward pass
keeps is q, k and v as they were given, and more: so layouts are the libraries' own, and what a
network has is brought into them before, once for all passes.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float

from dmf.kernels.formula import Keys, Queries, formula
from dmf.typing import InputError

# Places at a time: the first that divides their number, filled up to 128s. One block holds the
# keys of a network for images of 256 x 256 (256 places), and the two gradients come from one pass.
SPLASH_BLOCKS = (512, 256, 128)
CUDNN_TYPES = (jnp.bfloat16, jnp.float16)
CUDNN_WIDTH, CUDNN_WIDEST = 8, 128


def on_tpu(
    q: Float[Array, "b n l d"],
    k: Float[Array, "b n s d"],
    v: Float[Array, "b n s d"],
    *,
    interpret: bool = False,
) -> Float[Array, "b n l d"]:
    """softmax(q k^T) v by splash attention, a Pallas kernel that comes with JAX: heads before
    places, and no scale, as splash takes them.

    Beside q, k, v and o it keeps one number a query for the backward pass, where its older
    sibling `flash_attention` keeps 256: at 256 keys no less than the weights themselves.
    """
    lengths = q.shape[2], k.shape[2]
    padded = [-(-length // SPLASH_BLOCKS[-1]) * SPLASH_BLOCKS[-1] for length in lengths]
    q, k, v = (
        x if length == x.shape[2] else jnp.pad(x, _after(length - x.shape[2]))
        for x, length in zip((q, k, v), (padded[0], padded[1], padded[1]), strict=True)
    )
    # A place sees those of its own kind: the true ones each other, and the ones filled in too.
    kinds = splash.SegmentIds(
        *((jnp.arange(all_) >= true).astype(jnp.int32)
          for all_, true in zip(padded, lengths, strict=True))
    ) if tuple(padded) != lengths else None  # fmt: skip
    block_q, block_k = (next(n for n in SPLASH_BLOCKS if length % n == 0) for length in padded)
    together = block_k == padded[1]
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
            block_q_dq=None if together else block_q,
            block_kv_dq=None if together else block_k,
            use_fused_bwd_kernel=together,
        ),
    )
    o = jax.vmap(lambda q, k, v: kernel(q, k, v, kinds))(q, k, v)
    return o[:, :, : lengths[0]]


def _after(count: int) -> tuple[tuple[int, int], ...]:
    """Padding of so many places after those there are."""
    return (0, 0), (0, 0), (0, count), (0, 0)


def cudnn_takes(q: Queries) -> bool:
    """Whether cuDNN has flash attention for this type and width."""
    return q.dtype in CUDNN_TYPES and q.shape[-1] <= CUDNN_WIDEST


def on_gpu(q: Queries, k: Keys, v: Keys) -> Queries:
    """softmax(q k^T / sqrt(d)) v by cuDNN's flash attention, for bfloat16 and widths to 128.

    Raises:
      InputError: cuDNN has none for this type or width.
    """
    width = q.shape[-1]
    if not cudnn_takes(q):
        raise InputError(f"model.attention=flash: cuDNN takes bfloat16 and heads up to "
                         f"{CUDNN_WIDEST} wide, not {q.dtype} and {width}; choose auto or xla")
    extra = -width % CUDNN_WIDTH
    if extra:
        q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, extra),)) for x in (q, k, v))
    o = jax.nn.dot_product_attention(q, k, v, scale=width**-0.5, implementation="cudnn")
    return o[..., :width]


@jax.custom_vjp
def on_cpu(q: Queries, k: Keys, v: Keys) -> Queries:
    """A stand-in where there is no library: the formula, with the same limits as the others."""
    return formula(q, k, v)


on_cpu.defvjp(
    lambda q, k, v: (formula(q, k, v), (q, k, v)),
    lambda saved, ct: jax.vjp(formula, *saved)[1](ct),
)
