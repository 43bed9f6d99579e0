"""Rotary positions: queries and keys are turned by angles that grow with the position of a token.

Adjacent channels (2i, 2i + 1) of a head are one pair, seen as a complex number; the logits of a
query and a key then depend on the difference of their positions (RoFormer, arXiv:2104.09864).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_THETA = 10000.0


class Rotation(NamedTuple):
    """The angle of each token and channel; both channels of a pair have the same.

    Attributes:
      cos, sin: [l, d] float32.
    """

    cos: np.ndarray | jax.Array
    sin: np.ndarray | jax.Array


def sequence_rotation(length: int, width: int) -> Rotation:
    """Angles along one sequence: token n turns pair i by n / 10000^(2i / width).

    Args:
      length: number of tokens l.
      width: width of a head, even.
    """
    frequencies = _THETA ** (-np.arange(width // 2) / (width / 2))
    return _rotation(np.arange(length)[:, None] * frequencies)


def grid_rotation(prefix: int, side: int, width: int) -> Rotation:
    """Angles on a grid: rows turn the first half of the pairs, columns the second half.

    Args:
      prefix: number of tokens before those of the grid; they are not turned.
      side: height and width of the grid, whose tokens are in order of rows.
      width: width of a head, a multiple of 4.
    """
    frequencies = _THETA ** (-np.arange(width // 4) / (width / 4))
    row, column = np.divmod(np.arange(side * side), side)
    angles = [position[:, None] * frequencies for position in (row, column)]
    return _rotation(np.pad(np.concatenate(angles, axis=1), ((prefix, 0), (0, 0))))


def _rotation(angles: Float[np.ndarray, "l pairs"]) -> Rotation:
    """The rotation by an angle of each token and pair, computed in float64."""
    angles = np.repeat(angles, 2, axis=1)
    return Rotation(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


def rotate(x: Float[Array, "b l n d"], rotation: Rotation) -> Float[Array, "b l n d"]:
    """Queries or keys, turned in float32; the result has the dtype of x."""
    wide = x.astype(jnp.float32)
    # i (a + i b) = -b + i a for each pair (a, b); TPUs would pad an axis of length 2.
    is_real = np.arange(x.shape[-1])[None, None, None] % 2 == 0
    turned = jnp.where(is_real, -jnp.roll(wide, -1, axis=-1), jnp.roll(wide, 1, axis=-1))
    cos, sin = (part[None, :, None] for part in rotation)
    return (wide * cos + turned * sin).astype(x.dtype)
