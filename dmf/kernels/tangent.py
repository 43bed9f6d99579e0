"""Attention and its tangent in one pass over the keys: a Pallas kernel for TPU and NVIDIA GPUs.

With s = q k^T / sqrt(d), p = softmax(s) and o = p v, along (dq, dk, dv):

    ds = (dq k^T + q dk^T) / sqrt(d)
    do = (p * ds) v + p dv - (sum over keys of p * ds) o

Both are accumulated block by block of keys with a running maximum and a running sum, as in
FlashAttention (arXiv:2205.14135), so that nothing of size l x s is ever in memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jaxtyping import Array, Float

from dmf.kernels.formula import Keys, Queries, formula

# Queries, and keys, at a time on a TPU: the first that divides their number, filled up to 128s.
TPU_BLOCKS = (512, 256, 128)
# What a block's logits and sums may take of a TPU core's own memory, beside keys and values.
TPU_MEMORY = 16 * 2**20
TPU_LANES = 128
GPU_QUERIES = 64


def reference(
    q: Queries, k: Keys, v: Keys, dq: Queries, dk: Keys, dv: Keys
) -> tuple[Queries, Queries]:
    """What `attention_with_tangent` gives, by `jax.jvp` of the formula, in float32 throughout."""
    primals, tangents = (
        tuple(x.astype(jnp.float32) for x in group) for group in ((q, k, v), (dq, dk, dv))
    )
    with jax.default_matmul_precision("highest"):
        o, do = jax.jvp(formula, primals, tangents)
    return o.astype(q.dtype), do.astype(q.dtype)


def attention_with_tangent(
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
      q, k, v: of any length and any width d, bfloat16 or float32.
      dq, dk, dv: their tangents, of the same shapes and types.
      platform: whose layout and blocks to use, "tpu" (by Mosaic) or "gpu" (by Triton).
      interpret: do it in plain JAX operations instead, on any platform.

    Returns:
      Two arrays like q. All sums are taken in float32.
    """
    if platform == "gpu":
        return _on_gpu((q, dq), (k, v, dk, dv), interpret)
    swapped = (x.swapaxes(1, 2) for x in (q, k, v, dq, dk, dv))
    o, do = heads_first(*swapped, scale=q.shape[-1] ** -0.5, interpret=interpret)
    return o.swapaxes(1, 2), do.swapaxes(1, 2)


def heads_first(
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
    """softmax(scale q k^T) v and its tangent on TPUs, which tile the last two dimensions."""
    (batch, heads, length, width), count = q.shape, k.shape[2]
    queries, keys = (
        [_lengthened(x, TPU_BLOCKS[-1], axis=2) for x in group]
        for group in ((q, dq), (k, v, dk, dv))
    )
    block_q, block_k = (
        next(n for n in TPU_BLOCKS if x.shape[2] % n == 0) for x in (queries[0], keys[0])
    )
    some = pl.BlockSpec((None, None, block_q, width), lambda b, n, i: (b, n, i, 0))
    every = pl.BlockSpec((None, None, keys[0].shape[2], width), lambda b, n, i: (b, n, 0, 0))
    outputs = pl.pallas_call(
        functools.partial(
            _kernel, scale=scale, count=count, block_k=block_k, load=_load, store=_store
        ),
        grid=(batch, heads, queries[0].shape[2] // block_q),
        in_specs=[some] * 2 + [every] * 4,
        out_specs=[some] * 2,
        out_shape=[jax.ShapeDtypeStruct(queries[0].shape, queries[0].dtype)] * 2,
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel",) * 3,
            vmem_limit_bytes=TPU_MEMORY + 2 * sum(map(_tpu_bytes, keys)),
        ),
        interpret=interpret,
        name="attention_with_tangent",
    )(*queries, *keys)
    o, do = (x[:, :, :length] for x in outputs)
    return o, do


def _on_gpu(
    queries: tuple[Queries, ...], keys: tuple[Keys, ...], interpret: bool
) -> tuple[Queries, Queries]:
    """Arrays as they lie; a block is as wide as the next power of two, zero beyond the width."""
    # Here, as JAX means to drop it one day; what else this module does goes on without.
    from jax.experimental.pallas import triton

    (batch, length, heads, width), count = queries[0].shape, keys[0].shape[1]
    wide = max(pl.next_power_of_2(width), 16)
    block_q, block_k = GPU_QUERIES, 32 if wide > 64 else 64
    queries = [_lengthened(x, block_q) for x in queries]
    keys = [_lengthened(x, block_k) for x in keys]

    def inside() -> jax.Array:
        return jax.lax.broadcasted_iota(jnp.int32, (1, wide), 1) < width

    def load(ref: Any) -> jax.Array:
        return triton.load(ref, mask=inside(), other=0.0)

    def store(ref: Any, x: jax.Array) -> None:
        triton.store(ref, x, mask=inside())

    access = (load, store) if wide > width else (_load, _store)
    some = pl.BlockSpec((None, block_q, None, wide), lambda i, n, b: (b, i, n, 0))
    every = pl.BlockSpec((None, keys[0].shape[1], None, wide), lambda i, n, b: (b, 0, n, 0))
    o, do = pl.pallas_call(
        functools.partial(
            _kernel, scale=width**-0.5, count=count, block_k=block_k, load=access[0],
            store=access[1],
        ),
        grid=(queries[0].shape[1] // block_q, heads, batch),
        in_specs=[some] * 2 + [every] * 4,
        out_specs=[some] * 2,
        out_shape=[jax.ShapeDtypeStruct(queries[0].shape, queries[0].dtype)] * 2,
        compiler_params=triton.CompilerParams(num_warps=8 if wide > 64 else 4, num_stages=2),
        interpret=interpret,
        name="attention_with_tangent",
    )(*queries, *keys)  # fmt: skip
    return o[:, :length], do[:, :length]


def _tpu_bytes(x: Float[Array, "b n s d"]) -> int:
    """What one head of x takes there; the next head's comes while this one's is used."""
    width = -(-x.shape[3] // TPU_LANES) * TPU_LANES
    return x.shape[2] * width * x.dtype.itemsize


def _lengthened(x: Float[Array, "_ _ _ _"], multiple: int, axis: int = 1) -> jax.Array:
    """x with zeros after it along an axis, up to a multiple of so many places."""
    extra = -x.shape[axis] % multiple
    pads = [(0, extra if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pads) if extra else x


def _load(ref: Any) -> jax.Array:
    return ref[...]


def _store(ref: Any, x: jax.Array) -> None:
    ref[...] = x


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A product of matrices, summed in float32; how exact one of float32 is, JAX's config says."""
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
    """A block of queries of one head against all keys, of which the first `count` are true ones.

    The running sums of exp(s - m) times 1, ds, v and so on belong to the running maximum m.
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
            place = i * block_k + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            s = jnp.where(place < count, s, -jnp.inf)
        higher = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
        decay, p = jnp.exp(m - higher), jnp.exp(s - higher)
        dp = p * ds
        total = total * decay + jnp.sum(p, axis=1, keepdims=True)
        slope = slope * decay + jnp.sum(dp, axis=1, keepdims=True)
        p, dp = p.astype(v.dtype), dp.astype(v.dtype)
        o = o * decay + _dot(p, v, (1, 0))
        do = do * decay + _dot(dp, v, (1, 0)) + _dot(p, dv, (1, 0))
        return higher, total, slope, o, do

    column = jnp.zeros((q.shape[0], 1), jnp.float32)
    none = jnp.zeros(q.shape, jnp.float32)
    start = (column - jnp.inf, column, column, none, none)
    # A loop of one step only hides the step from the compiler.
    _, total, slope, o, do = (
        step(0, start) if blocks == 1 else jax.lax.fori_loop(0, blocks, step, start)
    )
    o = o / total
    store(o_ref, o.astype(o_ref.dtype))
    store(do_ref, (do / total - (slope / total) * o).astype(do_ref.dtype))
