"""Attention that can be differentiated both ways, out of one that can only in reverse.

Flash attention of the libraries has a backward pass and no tangent; MeanFlow needs both, of one
linearisation: `h, pull = jax.vjp(f, x)`, with the tangent by `jax.linear_transpose` of `pull`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero, linear_call

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def differentiable(attend: Attention, attend_with_tangent: Callable[..., Any]) -> Attention:
    """`attend`, with its own backward pass, and with forward mode from `attend_with_tangent`.

    A linear map and its transpose are given as a pair: going forwards it is the second function,
    going backwards the backward pass of the first, and JAX may transpose it as often as it likes.

    To first order: the tangent itself is not differentiated, its derivative is taken as zero. In
    MeanFlow the tangent enters the target alone, which carries no gradient. A gradient cannot be
    differentiated once more: JAX stops with an error.

    Args:
      attend: (q, k, v) -> o, a function that `jax.vjp` takes, such as a `jax.custom_vjp`.
      attend_with_tangent: (q, k, v, dq, dk, dv) -> (o, do).

    Returns:
      A function like `attend` for `jax.grad`, `jax.vjp`, `jax.jvp`, `jax.linearize` and
      `jax.linear_transpose` of their results, for `jax.grad` of a function that uses `jax.jvp`,
      and within `jax.jit`, `jax.lax.scan` and `jax.checkpoint`; not for `jax.vmap`.
    """

    @jax.custom_jvp
    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v)

    @jax.custom_jvp
    def saving(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """o, and what the backward pass needs beside q, k and v, which are kept for the tangent."""
        o, pull = jax.vjp(attend, q, k, v)
        _, places = _shape_of_backward(attend, (q, k, v))
        leaves = zip(jax.tree.leaves(pull), places, strict=True)
        return o, [leaf for leaf, place in leaves if place is None]

    @jax.custom_jvp
    def linear(saved: Any, primals: Any, tangents: Any) -> jax.Array:
        """do, from what the backward pass needs and from tangents, None for those that are zero."""
        backward, places = _shape_of_backward(attend, primals)

        def tangent(known: Any, tangents: Any) -> jax.Array:
            _, primals = known
            whole = (jnp.zeros_like(x) if dx is None else dx
                     for x, dx in zip(primals, tangents, strict=True))  # fmt: skip
            return attend_with_tangent(*primals, *whole)[1]

        def transpose(known: Any, cotangent: jax.Array) -> Any:
            saved, primals = iter(known[0]), known[1]
            leaves = [next(saved) if place is None else primals[place] for place in places]
            gradients = jax.tree.unflatten(backward, leaves)(cotangent)
            return tuple(None if dx is None else gradient
                         for gradient, dx in zip(gradients, tangents, strict=True))  # fmt: skip

        return linear_call(tangent, transpose, (saved, primals), tangents)

    @linear.defjvp
    def no_derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        do = linear(*primals)
        return do, jnp.zeros_like(do)

    def forward_saving(primals: Any, tangents: Any) -> Any:
        # Not the `jax.vjp` itself: where this is differentiated once more, the rule must serve
        # again, and not the derivatives of a library's forward pass, which has none.
        o, saved = saving(*primals)
        do = linear(saved, primals, _nonzero(tangents))
        return (o, saved), (do, jax.tree.map(_zero, saved))

    def forward(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        o, saved = saving(*primals)
        return o, linear(saved, primals, _nonzero(tangents))

    saving.defjvp(forward_saving, symbolic_zeros=True)
    attention.defjvp(forward, symbolic_zeros=True)
    return attention


def _shape_of_backward(attend: Attention, primals: Any) -> tuple[Any, list[int | None]]:
    """The tree of `jax.vjp`'s function, and which of its leaves are which of the primals."""
    found = []

    def look(*primals: jax.Array) -> jax.Array:
        o, pull = jax.vjp(attend, *primals)
        leaves, tree = jax.tree.flatten(pull)
        places = [next((i for i, x in enumerate(primals) if x is leaf), None) for leaf in leaves]
        found.append((tree, places))
        return o

    jax.eval_shape(look, *primals)
    return found[0]


def _nonzero(tangents: Any) -> Any:
    """None in place of those that are zero; a linear call is transposed in all or in none."""
    return tuple(None if isinstance(dx, SymbolicZero) else dx for dx in tangents)


def _zero(x: jax.Array) -> jax.Array | np.ndarray:
    """The tangent zero of any array; that of whole numbers has a type of its own."""
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)
