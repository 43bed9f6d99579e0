"""Raw errors by the times they were made at: means over the cells of a grid of (t, r), or of t.

An error goes into its cell as a pair, (error, 1), and into all others as (0, 0). Whatever the pairs
are averaged over, samples, devices or steps, the quotient of the two averages is the mean over the
samples in the cell.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dmf.typing import InputError, PerSample, Times

MOST = 32


def check(bins: int) -> None:
    """Raises InputError where so many bins cannot be."""
    if not 0 <= bins <= MOST:
        raise InputError(f"objective.bins={bins}: give 0, for none, or the number of bins of each "
                         f"time, at most {MOST}")


def binned(
    name: str, error: PerSample, bins: int, *times: Times
) -> dict[str, Float[Array, "b 2 *cells"]]:
    """The pairs of each sample, as a metric; none without bins.

    Args:
      name: of the error.
      error: of each sample.
      bins: into how many equal parts [0, 1] is cut; 1 itself is in the last.
      times: of each sample, one for each axis of the grid.
    """
    if not bins:
        return {}
    inside = jnp.ones(error.shape)
    for time in times:
        place = jnp.clip(jnp.floor(time * bins), 0, bins - 1).astype(jnp.int32)
        inside = inside[..., None] * jnp.expand_dims(
            jax.nn.one_hot(place, bins), tuple(range(1, inside.ndim))
        )
    weighted = inside * error.reshape(-1, *(1,) * len(times))
    return {f"{name}_bins": jax.lax.stop_gradient(jnp.stack([weighted, inside], axis=1))}


def named(name: str, pairs: Float[np.ndarray, "2 *cells"]) -> dict[str, float]:
    """The mean of each cell that a sample was in, as "NAME/t_0.25-0.50/r_0.00-0.25".

    Args:
      name: of the metric that `binned` gave.
      pairs: its mean over samples.
    """
    top, (sums, counts) = name.removesuffix("_bins"), pairs
    means = {}
    for cell in zip(*np.nonzero(counts), strict=True):
        spans = [_span("tr"[axis], place, len(counts)) for axis, place in enumerate(cell)]
        means["/".join([top, *spans])] = float(sums[cell] / counts[cell])
    return means


def _span(axis: str, place: Any, bins: int) -> str:
    """The name of a bin of a time."""
    return f"{axis}_{place / bins:.2f}-{(place + 1) / bins:.2f}"
