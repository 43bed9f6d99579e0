"""Mean errors by time: over the cells of a grid of t, or of (t, r).

Each sample adds the pair (error, 1) to its cell and (0, 0) to all others. The pairs are then
averaged over samples, devices and steps; the quotient of the two averages is the mean error of the
samples in a cell.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dmf.errors import InputError
from dmf.types import PerSample, Times

MAX_TIME_BINS = 32


def check_time_bins(bins: int) -> None:
    """Raises InputError where the number of time bins is negative or too large."""
    if not 0 <= bins <= MAX_TIME_BINS:
        raise InputError(
            "time_bins", bins,
            f"give 0, for none, or the number of bins of each time, at most {MAX_TIME_BINS}",
        )


def binned_errors(
    name: str, error: PerSample, bins: int, *times: Times
) -> dict[str, Float[Array, "b 2 *cells"]]:
    """The pairs (error, 1) of each sample by cell, as the metric "NAME_bins"; {} without bins.

    Args:
      name: name of the error.
      error: [b] errors.
      bins: number n of equal parts of [0, 1] along each time; the time 1 is in the last.
      times: [b] times, one argument for each axis of the grid.

    Returns:
      {"NAME_bins": [b, 2, n, ...]}, without gradient.
    """
    if not bins:
        return {}
    one_hot = jnp.ones(error.shape)
    for time in times:
        cell = jnp.clip(jnp.floor(time * bins), 0, bins - 1).astype(jnp.int32)
        one_hot = one_hot[..., None] * jnp.expand_dims(
            jax.nn.one_hot(cell, bins), tuple(range(1, one_hot.ndim))
        )
    weighted = one_hot * error.reshape(-1, *(1,) * len(times))
    return {f"{name}_bins": jax.lax.stop_gradient(jnp.stack([weighted, one_hot], axis=1))}


def bin_means(name: str, pairs: Float[np.ndarray, "2 *cells"]) -> dict[str, float]:
    """The mean error of each cell that has samples, as "NAME/t_0.25-0.50/r_0.00-0.25".

    Args:
      name: name of the metric that `binned_errors` returned.
      pairs: its mean over samples.
    """
    top, (sums, counts) = name.removesuffix("_bins"), pairs
    means = {}
    for cell in zip(*np.nonzero(counts), strict=True):
        spans = [_span("tr"[axis], place, len(counts)) for axis, place in enumerate(cell)]
        means["/".join([top, *spans])] = float(sums[cell] / counts[cell])
    return means


def _span(axis: str, place: Any, bins: int) -> str:
    """The name of a time bin, for example "t_0.25-0.50"."""
    return f"{axis}_{place / bins:.2f}-{(place + 1) / bins:.2f}"
