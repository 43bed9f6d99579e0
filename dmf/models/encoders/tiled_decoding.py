"""Decoding in overlapping tiles, so that memory does not grow with the image.

Tiles blend linearly where they overlap. The decoder of most autoencoders sees the whole image, by
attention or by normalisation, so that images differ from whole decoding. One with a property
`decoder_reach` depends on so many latents to each side of a pixel: nothing is taken from nearer to
the border of a tile, as far as the overlap permits, and an overlap of twice the reach gives the
images of whole decoding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dmf.errors import InputError, check_valid
from dmf.models.encoders.autoencoder import Autoencoder, Latents, latent_side
from dmf.types import Images


def check_tiles(component: Any) -> None:
    """Checks the field `decode_tiles` of a component.

    Raises:
      InputError: it is neither empty nor (side, overlap), whole numbers with side > overlap >= 0.
    """
    tiles = component.decode_tiles
    valid = not tiles or (len(tiles) == 2 and tiles[0] > tiles[1] >= 0)
    check_valid(component, valid, "decode_tiles", "give the side of a tile and a smaller overlap, "
                "in latents, for example (64, 16); or () to decode images whole")


def decoder_reach(autoencoder: Autoencoder) -> int | None:
    """How many latents to each side of a pixel the decoder depends on; None for the whole image."""
    return getattr(autoencoder, "decoder_reach", None)


def describe_tiles(tiles: tuple[int, ...], shape: tuple[int, ...], autoencoder: Autoencoder) -> str:
    """What a user should know of decoding in tiles; empty where images are those of whole decoding.

    Args:
      tiles: a valid `decode_tiles`, perhaps empty.
      shape: (h, w, c) of the latents of an image.
      autoencoder: whose decoder it is.

    Raises:
      InputError: a tile would be a whole image, or the autoencoder takes no other latents.
    """
    if not tiles:
        return ""
    if latent_side(autoencoder) is not None:
        raise InputError("decode_tiles", tiles, f"{type(autoencoder).__name__} takes latents of "
                         f"side {latent_side(autoencoder)} alone; give () to decode images whole")
    (tile, overlap), (height, width, _), reach = tiles, shape, decoder_reach(autoencoder)
    if tile >= max(height, width):
        raise InputError("decode_tiles", tiles, f"the latents of an image are {height} x {width}, "
                         "no larger than a tile; give a smaller side, or () to decode images whole")
    if reach is not None and overlap >= 2 * reach:
        return ""
    differ = f"sampling.decode_tiles={tiles}: images differ from those that are decoded whole"
    if reach is None:
        return f"{differ}, as the decoder of {type(autoencoder).__name__} sees the whole image"
    return f"{differ}, as the overlap is less than {2 * reach}"


def tile_starts(side: int, tile: int, overlap: int) -> tuple[int, ...]:
    """Where tiles begin along an axis; the last one ends with the axis.

    >>> tile_starts(128, tile=64, overlap=16)
    (0, 48, 64)

    Args:
      side: latents along the axis.
      tile: latents of a tile; <= `side`.
      overlap: latents that two neighbours share at least; < `tile`.
    """
    last = side - tile
    return (*range(0, last, tile - overlap), last)


def tile_weights(
    side: int, tile: int, overlap: int, *, factor: int, margin: int = 0
) -> Float[np.ndarray, "n pixels"]:
    """The weight of each pixel along an axis in each tile, whose sum over tiles is 1.

    >>> tile_weights(6, tile=4, overlap=2, factor=1).tolist()
    [[1.0, 1.0, 0.75, 0.25], [0.25, 0.75, 1.0, 1.0]]
    >>> tile_weights(6, tile=4, overlap=2, factor=1, margin=1).tolist()
    [[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]]

    Args:
      side, tile, overlap: as for `tile_starts`.
      factor: pixels of a latent along the axis.
      margin: latents at the inner borders of a tile whose weight is 0; <= `overlap` / 2.

    Returns:
      Weights in [0, 1], a row for each tile, tile * factor each, float64.
    """
    starts = tile_starts(side, tile, overlap)
    pixels = np.arange(tile * factor) + 0.5
    ramp = max(factor * (overlap - 2 * margin), 1)
    rising, total = np.clip((pixels - factor * margin) / ramp, 0, 1), np.zeros(side * factor)
    places = [slice(start * factor, (start + tile) * factor) for start in starts]
    weights = np.ones((len(starts), tile * factor))
    for row, place, start in zip(weights, places, starts, strict=True):
        row *= rising if start else 1
        row *= rising[::-1] if start + tile < side else 1
        total[place] += row
    return np.stack([row / total[place] for row, place in zip(weights, places, strict=True)])


def decode_in_tiles(
    decode: Callable[[Latents], Images],
    latents: Latents,
    *,
    tile: int,
    overlap: int,
    autoencoder: Autoencoder,
) -> Images:
    """The images of latents, decoded tile by tile.

    Args:
      decode: decodes latents [b, y, x, k] of any side to images [b, y factor, x factor, c].
      latents: [b, y, x, k].
      tile: side of a tile, in latents; along a shorter axis, a tile is the whole axis.
      overlap: latents that neighbouring tiles share at least; < `tile`.
      autoencoder: whose decoder it is.

    Returns:
      Images [b, y factor, x factor, c] float32, not clipped.
    """
    factor, sides = autoencoder.factor, latents.shape[1:3]
    margin = min(decoder_reach(autoencoder) or 0, overlap // 2)
    tiles = [min(side, tile) for side in sides]
    starts, weights = zip(*((
        tile_starts(side, size, min(overlap, size - 1)),
        tile_weights(side, size, min(overlap, size - 1), factor=factor, margin=margin),
    ) for side, size in zip(sides, tiles, strict=True)), strict=True)

    def add_tile(images: Images, place: tuple[jax.Array, ...]) -> tuple[Images, None]:
        weight = place[2][None, :, None, None] * place[3][None, None, :, None]
        new = decode(_part(latents, place[:2], tiles)) * weight
        start = [factor * x for x in place[:2]]
        old = _part(images, start, [factor * size for size in tiles])
        return jax.lax.dynamic_update_slice(images, old + new, (0, *start, 0)), None

    (y, x), (rows, columns) = np.meshgrid(*starts, indexing="ij"), weights
    places = (y.ravel(), x.ravel(), rows.repeat(len(columns), 0).astype("f"),
              np.tile(columns, (len(rows), 1)).astype("f"))
    shape = (latents.shape[0], *(factor * side for side in sides), autoencoder.channels)
    return jax.lax.scan(add_tile, jnp.zeros(shape, jnp.float32), places)[0]


def _part(
    x: Float[Array, "b h w c"], start: list[jax.Array] | tuple[jax.Array, ...], size: list[int]
) -> Float[Array, "b y x c"]:
    """The part of images or latents from a row and a column on."""
    for axis in (0, 1):
        x = jax.lax.dynamic_slice_in_dim(x, start[axis], size[axis], axis + 1)
    return x
