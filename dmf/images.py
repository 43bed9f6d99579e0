"""From arrays in [-1, 1] to 8 bits, grids and PNG files."""

import io

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8
from PIL import Image

from dmf.typing import InputError

# How the levels 127.5 (x + 1) become whole: to the nearest one, halves to the even one or up, or
# downwards. Protocols of evaluation differ in it.
ROUNDINGS = {
    "nearest": jnp.rint,
    "half_up": lambda levels: jnp.floor(levels + 0.5),
    "down": jnp.floor,
}


def to_uint8(
    x: Float[Array, "... h w c"] | Float[np.ndarray, "... h w c"], rounding: str = "nearest"
) -> UInt8[Array, "... h w c"]:
    """[-1, 1] to 0..255, clipped and rounded by one of `ROUNDINGS`."""
    return ROUNDINGS[rounding]((jnp.clip(x, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def grid(
    images: UInt8[np.ndarray, "n h w c"], columns: int, *, gap: int = 1, zoom: int = 1
) -> UInt8[np.ndarray, "H W c"]:
    """Images row by row on white, `gap` pixels apart, each pixel repeated `zoom` times."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        top = gap + (i // columns) * (h + gap)
        left = gap + (i % columns) * (w + gap)
        sheet[top : top + h, left : left + w] = image
    return sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)


def fitting_zoom(side: int) -> int:
    """How much to enlarge small images so that a person sees them."""
    return max(1, 48 // side)


def png(image: UInt8[np.ndarray, "h w c"]) -> bytes:
    """A grey (c = 1) or RGB (c = 3) image as the bytes of a PNG file.

    Raises:
      InputError: another number of channels; latents need a decoder first.
    """
    channels = image.shape[-1]
    if channels not in (1, 3):
        raise InputError(f"an image of {channels} channels cannot be a PNG: decode latents first")
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_png(path: epath.PathLike, image: UInt8[np.ndarray, "h w c"]) -> None:
    """Writes a grey or RGB image, see `png`."""
    epath.Path(path).write_bytes(png(image))
