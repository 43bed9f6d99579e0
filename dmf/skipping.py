"""Steps whose loss or gradient is not finite, skipped: nothing moves but the step number.

Counts are kept with the optimizer's moments, so that a run that resumes goes on counting.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Skipping(NamedTuple):
    """The state of an optimizer that may skip steps.

    Attributes:
      moments: of the optimizer itself.
      in_a_row: steps skipped since the last that was not, int32 scalar.
      in_all: steps skipped since the first, int32 scalar.
    """

    moments: Any
    in_a_row: jax.Array
    in_all: jax.Array


def skipping(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer, whose `update` also takes `finite`, a bool scalar: where it is false, moments
    stay as they are. Schedules go on, as they follow the step number."""

    def init(params: Any) -> Skipping:
        return Skipping(optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(
        gradient: Any, state: Skipping, params: Any = None, *, finite: jax.Array
    ) -> tuple[Any, Skipping]:
        updates, moments = optimizer.update(gradient, state.moments, params)
        return updates, Skipping(
            _moments(finite, moments, state.moments),
            jnp.where(finite, 0, state.in_a_row + 1),
            state.in_all + ~finite,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _moments(finite: jax.Array, new: Any, old: Any) -> Any:
    """Moments of a step; the count of a schedule is that of steps, skipped or not."""
    of_schedule = lambda part: isinstance(part, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(
        lambda new, old: new if of_schedule(new) else unless(finite, new, old),
        new, old, is_leaf=of_schedule,
    )  # fmt: skip


def unless(finite: jax.Array, new: Any, old: Any) -> Any:
    """A tree, or the one before where a step is skipped."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def counts(state: Any) -> dict[str, jax.Array]:
    """What metrics say of an optimizer's state; nothing where no step is ever skipped."""
    if not isinstance(state, Skipping):
        return {}
    return {"skipped_in_a_row": state.in_a_row, "skipped_steps": state.in_all}
