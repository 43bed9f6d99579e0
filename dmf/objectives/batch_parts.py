"""A batch in two parts, each with a loss of its own.

Where a share of the samples has a more expensive loss, a mask over the whole batch would compute
both losses for every sample. Two parts compute each loss for its own samples alone. Samples are
independent and identically distributed, so it does not matter which rows are in which part.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dmf.errors import InputError
from dmf.runtime.sharding import constrain_batch


def check_share(field: str, share: float) -> None:
    """Raises InputError where a share of the batch leaves nothing for one of two parts."""
    if not 0 < share < 1:
        raise InputError(field, share, "a share of the batch lies between 0 and 1")


def split_batch(rows: Any, share: float, field: str) -> tuple[Any, Any]:
    """Two parts of the rows: (1 - share) of them, and `share` of them.

    Of each few neighbouring rows, the last ones are in the second part: no row of a sharded batch
    moves to another device if the share of the rows of a device is a whole number.

    >>> first, second = split_batch(jnp.arange(8), 0.25, "objective.share")
    >>> first.tolist(), second.tolist()
    ([0, 1, 2, 4, 5, 6], [3, 7])

    Args:
      rows: pytree of arrays [b, ...].
      share: in (0, 1), the share of rows in the second part.
      field: name of the share in the config, for the error.

    Returns:
      Two pytrees like `rows`, of arrays [(1 - share) b, ...] and [share b, ...].

    Raises:
      InputError: the share of the rows is no whole number.
    """
    count = len(jax.tree.leaves(rows)[0])
    group, size = _group(count, share, field)

    def part(where: slice) -> Any:
        def rows_of(x: jax.Array) -> jax.Array:
            grouped = x.reshape(-1, group, *x.shape[1:])[:, where]
            return constrain_batch(grouped.reshape(-1, *x.shape[1:]))

        return jax.tree.map(rows_of, rows)

    return part(slice(group - size)), part(slice(group - size, None))


def join_batch(first: Any, second: Any) -> Any:
    """The rows of both parts of `split_batch` in their former order.

    >>> join_batch(*split_batch(jnp.arange(8), 0.25, "objective.share")).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def rows_of(a: jax.Array, b: jax.Array) -> jax.Array:
        groups = math.gcd(len(a), len(b))
        grouped = [x.reshape(groups, -1, *x.shape[1:]) for x in (a, b)]
        joined = jnp.concatenate(grouped, axis=1)
        return constrain_batch(joined.reshape(-1, *a.shape[1:]))

    return jax.tree.map(rows_of, first, second)


def _group(count: int, share: float, field: str) -> tuple[int, int]:
    """The number of neighbouring rows that are divided alike, and how many of them are in the
    second part."""
    size = round(share * count)
    if not 0 < size < count or not math.isclose(size, share * count, rel_tol=1e-6):
        raise InputError(field, share, f"it is no whole number of {count} samples, which is what a "
                         "microbatch has (on one device, with sum_gradients=once); choose another "
                         "data.batch_size or gradient_accumulation")
    groups = math.gcd(size, count - size)
    return count // groups, size // groups
