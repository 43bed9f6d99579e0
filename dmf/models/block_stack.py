"""A stack of equal transformer blocks: scanned or unrolled, with or without rematerialisation.

The parameters of all blocks are stacked on a leading depth axis and stay so: a range of blocks runs
without a copy of its parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dmf.models.linear import Tokens, Vectors
from dmf.types import Params

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class BlockInputs(NamedTuple):
    """The inputs that differ from block to block, with or without a leading depth axis.

    Attributes:
      params: parameters of the block.
      index: position of the block in the stack.
      uses: by time letter, whether the block is conditioned on that time.
    """

    params: Params
    index: jax.Array
    uses: dict[str, jax.Array]


def run_blocks(
    block: Callable[[Params, Tokens, Any], Tokens],
    params: Params,
    tokens: Tokens,
    conditions: dict[str, Any],
    block_times: str,
    start: int,
    stop: int,
    *,
    scan: bool,
    remat: str,
) -> Tokens:
    """Runs the blocks start, ..., stop - 1 of a stack.

    Args:
      block: (parameters of one block, tokens [b, l, d], condition) -> tokens [b, l, d].
      params: parameters of all blocks, each leaf stacked on a leading depth axis.
      tokens: [b, l, d] input of the first block that runs.
      conditions: [b, d] condition vectors by time letter; any tree where there is one letter.
      block_times: time letter of each block of the stack.
      start, stop: range of the blocks to run.
      scan: whether to use `lax.scan`, for short compilation, or to unroll the blocks.
      remat: one of `REMAT_POLICIES`, what the backward pass recomputes.

    Returns:
      Tokens [b, l, d] after block stop - 1.
    """
    if start == stop:
        return tokens
    depth, times = len(block_times), set(block_times[start:stop])
    runs_all = (start, stop) == (0, depth)
    common = conditions[block_times[start]] if len(times) == 1 else None

    def step(tokens: Tokens, inputs: BlockInputs) -> tuple[Tokens, None]:
        block_params, index, uses = inputs
        if scan and remat != "none" and not runs_all:
            block_params = _read_in_place(params, index, block_params)
        condition = _select(conditions, uses) if common is None else common
        return block(block_params, tokens, condition), None

    if remat != "none":
        # Inside a scan the loop itself keeps XLA from merging the recomputation away.
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=not scan)
    inputs = BlockInputs(params, jnp.arange(depth), _uses(conditions, block_times))
    if scan:
        part = inputs if runs_all else jax.tree.map(lambda leaf: leaf[start:stop], inputs)
        return jax.lax.scan(step, tokens, part)[0]
    # One split of each leaf, so that the gradients of the blocks are concatenated once.
    pieces = jax.tree.map(lambda leaf: jax.lax.split(leaf, (1,) * depth), inputs)
    for i in range(start, stop):
        block_inputs = jax.tree.map(lambda _, pieces, i=i: pieces[i][0], inputs, pieces)
        tokens, _ = step(tokens, block_inputs)
    return tokens


def _uses(conditions: dict[str, Any], block_times: str) -> dict[str, jax.Array]:
    """By time letter, whether each block is conditioned on that time: [depth] bool."""
    return {letter: jnp.asarray([time == letter for time in block_times])
            for letter in conditions if letter in block_times}


def _select(conditions: dict[str, Vectors], uses: dict[str, jax.Array]) -> Vectors:
    """The condition of a block: of the time letter that `uses` marks."""
    first, *others = uses
    selected = conditions[first]
    for letter in others:
        selected = jnp.where(uses[letter], conditions[letter], selected)
    return selected


@jax.custom_jvp
def _read_in_place(stack: Params, index: jax.Array, block_params: Params) -> Params:
    """The parameters of block `index`, without a copy of the blocks that are scanned.

    `stack[index]` and `block_params` are the same numbers. `block_params` is the scan's slice of
    `stack[start:stop]`, which JAX would first copy out of the stack. So the value is read from the
    stack, and XLA drops the copy, which nothing uses. The derivative is that of `block_params`:
    through it the scan collects the gradient of each block once, where through `stack` every
    iteration would add to a gradient of the size of the whole stack.
    """
    return jax.tree.map(lambda leaf: leaf[index], stack)


@_read_in_place.defjvp
def _read_in_place_jvp(primals: Any, tangents: Any) -> tuple[Params, Params]:
    _, _, block_params_tangent = tangents
    return _read_in_place(*primals), block_params_tangent
