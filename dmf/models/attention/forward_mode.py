"""Forward mode for an attention that has reverse mode alone.

Flash attention of the libraries has a backward pass but no tangent. MeanFlow needs both from one
linearisation: `h, pull = jax.vjp(f, x)`, and the tangent by `jax.linear_transpose` of `pull`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero, linear_call

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def with_forward_mode(attend: Attention, attend_with_jvp: Callable[..., Any]) -> Attention:
    """`attend` with its own backward pass, and with forward mode from `attend_with_jvp`.

    The derivative is a linear map that is given together with its transpose (`linear_call`): the
    map is the tangent of `attend_with_jvp`, the transpose is the backward pass of `attend`. JAX can
    transpose such a pair any number of times.

    It is of first order: the derivative of the tangent is taken to be zero. In MeanFlow the tangent
    enters the target alone, which carries no gradient. Differentiating a gradient is an error.

    Args:
      attend: (q, k, v) -> o, a function that `jax.vjp` takes, such as a `jax.custom_vjp`.
      attend_with_jvp: (q, k, v, dq, dk, dv) -> (o, do).

    Returns:
      A function like `attend` for `jax.grad`, `jax.vjp`, `jax.jvp`, `jax.linearize` and
      `jax.linear_transpose` of their results, for `jax.grad` of a function that uses `jax.jvp`,
      and within `jax.jit`, `jax.lax.scan` and `jax.checkpoint`; not for `jax.vmap`.
    """

    linear = _linear_with_transpose(attend, attend_with_jvp)

    @jax.custom_jvp
    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v)

    @jax.custom_jvp
    def with_residuals(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        """o, and the residuals of the backward pass other than q, k and v themselves."""
        o, pull = jax.vjp(attend, q, k, v)
        _, positions = _backward_structure(attend, (q, k, v))
        leaves = zip(jax.tree.leaves(pull), positions, strict=True)
        return o, [leaf for leaf, position in leaves if position is None]

    def with_residuals_jvp(primals: Any, tangents: Any) -> Any:
        # This calls `with_residuals` and not `jax.vjp`: differentiated once more, it meets this
        # rule again, and not the library's forward pass, which has no forward mode.
        o, residuals = with_residuals(*primals)
        do = linear(residuals, primals, _without_zeros(tangents))
        return (o, residuals), (do, jax.tree.map(_zero_tangent, residuals))

    def attention_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        o, residuals = with_residuals(*primals)
        return o, linear(residuals, primals, _without_zeros(tangents))

    with_residuals.defjvp(with_residuals_jvp, symbolic_zeros=True)
    attention.defjvp(attention_jvp, symbolic_zeros=True)
    return attention


def _linear_with_transpose(
    attend: Attention, attend_with_jvp: Callable[..., Any]
) -> Callable[..., jax.Array]:
    """The derivative of `attend` as a linear map of the tangents of q, k and v.

    Returns:
      (residuals, primals, tangents) -> do. `residuals` are those of the backward pass other than
      the primals; `tangents` has None in place of those that are zero. The derivative of the map
      itself is zero.
    """

    @jax.custom_jvp
    def linear(residuals: Any, primals: Any, tangents: Any) -> jax.Array:
        backward, positions = _backward_structure(attend, primals)

        def tangent(constants: Any, tangents: Any) -> jax.Array:
            _, primals = constants
            dense = (jnp.zeros_like(x) if dx is None else dx
                     for x, dx in zip(primals, tangents, strict=True))  # fmt: skip
            return attend_with_jvp(*primals, *dense)[1]

        def transpose(constants: Any, cotangent: jax.Array) -> Any:
            residuals, primals = iter(constants[0]), constants[1]
            leaves = [next(residuals) if i is None else primals[i] for i in positions]
            gradients = jax.tree.unflatten(backward, leaves)(cotangent)
            return tuple(None if dx is None else gradient
                         for gradient, dx in zip(gradients, tangents, strict=True))  # fmt: skip

        return linear_call(tangent, transpose, (residuals, primals), tangents)

    @linear.defjvp
    def linear_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        do = linear(*primals)
        return do, jnp.zeros_like(do)

    return linear


def _backward_structure(attend: Attention, primals: Any) -> tuple[Any, list[int | None]]:
    """The tree structure of the backward pass of `jax.vjp`, and for each of its leaves the index of
    the primal that it is, or None for another residual."""
    structures = []

    def trace(*primals: jax.Array) -> jax.Array:
        o, pull = jax.vjp(attend, *primals)
        leaves, tree = jax.tree.flatten(pull)
        positions = [next((i for i, x in enumerate(primals) if x is leaf), None) for leaf in leaves]
        structures.append((tree, positions))
        return o

    jax.eval_shape(trace, *primals)
    return structures[0]


def _without_zeros(tangents: Any) -> Any:
    """The tangents, with None in place of those that are zero: a linear call is transposed with
    respect to all of its inputs."""
    return tuple(None if isinstance(dx, SymbolicZero) else dx for dx in tangents)


def _zero_tangent(x: jax.Array) -> jax.Array | np.ndarray:
    """The zero tangent of an array, whose dtype is float0 for an array of integers."""
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)
