"""How images are resized before their features are taken; protocols of evaluation differ in it."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from dmf.encoders.inception import SIDE


def resize_for_inception(
    images: Shaped[Array, "b h w c"], size: int = SIDE
) -> Float[Array, "b {size} {size} c"]:
    """Images of 0 to 255 as the Inception graph of 2015-12-05 takes them: [b, size, size, c] in
    about [-1, 1].

    Bilinear between source coordinates i * side / size: no half-pixel shift, no antialiasing,
    clamped at the far border; then (x - 128) / 128.

    Args:
      images: [b, h, w, c], uint8 or floating point, values of 0 to 255.
      size: the new height and width.
    """
    rows, columns = (_linear_matrix(side, size) for side in images.shape[1:3])
    resized = jnp.einsum(
        "ih,jw,bhwc->bijc", rows, columns, images.astype(jnp.float32), precision="highest"
    )
    return (resized - 128) / 128


def _linear_matrix(inputs: int, outputs: int) -> np.ndarray:
    """[outputs, inputs] float32 weights of linear interpolation along one axis."""
    places = np.arange(outputs) * np.float32(inputs / outputs)
    low = np.floor(places).astype(int)
    matrix = np.zeros((outputs, inputs))
    np.add.at(matrix, (np.arange(outputs), low), 1 - (places - low))
    np.add.at(matrix, (np.arange(outputs), np.minimum(low + 1, inputs - 1)), places - low)
    return matrix.astype(np.float32)
