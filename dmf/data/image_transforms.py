"""From the bytes of an image file, of any kind and shape, to an upright RGB square."""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from dmf.errors import InputError

_DECODERS = {
    b"BM": BmpImageFile,
    b"GIF8": GifImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG": PngImageFile,
    b"RIFF": WebPImageFile,
}
# Number of pixels of 16 bits that are rounded to 8 bits at once.
_AT_ONCE = 2**20
# The transpose that turns an image upright, by its EXIF orientation; 1 is upright already.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(data: bytes) -> Image.Image:
    """An image, of which only the header is decoded yet.

    Args:
      data: bytes of a BMP, GIF, JPEG, PNG or WebP file, whose kind is recognised by its first bytes
        since suffixes may be wrong. The first frame is taken of an animation.

    Raises:
      ValueError: the file is damaged, of another kind, or has more pixels than
        `PIL.Image.MAX_IMAGE_PIXELS`; the message says which.
    """
    decoders = [decoder for start, decoder in _DECODERS.items() if data.startswith(start)]
    if not decoders:
        raise ValueError("is no BMP, GIF, JPEG, PNG or WebP file" if data else "is empty")
    with _one_error():
        # Image.open would only warn about sizes somewhat too large, and a filter of warnings would
        # hold for all threads.
        image = decoders[0](io.BytesIO(data))
        limit = Image.MAX_IMAGE_PIXELS or np.inf
        if image.width * image.height > limit:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {limit}")
    return image


def load_pixels(image: Image.Image) -> Image.Image:
    """The image itself, decoded as it is stored; it is not turned upright yet.

    Raises:
      ValueError: the file is cut short or damaged.
    """
    with _one_error():
        image.load()
    return image


def decode(data: bytes) -> Image.Image:
    """An image, decoded; it raises what `open_image` and `load_pixels` raise."""
    return load_pixels(open_image(data))


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Turns all that Pillow raises for damaged files, which it does not document, into one error.

    Raises:
      ValueError: a file is damaged.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def center_crop(image: Image.Image, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """The centre crop of an image, as ADM (arXiv:2105.05233) and its successors crop their data.

    A box filter halves both sides while the short side is at least twice the target; a bicubic
    filter then resizes the short side to the target, and the centre is cropped. The rounding is
    that of ADM's published data loader, so that the same file gives the same pixels. Unlike there,
    the EXIF orientation is applied first.

    >>> center_crop(Image.new("RGB", (500, 300), "red"), 64)[0, 0].tolist()
    [255, 0, 0]

    Args:
      image: an image of any mode. Grey is repeated to three channels; 16-bit grey is rounded to 8
        bits; a palette is looked up; CMYK is converted without a colour profile; transparent
        pixels are put on white.
      side: height and width of the crop, at least 1.

    Returns:
      [side, side, 3] uint8.

    Raises:
      InputError: side is below 1, or the image is so long and thin that it cannot be resized.
    """
    if side < 1:
        raise InputError("side", side, "it must be at least 1")
    image = upright_rgb(image)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
        raise InputError(
            "side", side,
            f"an image of {image.width} x {image.height} pixels is too thin for it; leave it out",
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.array(image.crop((left, top, left + side, top + side)))


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, turned upright by its EXIF orientation."""
    return _rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Broken metadata raise what Pillow does not document; pixels may be whole.
        orientation = None
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    on_white = Image.new("RGB", image.size, "white")
    on_white.paste(image, mask=image)
    return on_white


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8 bits. Pillow itself would clip it, and forget the transparent level.

    Level v becomes round(v / 257), a part of the image after the other, to take little memory.
    """
    levels = np.asarray(image)
    grey = np.empty(levels.shape, np.uint8)
    from_flat, to_flat = levels.reshape(-1), grey.reshape(-1)
    for start in range(0, len(to_flat), _AT_ONCE):
        part = from_flat[start : start + _AT_ONCE].clip(0, 65535).astype(np.int32)
        rounded = (part + 128) // 257
        if "transparency" in image.info:
            rounded[part == image.info["transparency"]] = 255
        to_flat[start : start + _AT_ONCE] = rounded
    return Image.fromarray(grey)
