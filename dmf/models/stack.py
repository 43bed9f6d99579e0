"""Blocks one after the other: scanned or unrolled, recomputed in the backward pass or kept.

The parameters of all blocks are stacked on a leading depth axis, and stay so: a part of the stack
is run without copying it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dmf.models.layers import Tokens, Vectors
from dmf.typing import Params

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def run_blocks(
    block: Callable[[Params, Tokens, Vectors], Tokens],
    stack: Params,
    tokens: Tokens,
    conditions: dict[str, Vectors],
    sources: str,
    start: int,
    stop: int,
    *,
    scan: bool,
    remat: str,
) -> Tokens:
    """Blocks start..stop-1 of a stack.

    Args:
      block: (parameters of one, tokens [b, l, d], condition [b, d]) -> tokens.
      stack: parameters of all, each leaf stacked by depth.
      tokens: [b, l, d], what goes in.
      conditions: what blocks see, by the letter of its source.
      sources: that of each block of the stack, a letter each.
      start, stop: which blocks.
      scan: by `lax.scan`, for short compilation, or unrolled.
      remat: of `REMAT_POLICIES`, what the backward pass recomputes.
    """
    if start == stop:
        return tokens
    some, whole = sources[start:stop], (start, stop) == (0, len(sources))
    only = conditions[some[0]] if len(set(some)) == 1 else None

    def step(tokens: Tokens, given: tuple[Params, jax.Array, dict[str, jax.Array]]) -> Any:
        own, place, sees = given
        if scan and remat != "none" and not whole:
            own = _block_of(stack, place, own)
        return block(own, tokens, only if only is not None else _chosen(conditions, sees)), None

    if remat != "none":
        # Inside a scan the loop itself keeps XLA from merging the recomputation away.
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=not scan)
    sees = {letter: jnp.asarray([letter == of for of in sources])
            for letter in conditions if letter in sources}
    given = (stack, jnp.arange(len(sources)), sees)
    if scan:
        part = given if whole else jax.tree.map(lambda leaf: leaf[start:stop], given)
        return jax.lax.scan(step, tokens, part)[0]
    # Cut all at once, so that the gradients of the blocks are put together once.
    cut = jax.tree.map(lambda leaf: jax.lax.split(leaf, (1,) * len(sources)), given)
    for i in range(start, stop):
        own = jax.tree.map(lambda _, pieces, i=i: pieces[i][0], given, cut)
        tokens, _ = step(tokens, own)
    return tokens


def _chosen(conditions: dict[str, Vectors], sees: dict[str, jax.Array]) -> Vectors:
    """The condition that a block sees."""
    first, *others = sees
    chosen = conditions[first]
    for letter in others:
        chosen = jnp.where(sees[letter], conditions[letter], chosen)
    return chosen


@jax.custom_jvp
def _block_of(stack: Params, place: jax.Array, own: Params) -> Params:
    """One block's parameters, taken from the stack of all; the derivative is that of `own`.

    To scan over a part of a stack, JAX would copy that part. Here the numbers are read in place,
    and `own`, the copy, which gradients go through, is never made.
    """
    return jax.tree.map(lambda leaf: leaf[place], stack)


@_block_of.defjvp
def _tangent_of_block(primals: Any, tangents: Any) -> tuple[Params, Params]:
    return _block_of(*primals), tangents[2]
