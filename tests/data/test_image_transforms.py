"""Crops: to the bit what three resizes of Pillow give, from every kind of image, upright."""

import io
import struct
import zlib

import image_set
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dmf.data.image_transforms import center_crop, decode
from dmf.errors import InputError

SIDE = 32


def reference(rgb: np.ndarray, side: int = SIDE) -> np.ndarray:
    """The crop of upright RGB pixels, step by step."""
    image = Image.fromarray(rgb)
    while min(image.size) >= 2 * side:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.BOX)
    scale = side / min(image.size)
    image = image.resize([round(length * scale) for length in image.size], Image.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


def pixels(width: int, height: int, channels: int = 3) -> np.ndarray:
    return image_set.colours(np.random.default_rng(width + height), width, height, channels)


def reopened(image: Image.Image, kind: str = "png", **settings) -> Image.Image:
    return decode(image_set.saved(image, kind, **settings))


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composited in whole numbers, rounded to the nearest."""
    colour, alpha = colour.astype(int), alpha.astype(int)[..., None]
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def repeated(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, axis=-1)


@pytest.mark.parametrize(
    "size",
    [
        (64, 64), (64, 90), (128, 130), (257, 128),  # exactly twice, and twice twice
        (63, 63), (63, 95), (127, 200), (300, 255),  # just below
        (32, 32), (32, 47), (48, 33), (36, 32),
        (31, 40), (20, 17), (5, 9), (1, 3),  # smaller than the target
        (161, 37), (40, 160), (159, 158),
    ],
)
def test_every_size_is_cropped_as_step_by_step(size):
    rgb = pixels(*size)
    crop = center_crop(Image.fromarray(rgb), SIDE)
    assert crop.shape == (SIDE, SIDE, 3)
    assert crop.dtype == np.uint8
    np.testing.assert_array_equal(crop, reference(rgb))


@pytest.mark.parametrize("side", [1, 7, 33, 200])
def test_every_target(side):
    rgb = pixels(150, 91)
    np.testing.assert_array_equal(center_crop(Image.fromarray(rgb), side), reference(rgb, side))


def test_a_whole_multiple_of_powers_of_two_is_a_mean_of_blocks():
    rgb = pixels(4 * SIDE, 4 * SIDE)
    blocks = rgb.reshape(SIDE, 4, SIDE, 4, 3).mean((1, 3))
    # Each of the two halvings rounds twice, over columns and over rows.
    assert np.abs(center_crop(Image.fromarray(rgb), SIDE) - blocks).max() <= 4 * 0.5


def test_the_middle_is_cut_out():
    rgb = np.zeros((SIDE, 3 * SIDE + 1, 3), np.uint8)
    rgb[:, SIDE : 2 * SIDE] = np.arange(SIDE)[:, None]
    np.testing.assert_array_equal(center_crop(Image.fromarray(rgb), SIDE), rgb[:, SIDE : 2 * SIDE])


# Kinds: what each shows in RGB, worked out without Pillow's conversions.


def grey():
    levels = pixels(75, 50, 1)[..., 0]
    return reopened(Image.fromarray(levels)), repeated(levels)


def black_and_white():
    bits = pixels(75, 50, 1)[..., 0] > 128
    return reopened(Image.fromarray(bits)), repeated(bits * np.uint8(255))


def deep_grey():
    levels = np.random.default_rng(0).integers(0, 65536, (50, 75), np.uint16)
    levels[:2] = np.arange(150).reshape(2, 75) * 257 // 2
    image = reopened(Image.fromarray(levels))
    assert image.mode.startswith("I")
    return image, repeated(np.rint(levels / 257).astype(np.uint8))


def wide_grey():
    levels = np.random.default_rng(0).integers(0, 65536, (50, 75), np.int32)
    return Image.fromarray(levels), repeated(np.rint(levels / 257).astype(np.uint8))


def keyed(data: bytes, *levels: int) -> bytes:
    """A PNG of which a grey level or a colour is transparent."""
    body = b"tRNS" + struct.pack(f">{len(levels)}H", *levels)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    place = data.index(b"IDAT") - 4
    return data[:place] + chunk + data[place:]


def keyed_deep_grey():
    levels = np.random.default_rng(0).integers(0, 5, (50, 75), np.uint16) * np.uint16(300)
    expected = np.where(levels == 600, 255, np.rint(levels / 257)).astype(np.uint8)
    return decode(keyed(image_set.saved(Image.fromarray(levels), "png"), 600)), repeated(expected)


def keyed_colour():
    rgb = pixels(75, 50) // 128 * 128
    clear = (rgb == (128, 0, 128)).all(-1)
    assert clear.any()
    expected = np.where(clear[..., None], 255, rgb).astype(np.uint8)
    return decode(keyed(image_set.saved(Image.fromarray(rgb), "png"), 128, 0, 128)), expected


def grey_alpha():
    both = pixels(75, 50, 2)
    return reopened(Image.fromarray(both, "LA")), over_white(repeated(both[..., 0]), both[..., 1])


def alpha():
    rgba = pixels(75, 50, 4)
    return reopened(Image.fromarray(rgba)), over_white(rgba[..., :3], rgba[..., 3])


def palette(transparency=None, kind="png"):
    table = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)
    indices = pixels(75, 50, 1)[..., 0]
    image = Image.fromarray(indices)
    image.putpalette(table.tobytes())
    settings = {} if transparency is None else {"transparency": transparency}
    image = reopened(image, kind, **settings)
    assert image.mode == "P"
    return image, table[indices], indices


def plain_palette():
    return palette()[:2]


def gif():
    return palette(kind="gif")[:2]


def palette_with_alpha():
    levels = np.random.default_rng(2).integers(0, 256, 256, np.uint8)
    image, rgb, indices = palette(levels.tobytes())
    return image, over_white(rgb, levels[indices])


def palette_with_a_clear_colour():
    image, rgb, indices = palette(90)
    assert (indices == 90).any()
    return image, np.where(indices[..., None] == 90, 255, rgb).astype(np.uint8)


def cmyk():
    inks = pixels(75, 50, 4)
    image = reopened(Image.fromarray(inks, "CMYK"), "jpeg", quality=95)
    assert image.mode == "CMYK"
    inks = np.asarray(image).astype(int)
    left = 255 - inks[..., 3:]
    # What an ink leaves of what black leaves, rounded to the nearest.
    return image, (left - (inks[..., :3] * left + 127) // 255).astype(np.uint8)


KINDS = (grey, black_and_white, deep_grey, wide_grey, keyed_deep_grey, keyed_colour, grey_alpha,
         alpha, plain_palette, gif, palette_with_alpha, palette_with_a_clear_colour, cmyk)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_becomes_rgb(kind):
    image, rgb = kind()
    np.testing.assert_array_equal(center_crop(image, 50), reference(rgb, 50))
    np.testing.assert_array_equal(center_crop(image, SIDE), reference(rgb))


# Orientation.


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_undone(orientation):
    upright = pixels(75, 50)
    metadata = image_set.exif(orientation)
    stored = Image.fromarray(image_set.turned(upright, orientation))
    expected = center_crop(Image.fromarray(upright), SIDE)
    np.testing.assert_array_equal(center_crop(reopened(stored, exif=metadata), SIDE), expected)
    lossy = center_crop(reopened(stored, "jpeg", quality=95, subsampling=0, exif=metadata), SIDE)
    error = np.abs(lossy.astype(int) - expected)
    assert error.mean() < 2
    assert error.max() < 16


def test_an_orientation_is_undone_in_every_kind():
    for kind in KINDS:
        image, rgb = kind()
        image.info["exif"] = image_set.exif(6).tobytes()
        np.testing.assert_array_equal(center_crop(image, SIDE), reference(np.rot90(rgb, -1)))


def test_orientations_differ_in_the_test_image():
    upright = pixels(75, 50)
    crops = {
        center_crop(Image.fromarray(image_set.turned(upright, i)), SIDE).tobytes()
        for i in range(1, 9)
    }
    assert len(crops) == 8


@pytest.mark.parametrize("value", [0, 9, 6.5, "6"])
def test_an_orientation_that_is_none_changes_nothing(value):
    rgb = pixels(75, 50)
    image = Image.fromarray(rgb)
    image.getexif()[274] = value
    np.testing.assert_array_equal(center_crop(image, SIDE), reference(rgb))


def test_broken_metadata_change_nothing():
    rgb = pixels(75, 50)
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n  10\nno hexadecimals")
    for settings in ({"exif": b"no metadata at all"}, {"pnginfo": text}):
        image = reopened(Image.fromarray(rgb), **settings)
        with pytest.raises((SyntaxError, ValueError)):
            image.getexif()
        image = reopened(Image.fromarray(rgb), **settings)
        np.testing.assert_array_equal(center_crop(image, SIDE), reference(rgb))


# What cannot be.


@pytest.mark.parametrize("side", [0, -8])
def test_a_target_that_cannot_be(side):
    with pytest.raises(InputError, match=f"side={side}: it must be at least 1"):
        center_crop(Image.new("RGB", (40, 40)), side)


def test_a_thread_of_an_image_is_refused_before_it_fills_the_memory():
    with pytest.raises(InputError, match="side=64: .* 2 x 200000 pixels is too thin"):
        center_crop(Image.new("L", (2, 200_000)), 64)


def test_the_image_itself_is_left_alone():
    image, _ = palette_with_alpha()
    image.info["exif"] = image_set.exif(6).tobytes()
    before, mode, size = image.tobytes(), image.mode, image.size
    center_crop(image, 8)[:] = 0
    assert (image.tobytes(), image.mode, image.size) == (before, mode, size)


# Decoding.


FORMATS = {"png": {}, "jpeg": {}, "bmp": {}, "gif": {}, "webp": {"lossless": True}}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_is_known_by_its_content_and_decoded_at_once(kind):
    rgb = pixels(75, 50)
    data = image_set.saved(Image.fromarray(rgb), kind, **FORMATS[kind])
    image = decode(data)
    assert image.size == (75, 50)
    assert not getattr(image, "tile", None)  # Nothing is left to decode.
    with Image.open(io.BytesIO(data)) as expected:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_file_cut_short_is_refused(kind, share):
    data = image_set.saved(Image.fromarray(pixels(175, 150)), kind, **FORMATS[kind])
    with pytest.raises(ValueError) as error:
        decode(data[: int(share * len(data))])
    assert str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["png", "gif", "webp"])
def test_an_animation_shows_its_first_frame(kind):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime", "blue")]
    data = image_set.saved(frames[0], kind, save_all=True, append_images=frames[1:])
    crop = center_crop(decode(data), 8)
    np.testing.assert_allclose(crop, np.broadcast_to((255, 0, 0), crop.shape), atol=2)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is no BMP, GIF"),
        (b"RIFF1234WAVEfmt ", "WEBP|decoder"),
    ],
)
def test_other_files_are_refused(data, why):
    with pytest.raises(ValueError, match=why):
        decode(data)


@pytest.mark.parametrize(
    ("error", "why"), [(OSError("two\n lines"), "two lines"), (EOFError(), "EOFError")]
)
def test_why_is_always_one_line(error, why, monkeypatch):
    def fail(image):
        raise error

    data = image_set.saved(Image.new("RGB", (10, 9)), "png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(ValueError) as raised:
        decode(data)
    assert str(raised.value) == why


def test_no_memory_is_not_the_fault_of_a_file(monkeypatch):
    def fail(image):
        raise MemoryError

    data = image_set.saved(Image.new("RGB", (10, 9)), "png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(MemoryError):
        decode(data)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("most", [60, 30])  # Pillow itself warns above one, fails above twice
def test_too_many_pixels_are_refused_without_a_warning(kind, most, monkeypatch):
    data = image_set.saved(Image.new("RGB", (10, 9)), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90)
    assert decode(data).size == (10, 9)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    with pytest.raises(ValueError, match="pixels"):
        decode(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(data).size == (10, 9)
