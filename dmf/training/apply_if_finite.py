"""Skipped steps: where the loss or the gradient is not finite, only the step number moves.

The counts of skipped steps are part of the optimizer's state, so that a resumed run continues them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ApplyIfFiniteState(NamedTuple):
    """The state of an optimizer that may skip steps. Leaves may also be shapes or shardings.

    Attributes:
      inner_state: state of the inner optimizer.
      consecutive_skips: number of steps skipped since the last one that was applied, int32 scalar.
      total_skips: number of steps skipped since the first step, int32 scalar.
    """

    inner_state: Any
    consecutive_skips: Any
    total_skips: Any


def apply_if_finite(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose state does not change in steps that are not finite.

    It differs from `optax.apply_if_finite`: the caller says whether the step is finite, because the
    loss may not be where the gradient is; schedules advance in skipped steps too; and it never
    applies an update that is not finite.

    Args:
      optimizer: the inner optimizer.

    Returns:
      A transformation whose `update` takes the keyword argument `finite`, a bool scalar. Where it
      is false, the moments stay as they are; the updates are those of the inner optimizer, and the
      caller does not apply them (see `select_finite`).
    """

    def init(params: Any) -> ApplyIfFiniteState:
        return ApplyIfFiniteState(
            optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        )

    def update(
        gradient: Any, state: ApplyIfFiniteState, params: Any = None, *, finite: jax.Array
    ) -> tuple[Any, ApplyIfFiniteState]:
        updates, inner_state = optimizer.update(gradient, state.inner_state, params)
        return updates, ApplyIfFiniteState(
            _select_state(finite, inner_state, state.inner_state),
            jnp.where(finite, 0, state.consecutive_skips + 1),
            state.total_skips + ~finite,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _select_state(finite: jax.Array, new: Any, old: Any) -> Any:
    """The inner state after a step; a schedule counts all steps, skipped or not."""
    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda new, old: new if is_schedule(new) else select_finite(finite, new, old),
        new, old, is_leaf=is_schedule,
    )  # fmt: skip


def select_finite(finite: jax.Array, new: Any, old: Any) -> Any:
    """The tree `new` where the step is finite, and `old` where it is skipped.

    Args:
      finite: bool scalar.
      new: tree of arrays after the step.
      old: tree of arrays before the step, of the same structure.
    """
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def skip_metrics(opt_state: Any) -> dict[str, jax.Array]:
    """The counts of skipped steps, as metrics; {} for an optimizer that skips none."""
    if not isinstance(opt_state, ApplyIfFiniteState):
        return {}
    return {
        "consecutive_skipped_steps": opt_state.consecutive_skips,
        "skipped_steps": opt_state.total_skips,
    }
