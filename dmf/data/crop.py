"""From the bytes of an image file, of any kind and shape, to an upright RGB square."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from dmf.typing import InputError

_DECODERS = {
    b"BM": BmpImageFile,
    b"GIF8": GifImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG": PngImageFile,
    b"RIFF": WebPImageFile,
}
# What brings an image upright, by its EXIF orientation; 1 is upright already.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes) -> Image.Image:
    """An image, as it is stored: not yet upright. Of an animation it is the first frame.

    Args:
      data: a file, which is recognised by how it begins: suffixes may be wrong.

    Raises:
      ValueError: why it cannot be: it is cut short, damaged, of another kind, or has more pixels
        than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    decoders = [decoder for start, decoder in _DECODERS.items() if data.startswith(start)]
    if not decoders:
        raise ValueError("is no BMP, GIF, JPEG, PNG or WebP file" if data else "is empty")
    try:
        # Image.open would only warn of sizes somewhat too large, and a filter of warnings is the
        # same for all threads.
        image = decoders[0](io.BytesIO(data))
        most = Image.MAX_IMAGE_PIXELS or np.inf
        if image.width * image.height > most:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {most}")
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # what Pillow raises for damaged files is not documented
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return image


def center_crop(image: Image.Image, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """The middle of an image, upright, as the training data of ADM and its successors are cut.

    Both sides are halved by a box filter while the short one is at least twice the target, then
    the short side is brought to the target by a bicubic one and the middle is cut out
    (arXiv:2105.05233; the rounding is that of its published data loader, so that the same file
    gives the same pixels). Other than there, the EXIF orientation is applied first.

    Args:
      image: of any mode. Grey is repeated; 16-bit grey is rounded to 8 bits; a palette is looked
        up; CMYK is converted without a colour profile; what is transparent shows white.
      side: height and width of the result, at least 1.

    Returns:
      Pixels of 0 to 255.

    Raises:
      InputError: side is below 1, or the image is so long and thin that it cannot be resized.
    """
    if side < 1:
        raise InputError(f"side={side}: it must be at least 1")
    image = upright_rgb(image)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
        raise InputError(
            f"an image of {image.width} x {image.height} pixels is too thin for side={side}: "
            "leave it out"
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.array(image.crop((left, top, left + side, top + side)))


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, turned as its EXIF orientation says."""
    return _rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # what broken metadata raise is not documented; the pixels may be whole
        orientation = None
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8 bits. Pillow itself would clip it, and forget its transparent level."""
    levels = np.asarray(image).clip(0, 65535)
    grey = np.rint(levels / 257).astype(np.uint8)
    if "transparency" in image.info:
        grey[levels == image.info["transparency"]] = 255
    return Image.fromarray(grey)
