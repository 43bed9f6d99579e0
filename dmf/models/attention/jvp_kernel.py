"""Attention and its tangent in one pass over the keys: a Pallas kernel for TPU and NVIDIA GPUs.

With s = q k^T / sqrt(d), p = softmax(s) and o = p v, along (dq, dk, dv):

    ds = (dq k^T + q dk^T) / sqrt(d)
    do = (p * ds) v + p dv - (sum over keys of p * ds) o

Both are accumulated block by block of keys with a running maximum and a running sum, as in
FlashAttention (arXiv:2205.14135), so that no array of size l x s is ever in memory.
"""

import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jaxtyping import Array, Float

from dmf.errors import InputError
from dmf.models.attention.dot_product import Keys, Queries, dot_product_attention
from dmf.models.attention.kernel_sharding import HOPPER, compute_capability

# A matrix in parts of its columns.
Parts = tuple[jax.Array, ...]
# Queries and keys per block on a TPU: the first that divides their number, padded to a multiple of
# 128.
TPU_BLOCKS = (512, 384, 256, 128)
# Bytes of a TPU core's vector memory for the logits and sums of a block, beside keys and values.
TPU_BLOCK_BYTES = 16 * 2**20
TPU_LANES = 128
# On a GPU 4 warps compute a block of 64 queries, 16 each, and on Hopper these are a group that uses
# the tensor cores together; more warps would repeat part of the work. With 2 stages, the next block
# of keys is loaded meanwhile.
GPU_QUERY_BLOCK, GPU_WARPS, GPU_STAGES = 64, 4, 2
# Tensor cores take 16 channels at a time, and a block of Triton has a power of two of them. Wider
# blocks than 64 spill on Ampere.
GPU_MIN_PART, GPU_MAX_PART = 16, 64


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

    Raises:
      InputError: the platform is "gpu", and the installed JAX has no Pallas for Triton.
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
    """(o, do) in the layout [b, l, n, d]."""
    triton = triton_module()
    if triton is None:
        raise InputError("model.attention", "flash", "the installed JAX has no Pallas for Triton, "
                         "which the kernel for GPUs needs; choose auto or xla")  # fmt: skip
    (batch, length, heads, width), count = queries[0].shape, keys[0].shape[1]
    block_q, block_k, parts = GPU_QUERY_BLOCK, gpu_key_block(width), gpu_width_parts(width)
    queries = [_padded(x, block_q) for x in queries]
    keys = [_padded(x, block_k) for x in keys]

    def in_width(part: pl.Slice) -> dict[str, Any]:
        """Arguments of a load or store that leaves out the channels beyond the head width."""
        if part.start + part.size <= width:
            return {}
        channels = part.start + jax.lax.broadcasted_iota(jnp.int32, (1, part.size), 1)
        return {"mask": channels < width}

    def load(ref: Any, rows: Any) -> Parts:
        return tuple(
            triton.load(ref.at[rows, part], **mask, **({"other": 0.0} if mask else {}))
            for part, mask in ((part, in_width(part)) for part in parts)
        )

    def store(ref: Any, values: Parts) -> None:
        for part, x in zip(parts, values, strict=True):
            triton.store(ref.at[:, part], x, **in_width(part))

    block_width = parts[-1].start + parts[-1].size
    query_spec = pl.BlockSpec((None, block_q, None, block_width), lambda i, n, b: (b, i, n, 0))
    key_spec = pl.BlockSpec(
        (None, keys[0].shape[1], None, block_width), lambda i, n, b: (b, 0, n, 0)
    )
    o, do = pl.pallas_call(
        functools.partial(
            # A GPU computes powers of two; exp would be one more multiplication.
            _kernel, scale=width**-0.5, count=count, block_k=block_k, load=load, store=store,
            exp=jnp.exp2, exp_scale=math.log2(math.e),
        ),
        grid=(queries[0].shape[1] // block_q, heads, batch),
        in_specs=[query_spec] * 2 + [key_spec] * 4,
        out_specs=[query_spec] * 2,
        out_shape=[jax.ShapeDtypeStruct(queries[0].shape, queries[0].dtype)] * 2,
        compiler_params=triton.CompilerParams(num_warps=GPU_WARPS, num_stages=GPU_STAGES),
        interpret=interpret,
        name="attention_jvp",
    )(*queries, *keys)  # fmt: skip
    return o[:, :length], do[:, :length]


def triton_module() -> ModuleType | None:
    """Pallas for Triton, or None in a JAX without it: JAX 0.12 says that it will be removed."""
    try:
        return importlib.import_module("jax.experimental.pallas.triton")
    except ImportError:
        return None


def gpu_key_block(width: int) -> int:
    """Keys per block on the GPU that is traced for: the most that its registers hold without
    spilling, and its shared memory twice (`python -m benchmarks.gpu_kernels`).

    Args:
      width: head width.
    """
    padded = -(-width // GPU_MIN_PART) * GPU_MIN_PART
    if compute_capability() == HOPPER:
        return 64 if padded <= 80 else 32
    return 32 if padded <= 96 else 16


def gpu_width_parts(width: int) -> tuple[pl.Slice, ...]:
    """The channels of a head in parts that Triton takes: powers of two, with little padding.

    >>> gpu_width_parts(72)
    (Slice(start=0, size=64, stride=1), Slice(start=64, size=16, stride=1))
    """
    parts, start = [], 0
    while start < width:
        rest = -(-(width - start) // GPU_MIN_PART) * GPU_MIN_PART
        size = min(GPU_MAX_PART, 1 << (rest.bit_length() - 1))
        parts.append(pl.ds(start, size))
        start += size
    return tuple(parts)


def _tpu_bytes(x: Float[Array, "b n s d"]) -> int:
    """Bytes of one head of x in TPU memory, where the last axis is padded to whole lanes."""
    width = -(-x.shape[3] // TPU_LANES) * TPU_LANES
    return x.shape[2] * width * x.dtype.itemsize


def _padded(x: Float[Array, "_ _ _ _"], multiple: int, axis: int = 1) -> jax.Array:
    """x padded with zeros at the end of an axis, to a multiple of `multiple`."""
    padding = -x.shape[axis] % multiple
    pads = [(0, padding if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pads) if padding else x


def _load(ref: Any, rows: Any) -> Parts:
    return (ref[rows, :],)


def _store(ref: Any, values: Parts) -> None:
    (ref[...],) = values


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A matmul, summed in float32; JAX's config sets the precision of one of float32 matrices."""
    precision = None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _sum_of_dots(a: Parts, b: Parts) -> jax.Array:
    """a b^T of two matrices in parts of their columns."""
    return functools.reduce(jnp.add, (_dot(x, y, (1, 1)) for x, y in zip(a, b, strict=True)))


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
    load: Callable[[Any, Any], Parts],
    store: Callable[[Any, Parts], None],
    exp: Callable[[jax.Array], jax.Array] = jnp.exp,
    exp_scale: float = 1.0,
) -> None:
    """One block of queries of one head against all keys; those from `count` on are padding.

    The running sums are of exp(s - m) times 1, ds, v and so on, with the running maximum m, where s
    and m are in units in which `exp` is the exponential: exp(s) is e to the power of s / exp_scale.
    """
    q, dq = load(q_ref, slice(None)), load(dq_ref, slice(None))
    blocks = k_ref.shape[0] // block_k

    def step(i: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        m, total, slope, o, do = sums
        rows = pl.ds(i * block_k, block_k)
        k, v, dk, dv = (load(ref, rows) for ref in (k_ref, v_ref, dk_ref, dv_ref))
        s = _sum_of_dots(q, k) * (scale * exp_scale)
        ds = _sum_of_dots(dq + q, k + dk) * scale
        if count < blocks * block_k:
            key_index = i * block_k + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
            s = jnp.where(key_index < count, s, -jnp.inf)
        new_m = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
        decay, p = exp(m - new_m), exp(s - new_m)
        dp = p * ds
        total = total * decay + jnp.sum(p, axis=1, keepdims=True)
        slope = slope * decay + jnp.sum(dp, axis=1, keepdims=True)
        p, dp = p.astype(v[0].dtype), dp.astype(v[0].dtype)
        o = tuple(a * decay + _dot(p, b, (1, 0)) for a, b in zip(o, v, strict=True))
        do = tuple(
            a * decay + _dot(dp, b, (1, 0)) + _dot(p, db, (1, 0))
            for a, b, db in zip(do, v, dv, strict=True)
        )
        return new_m, total, slope, o, do

    column = jnp.zeros((q[0].shape[0], 1), jnp.float32)
    none = tuple(jnp.zeros(x.shape, jnp.float32) for x in q)
    start = (column - jnp.inf, column, column, none, none)
    # The compiler sees through a single step, but not through a loop around it.
    _, total, slope, o, do = (
        step(0, start) if blocks == 1 else jax.lax.fori_loop(0, blocks, step, start)
    )
    inverse = 1 / total  # A division for each query, and not for each channel too.
    o = tuple(x * inverse for x in o)
    do = tuple(dx * inverse - (slope * inverse) * x for x, dx in zip(o, do, strict=True))
    for ref, values in ((o_ref, o), (do_ref, do)):
        store(ref, tuple(x.astype(ref.dtype) for x in values))
