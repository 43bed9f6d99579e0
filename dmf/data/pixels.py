"""Pixels: 8 bits and the range [-1, 1], grids of images, and PNG files."""

import io
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from dmf.errors import InputError
from dmf.runtime.files import new_file

# Numbers of channels of an image: grey and RGB.
IMAGE_CHANNELS = (1, 3)
# How the levels 127.5 (x + 1) become whole numbers: to the nearest one with halves to the even one,
# to the nearest one with halves upwards, or downwards. Evaluation protocols differ in it.
ROUNDINGS = {
    "nearest": jnp.rint,
    "half_up": lambda levels: jnp.floor(levels + 0.5),
    "down": jnp.floor,
}


def from_uint8(images: UInt8[Array, "... h w c"]) -> Float[Array, "... h w c"]:
    """Pixels of 0 to 255 as float32 in [-1, 1].

    >>> from_uint8(jnp.array([[[0], [255]]], jnp.uint8)).ravel().tolist()
    [-1.0, 1.0]
    """
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(
    x: Float[Array, "... h w c"] | Float[np.ndarray, "... h w c"], rounding: str = "nearest"
) -> UInt8[Array, "... h w c"]:
    """Pixels in [-1, 1] as 0 to 255.

    >>> to_uint8(jnp.array([[[-1.0], [0.0], [1.5]]])).ravel().tolist()
    [0, 128, 255]

    Args:
      x: images; values outside of [-1, 1] are clipped.
      rounding: how levels become whole numbers, one of `ROUNDINGS`.
    """
    return ROUNDINGS[rounding]((jnp.clip(x, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def grid(
    images: UInt8[np.ndarray, "n h w c"], columns: int, *, gap: int = 1, zoom: int = 1
) -> UInt8[np.ndarray, "H W c"]:
    """One image of many, row by row on white.

    >>> grid(np.zeros((3, 8, 8, 1), np.uint8), columns=2).shape
    (19, 19, 1)

    Args:
      images: images of one size.
      columns: number of images in a row.
      gap: pixels between images, and around them.
      zoom: height and width of each pixel in the grid.
    """
    n, h, w, c = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        top = gap + (i // columns) * (h + gap)
        left = gap + (i % columns) * (w + gap)
        sheet[top : top + h, left : left + w] = image
    return sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)


def captioned_grid(
    groups: Mapping[str, UInt8[np.ndarray, "n h w c"]],
    captions: Sequence[str],
    columns: int,
    *,
    zoom: int = 1,
) -> UInt8[np.ndarray, "H W c"]:
    """Groups of images below each other, each from a new row on, with captions in black on white.

    The name of a group stands at the left of its first row. The captions of the images of a row
    stand above it, unless the row before has the same captions.

    >>> images = np.zeros((4, 8, 8, 1), np.uint8)
    >>> groups = {"1 step": images, "2 steps": images}
    >>> len(captioned_grid(groups, ["cat", "dog"] * 2, columns=2, zoom=6))
    242

    Args:
      groups: groups of images of one size, by the name of the group.
      captions: [n] captions of the images of every group, cut to the width of an image; empty
        strings for none.
      columns: number of images in a row.
      zoom: height and width of each pixel in the grid.
    """
    _, h, w, c = next(iter(groups.values())).shape
    font = ImageFont.load_default(max(10, h * zoom // 10))
    margin, cell = int(max(map(font.getlength, groups))) + font.size, (w + 1) * zoom
    width = margin + columns * cell + zoom
    parts, above = [], [""] * columns
    for name, images in groups.items():
        for start in range(0, len(images), columns):
            row = [*captions[start : start + columns]]
            if row != above[: len(row)]:
                parts.append(_texts(row, width, 2 * font.size, font, left=margin + zoom, cell=cell))
                above = row
            sheet = grid(images[start : start + columns], columns, zoom=zoom)[:-zoom]
            title = _texts(["" if start else name], margin, len(sheet), font, left=font.size // 3)
            parts.append(np.hstack([title.repeat(c, axis=2), sheet]))
    parts.append(np.full((zoom, width, c), 255, np.uint8))
    return np.vstack([part.repeat(c // part.shape[2], axis=2) for part in parts])


def _texts(
    texts: Sequence[str], width: int, height: int, font: ImageFont.FreeTypeFont,
    *, left: int, cell: int = 0,
) -> UInt8[np.ndarray, "H W 1"]:  # fmt: skip
    """A white rectangle with texts beside each other, each cut to its cell, or to the rectangle."""
    picture = Image.new("L", (width, height), 255)
    for i, text in enumerate(texts):
        while font.getlength(text) > (cell or width) - font.size // 3:
            text = text[:-1]
        ImageDraw.Draw(picture).text((left + i * cell, height // 2), text, 0, font, anchor="lm")
    return np.asarray(picture)[..., None]


def zoom_factor(side: int) -> int:
    """The factor that enlarges images of a side to 48 pixels or more, at least 1.

    >>> zoom_factor(8), zoom_factor(256)
    (6, 1)
    """
    return -(-48 // side)


def png(image: UInt8[np.ndarray, "h w c"]) -> bytes:
    """A grey (c = 1) or RGB (c = 3) image as the bytes of a PNG file.

    Raises:
      InputError: the image has another number of channels; latents need a decoder first.
    """
    channels = image.shape[-1]
    if channels not in IMAGE_CHANNELS:
        raise InputError(
            "", remedy=f"an image of {channels} channels cannot be a PNG: decode latents first"
        )
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_png(path: epath.PathLike, image: UInt8[np.ndarray, "h w c"]) -> None:
    """Writes a grey or RGB image as a PNG file, see `png`; its directory is created.

    The file appears when it is complete.

    Raises:
      RunError: the disk is full or cannot be written.
    """
    with new_file(epath.Path(path)) as partial:
        partial.write_bytes(png(image))
