"""Whether a sampler keeps to the protocol of `dmf.sampling.samplers.Sampler`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmf.errors import InputError

# Rounding of a time in float32, with a shift.
_ROUNDING = 1e-5


def check_schedule(sampler: Any, steps: int, times: Any) -> None:
    """Checks the schedule of a sampler: its shape, and where they are known, its times.

    >>> from dmf.sampling.samplers import Euler
    >>> check_schedule(Euler(), 2, jnp.array([1.0, 0.5]))
    Traceback (most recent call last):
    dmf.errors.InputError: sampler=Euler: its schedule has shape (2,); 2 steps have 3 times, from \
1 to 0

    Args:
      sampler: the sampler.
      steps: number of steps.
      times: what its `schedule` returned.

    Raises:
      InputError: these are not steps + 1 times that fall from 1 to 0.
    """
    name, shape = type(sampler).__name__, jnp.shape(times)
    if shape != (steps + 1,):
        raise InputError("sampler", name, f"its schedule has shape {shape}; {steps} steps have "
                         f"{steps + 1} times, from 1 to 0")
    if isinstance(times, jax.core.Tracer):
        return
    values = np.asarray(times, np.float32)
    is_right = np.allclose(values[[0, -1]], (1, 0), rtol=0, atol=_ROUNDING)
    if not (is_right and (np.diff(values) <= 0).all()):
        raise InputError("sampler", name, f"its schedule goes from {values[0]:.4g} to "
                         f"{values[-1]:.4g}; times fall from 1 to 0")


def check_step(sampler: Any, before: tuple[jax.Array, Any], after: Any) -> None:
    """Checks what one step of a sampler returned.

    Args:
      sampler: the sampler.
      before: (x, carry) before the step.
      after: what its `step` returned.

    Raises:
      InputError: it is not (x, carry) with x, and all arrays of carry, in their shapes.
    """
    name = type(sampler).__name__
    if not (isinstance(after, tuple) and len(after) == 2):
        raise InputError("sampler", name, f"its step returned a {type(after).__name__}; return two "
                         "things, x at t_next and carry, which is () where init carries nothing")
    (x, carry), (x_next, next_carry) = before, after
    shapes = [f"{jnp.shape(each)} {jnp.result_type(each)}" for each in (x, x_next)]
    if shapes[0] != shapes[1]:
        raise InputError("sampler", name, f"its step returned x of shape and dtype {shapes[1]}; "
                         f"return x at t_next, as {shapes[0]}")
    forms = [(jax.tree.structure(tree), list(map(jnp.shape, jax.tree.leaves(tree))))
             for tree in (carry, next_carry)]
    if forms[0] != forms[1]:
        raise InputError("sampler", name, "its step returned another carry than init, of the "
                         f"shapes {forms[1][1]}; return one like it, of the shapes {forms[0][1]}")
