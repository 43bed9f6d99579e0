"""Attention and its tangent in one pass over the keys: a Pallas kernel for TPU and NVIDIA GPUs.

With s = q k^T / sqrt(d), p = softmax(s) and o = p v, along (dq, dk, dv):

    ds = (dq k^T + q dk^T) / sqrt(d)
    do = (p * ds) v + p dv - (sum over keys of p * ds) o

Both are accumulated block by block of keys with a running maximum and a running sum, as in
FlashAttention (arXiv:2205.14135), so that no array of size l x s is ever in memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jaxtyping import Array, Float

from dmf.models.attention.dot_product import Keys, Queries, dot_product_attention

# Queries and keys per block on a TPU: the first that divides their number, padded to a multiple of
# 128.
TPU_BLOCKS = (512, 256, 128)
# Bytes of a TPU core's vector memory for the logits and sums of a block, beside keys and values.
TPU_BLOCK_BYTES = 16 * 2**20
TPU_LANES = 128
GPU_QUERY_BLOCK = 64


def attention_jvp_reference(
    q: Queries, k: Keys, v: Keys, dq: Queries, dk: Keys, dv: Keys
) -> tuple[Queries, Queries]:
    """The result of `attention_jvp`, by `jax.jvp` of plain operations in float32."""
    primals, tangents = (
        tuple(x.astype(jnp.float32) for x in group) for group in ((q, k, v), (dq, dk, dv))
    )
    with jax.default_matmul_precision("highest"):
        o, do = jax.jvp(dot_product_attention, primals, tangents)
    return o.astype(q.dtype), do.astype(q.dtype)


def attention_jvp(
    q: Queries,
    k: Keys,
    v: Keys,
    dq: Queries,
    dk: Keys,
    dv: Keys,
    *,
    platform: str,
    interpret: bool = False,
) -> tuple[Queries, Queries]:
    """softmax(q k^T / sqrt(d)) v for n heads, and its tangent along (dq, dk, dv).

    Args:
      q: [b, l, n, d] queries of any length and width, bfloat16 or float32.
      k, v: [b, s, n, d] keys and values, of the same dtype.
      dq, dk, dv: tangents of q, k and v, of the same shapes and dtypes.
      platform: whose layout and blocks to use, "tpu" (by Mosaic) or "gpu" (by Triton).
      interpret: run the kernel as plain JAX operations, on any platform.

    Returns:
      (o, do), two arrays like q. All sums are in float32.
    """
    if platform == "gpu":
        return _on_gpu((q, dq), (k, v, dk, dv), interpret)
    swapped = (x.swapaxes(1, 2) for x in (q, k, v, dq, dk, dv))
    o, do = heads_first_attention_jvp(*swapped, scale=q.shape[-1] ** -0.5, interpret=interpret)
    return o.swapaxes(1, 2), do.swapaxes(1, 2)


def heads_first_attention_jvp(
    q: Float[Array, "b n l d"],
    k: Float[Array, "b n s d"],
    v: Float[Array, "b n s d"],
    dq: Float[Array, "b n l d"],
    dk: Float[Array, "b n s d"],
    dv: Float[Array, "b n s d"],
    *,
    scale: float = 1.0,
    interpret: bool = False,
) -> tuple[Float[Array, "b n l d"], Float[Array, "b n l d"]]:
    """softmax(scale q k^T) v and its tangent, as `attention_jvp`, on TPUs.

    Heads come before tokens, as TPUs tile the last two axes.
    """
    (batch, heads, length, width), count = q.shape, k.shape[2]
    queries, keys = (
        [_padded(x, TPU_BLOCKS[-1], axis=2) for x in group]
        for group in ((q, dq), (k, v, dk, dv))
    )
    block_q, block_k = (
        next(n for n in TPU_BLOCKS if x.shape[2] % n == 0) for x in (queries[0], keys[0])
    )
    query_spec = pl.BlockSpec((None, None, block_q, width), lambda b, n, i: (b, n, i, 0))
    key_spec = pl.BlockSpec((None, None, keys[0].shape[2], width), lambda b, n, i: (b, n, 0, 0))
    outputs = pl.pallas_call(
        functools.partial(
            _kernel, scale=scale, count=count, block_k=block_k, load=_load, store=_store
        ),
        grid=(batch, heads, queries[0].shape[2] // block_q),
        in_specs=[query_spec] * 2 + [key_spec] * 4,
        out_specs=[query_spec] * 2,
        out_shape=[jax.ShapeDtypeStruct(queries[0].shape, queries[0].dtype)] * 2,
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel",) * 3,
            # Keys and values count twice: those of the next head are loaded meanwhile.
            vmem_limit_bytes=TPU_BLOCK_BYTES + 2 * sum(map(_tpu_bytes, keys)),
        ),
        interpret=interpret,
        name="attention_jvp",
    )(*queries, *keys)
    o, do = (x[:, :, :length] for x in outputs)
    return o, do


def _on_gpu(
    queries: tuple[Queries, ...], keys: tuple[Keys, ...], interpret: bool
) -> tuple[Queries, Queries]:
    """(o, do) in the layout [b, l, n, d].

    Triton's blocks have a power of two as their width; loads are zero beyond the head width.
    """
    # Imported here, so that the rest of this module works with a JAX without Triton.
    from jax.experimental.pallas import triton

    (batch, length, heads, width), count = queries[0].shape, keys[0].shape[1]
    block_width = max(pl.next_power_of_2(width), 16)
    block_q, block_k = GPU_QUERY_BLOCK, 32 if block_width > 64 else 64
    queries = [_padded(x, block_q) for x in queries]
    keys = [_padded(x, block_k) for x in keys]

    def in_width() -> jax.Array:
        return jax.lax.broadcasted_iota(jnp.int32, (1, block_width), 1) < width

    def load(ref: Any) -> jax.Array:
        return triton.load(ref, mask=in_width(), other=0.0)

    def store(ref: Any, x: jax.Array) -> None:
        triton.store(ref, x, mask=in_width())

    access = (load, store) if block_width > width else (_load, _store)
    query_spec = pl.BlockSpec((None, block_q, None, block_width), lambda i, n, b: (b, i, n, 0))
    key_spec = pl.BlockSpec(
        (None, keys[0].shape[1], None, block_width), lambda i, n, b: (b, 0, n, 0)
    )
    o, do = pl.pallas_call(
        functools.partial(
            _kernel, scale=width**-0.5, count=count, block_k=block_k, load=access[0],
            store=access[1],
        ),
        grid=(queries[0].shape[1] // block_q, heads, batch),
        in_specs=[query_spec] * 2 + [key_spec] * 4,
        out_specs=[query_spec] * 2,
        out_shape=[jax.ShapeDtypeStruct(queries[0].shape, queries[0].dtype)] * 2,
        compiler_params=triton.CompilerParams(num_warps=8 if block_width > 64 else 4, num_stages=2),
        interpret=interpret,
        name="attention_jvp",
    )(*queries, *keys)  # fmt: skip
    return o[:, :length], do[:, :length]


def _tpu_bytes(x: Float[Array, "b n s d"]) -> int:
    """Bytes of one head of x in TPU memory, where the last axis is padded to whole lanes."""
    width = -(-x.shape[3] // TPU_LANES) * TPU_LANES
    return x.shape[2] * width * x.dtype.itemsize


def _padded(x: Float[Array, "_ _ _ _"], multiple: int, axis: int = 1) -> jax.Array:
    """x padded with zeros at the end of an axis, to a multiple of `multiple`."""
    padding = -x.shape[axis] % multiple
    pads = [(0, padding if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pads) if padding else x


def _load(ref: Any) -> jax.Array:
    return ref[...]


def _store(ref: Any, x: jax.Array) -> None:
    ref[...] = x


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A matmul, summed in float32; JAX's config sets the precision of one of float32 matrices."""
    precision = None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _kernel(
    q_ref: Any,
    dq_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    o_ref: Any,
    do_ref: Any,
    *,
    scale: float,
    count: int,
    block_k: int,
    load: Callable[[Any], jax.Array],
    store: Callable[[Any, jax.Array], None],
) -> None:
    """One block of queries of one head against all keys; those from `count` on are padding.

    The running sums are of exp(s - m) times 1, ds, v and so on, with the running maximum m.
    """
    q, dq = load(q_ref), load(dq_ref)
    blocks = k_ref.shape[0] // block_k

    def step(i: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        m, total, slope, o, do = sums
        rows = pl.ds(i * block_k, block_k)
        k, v, dk, dv = (load(ref.at[rows, :]) for ref in (k_ref, v_ref, dk_ref, dv_ref))
        s = _dot(q, k, (1, 1)) * scale
        ds = (_dot(dq, k, (1, 1)) + _dot(q, dk, (1, 1))) * scale
        if count < blocks * block_k:
            key_index = i * block_k + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            s = jnp.where(key_index < count, s, -jnp.inf)
        new_m = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
        decay, p = jnp.exp(m - new_m), jnp.exp(s - new_m)
        dp = p * ds
        total = total * decay + jnp.sum(p, axis=1, keepdims=True)
        slope = slope * decay + jnp.sum(dp, axis=1, keepdims=True)
        p, dp = p.astype(v.dtype), dp.astype(v.dtype)
        o = o * decay + _dot(p, v, (1, 0))
        do = do * decay + _dot(dp, v, (1, 0)) + _dot(p, dv, (1, 0))
        return new_m, total, slope, o, do

    column = jnp.zeros((q.shape[0], 1), jnp.float32)
    none = jnp.zeros(q.shape, jnp.float32)
    start = (column - jnp.inf, column, column, none, none)
    # The compiler sees through a single step, but not through a loop around it.
    _, total, slope, o, do = (
        step(0, start) if blocks == 1 else jax.lax.fori_loop(0, blocks, step, start)
    )
    o = o / total
    store(o_ref, o.astype(o_ref.dtype))
    store(do_ref, (do / total - (slope / total) * o).astype(do_ref.dtype))
