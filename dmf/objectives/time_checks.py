"""Whether time samplers that users registered draw times, before a run starts."""

import dataclasses
from typing import Any

import jax
import numpy as np

from dmf.errors import InputError
from dmf.objectives.interpolants import LINEAR, Interpolant
from dmf.registry import at, config_fields, field_kind
from dmf.runtime.memoize import memoized

# Number of times that are drawn for the check.
DRAWS = 4096


def is_of_package(component: Any) -> bool:
    """Whether the class of a component is one of this package, and not of a user's file."""
    return type(component).__module__.startswith("dmf.")


def check_times(component: Any, interpolant: Interpolant | None = None) -> None:
    """Draws from each time sampler and time pair that an objective, or another component, holds.

    Those of this package are not drawn from: their tests do that for every field.

    Args:
      component: a dataclass, such as an objective.
      interpolant: the path that times are drawn for; that of the objective by default.

    Raises:
      InputError: times have another shape than asked for, lie outside of [0, 1], or do not have
        r <= t. The error names the field that holds the sampler.
    """
    path = interpolant or getattr(component, "interpolant", LINEAR)
    for name, field in config_fields(type(component)).items():
        kind, value = field_kind(field), getattr(component, name)
        if kind is None or not dataclasses.is_dataclass(value):
            continue
        with at(name):
            check_times(value, path)
        if kind in ("time_sampler", "time_pair") and not is_of_package(value):
            _check_draws(name, value, path, is_pair=kind == "time_pair")


@memoized
def _check_draws(name: str, sampler: Any, interpolant: Interpolant, *, is_pair: bool) -> None:
    """Raises InputError where a sampler draws no times, or no pairs of times."""

    def refuse(remedy: str) -> InputError:
        return InputError(name, type(sampler).__name__, remedy)

    times = jax.jit(lambda key: sampler(key, DRAWS, interpolant))(jax.random.key(0))
    if is_pair and not (isinstance(times, tuple) and len(times) == 2):
        raise refuse(f"it returned a {type(times).__name__}; return two arrays, (t, r)")
    times = tuple(map(np.asarray, times if is_pair else (times,)))
    for drawn in times:
        if drawn.shape != (DRAWS,):
            raise refuse(f"of {DRAWS} times it drew an array of shape {drawn.shape}; return one "
                         f"time for each sample, of shape ({DRAWS},)")
        if not ((drawn >= 0) & (drawn <= 1)).all():
            raise refuse(f"it drew times from {drawn.min():.4g} to {drawn.max():.4g}; times lie in "
                         "[0, 1], with 0 for data and 1 for noise")
    if is_pair and (times[1] > times[0]).any():
        raise refuse("it drew pairs with r > t; return (t, r) with r <= t")
