"""A set of real image files of every kind that photographs come in: `make(folder)` writes it."""

import io
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

SIDE = 32
CLASSES = ("apple", "bread", "cloud", "dune")


class Written(NamedTuple):
    """What `make` wrote.

    Attributes:
      names: of all files, the broken one included, relative to the folder, in order.
      labels: [n] int64 indices into CLASSES, in the same order.
      kinds: what each is, by name.
      broken: the name of the JPEG that is cut short.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    kinds: dict[str, str]
    broken: str


def make(folder: pathlib.Path | str, count: int = 300, seed: int = 0, side: int = SIDE) -> Written:
    """Writes `count` images in class folders, one of them broken.

    Their sides are 1.1 to 5 times `side`, upright and lying; a third lie in folders of their class
    folder. The same arguments give the same files.
    """
    folder, rng = pathlib.Path(folder), np.random.default_rng(seed)
    kinds = {}
    for i, (kind, suffix, data) in zip(range(count), _files(rng, side), strict=False):
        inner = "more/" if i % 3 == 2 else ""
        name = f"{CLASSES[i % len(CLASSES)]}/{inner}{i:04d}{suffix}"
        if i == count // 2:
            kind = "broken"
            name, data = name.rpartition(".")[0] + ".jpg", _broken(rng, side)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        kinds[name] = kind
    names = tuple(sorted(kinds))
    labels = np.array([CLASSES.index(name.partition("/")[0]) for name in names], np.int64)
    broken = next(name for name in names if kinds[name] == "broken")
    return Written(names, labels, kinds, broken)


def colours(rng: np.random.Generator, width: int, height: int, channels: int = 3) -> np.ndarray:
    """Random smooth pixels [height, width, channels] uint8, with some grain."""
    coarse = rng.integers(0, 256, (5, 4, channels), np.uint8)
    bands = [Image.fromarray(coarse[..., c]).resize((width, height)) for c in range(channels)]
    pixels = np.stack([np.asarray(band) for band in bands], axis=-1)
    grain = rng.integers(-12, 13, pixels.shape)
    return (pixels + grain).clip(0, 255).astype(np.uint8)


def saved(image: Image.Image, kind: str, **settings) -> bytes:
    """The bytes of a file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels as a camera stores them that notes an EXIF orientation, from upright ones."""
    across = pixels.swapaxes(0, 1)
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: across,
        6: across[::-1],
        7: across[::-1, ::-1],
        8: across[:, ::-1],
    }[orientation].copy()


def exif(orientation: int) -> Image.Exif:
    """The metadata that note an orientation."""
    metadata = Image.Exif()
    metadata[ExifTags.Base.Orientation] = orientation
    return metadata


def _png(rng: np.random.Generator, width: int, height: int) -> bytes:
    return saved(Image.fromarray(colours(rng, width, height)), "png", compress_level=1)


def _jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    return saved(Image.fromarray(colours(rng, width, height)), "jpeg", quality=90)


def _grey(rng: np.random.Generator, width: int, height: int) -> bytes:
    return saved(Image.fromarray(colours(rng, width, height, 1)[..., 0]), "png", compress_level=1)


def _grey_jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    return saved(Image.fromarray(colours(rng, width, height, 1)[..., 0]), "jpeg", quality=90)


def _deep_grey(rng: np.random.Generator, width: int, height: int) -> bytes:
    levels = colours(rng, width, height, 1)[..., 0] * np.uint16(257)
    grain = rng.integers(0, 200, levels.shape, np.uint16)
    return saved(Image.fromarray(levels - levels.clip(max=grain)), "png", compress_level=1)


def _alpha(rng: np.random.Generator, width: int, height: int) -> bytes:
    return saved(Image.fromarray(colours(rng, width, height, 4)), "png", compress_level=1)


def _grey_alpha(rng: np.random.Generator, width: int, height: int) -> bytes:
    return saved(Image.fromarray(colours(rng, width, height, 2), "LA"), "png", compress_level=1)


def _palette(rng: np.random.Generator, width: int, height: int) -> bytes:
    image = Image.fromarray(colours(rng, width, height))
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    return saved(palette, "png", transparency=int(rng.integers(0, 64)))


def _cmyk(rng: np.random.Generator, width: int, height: int) -> bytes:
    return saved(Image.fromarray(colours(rng, width, height, 4), "CMYK"), "jpeg", quality=90)


def _rotated(orientation: int) -> Callable[[np.random.Generator, int, int], bytes]:
    def file(rng: np.random.Generator, width: int, height: int) -> bytes:
        stored = turned(colours(rng, width, height), orientation)
        return saved(Image.fromarray(stored), "jpeg", quality=90, exif=exif(orientation))

    return file


_KINDS = {
    "colour": (".png", _png),
    "photo": (".jpg", _jpeg),
    "grey": (".png", _grey),
    "grey photo": (".JPEG", _grey_jpeg),
    "16-bit grey": (".png", _deep_grey),
    "alpha": (".png", _alpha),
    "grey and alpha": (".PNG", _grey_alpha),
    "palette": (".png", _palette),
    "CMYK": (".jpg", _cmyk),
    **{f"orientation {i}": (".jpg", _rotated(i)) for i in range(1, 9)},
}


def _files(rng: np.random.Generator, side: int) -> Iterator[tuple[str, str, bytes]]:
    """Kind, suffix and bytes, kind after kind, without end."""
    while True:
        for kind, (suffix, file) in _KINDS.items():
            width, height = np.rint(side * rng.uniform(1.1, 5, 2)).astype(int).tolist()
            yield kind, suffix, file(rng, width, height)


def _broken(rng: np.random.Generator, side: int) -> bytes:
    whole = _jpeg(rng, 3 * side, 2 * side)
    return whole[: len(whole) // 2]


if __name__ == "__main__":
    print(f"{len(make(sys.argv[1]).names)} files in {sys.argv[1]}")
