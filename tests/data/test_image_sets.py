"""Sets of images of one size: the same pixels from arrays, files and datasets, and bad ones."""

import io
import os
import pathlib
import tarfile
import zipfile

import image_set
import numpy as np
import pytest
from PIL import Image

from dmf.data.image_sets import ImageSet, open_image_set
from dmf.data.image_transforms import center_crop
from dmf.errors import InputError

RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (7, 6, 5, 3)).astype(np.uint8)
GREYS = RANDOM.integers(0, 256, (4, 6, 5, 1)).astype(np.uint8)
LABELS = np.array([3, 0, 1, 1, 2, 0, 3])
ORIENTATION = image_set.exif(6)
BAD = b"I am no image."


def png(pixels: np.ndarray, kind: str = "png", **settings) -> bytes:
    """The bytes of a grey or RGB file."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return image_set.saved(image, kind, **settings)


def named(pixels: np.ndarray) -> dict[str, bytes]:
    return {f"{i}.png": png(picture) for i, picture in enumerate(pixels)}


def folder(path: pathlib.Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    path.mkdir(exist_ok=True)
    return str(path)


def zipped(path: pathlib.Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(f"{path}.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return f"{path}.zip"


def tarred(path: pathlib.Path, files: dict[str, bytes]) -> str:
    with tarfile.open(f"{path}.tar", "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return f"{path}.tar"


over_places = pytest.mark.parametrize("pack", [folder, zipped, tarred])


def written(path: pathlib.Path, save=np.savez, **arrays: np.ndarray) -> str:
    save(path / "set.npz", **arrays)
    return str(path / "set.npz")


def check(opened: ImageSet, pixels: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Checks that a set holds some images and labels, which are read in any order."""
    assert isinstance(opened, ImageSet)
    assert len(opened) == len(pixels)
    assert opened.shape == pixels.shape[1:]
    for indices in (np.arange(len(pixels))[::-1], np.array([2]), np.array([1, 3, 1])):
        read = opened.read(indices)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, pixels[indices])
    if labels is None:
        assert opened.labels() is None
    else:
        assert opened.labels().dtype == np.int64
        np.testing.assert_array_equal(opened.labels(), labels)


def refused(source: str, *words: str, **options) -> str:
    """The one-line message about a set that cannot be opened or read.

    The words are in it in their order."""
    with pytest.raises(InputError) as error:
        opened = open_image_set(source, **options)
        opened.read(np.arange(len(opened)))
    message = str(error.value)
    assert "\n" not in message
    places = [message.find(word) for word in words]
    assert min(places, default=0) >= 0, message
    assert places == sorted(places), message
    return message


# Arrays.


@pytest.mark.parametrize("pixels", [COLOURS, GREYS], ids=["colours", "greys"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays(tmp_path, save, labelled, pixels):
    labels = LABELS[: len(pixels)].astype(np.int32)
    source = written(tmp_path, save, arr_0=pixels, **{"labels": labels} if labelled else {})
    opened = open_image_set(source)
    check(opened, pixels, labels if labelled else None)
    assert isinstance(opened.array, np.memmap) == (save is np.savez)
    assert (opened.name, opened.notes) == ("set.npz", "")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_in_the_order_of_fortran(tmp_path, save):
    array = np.asfortranarray(COLOURS)
    assert not array.flags.c_contiguous
    check(open_image_set(written(tmp_path, save, arr_0=array, labels=LABELS)), COLOURS, LABELS)


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)], ids=str)
def test_arrays_as_other_programs_write_them(tmp_path, version, how):
    path = tmp_path / "other.npz"
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("mu.npy", b"before it")
        member = io.BytesIO()
        np.lib.format.write_array(member, COLOURS, version)
        entry = zipfile.ZipInfo("arr_0.npy")
        entry.extra = b"\x99\x99\4\0more"
        archive.writestr(entry, member.getvalue(), how)
    opened = open_image_set(str(path))
    check(opened, COLOURS)
    assert isinstance(opened.array, np.memmap) == (how == zipfile.ZIP_STORED)


# Files.


@over_places
@pytest.mark.parametrize("pixels", [COLOURS, GREYS], ids=["colours", "greys"])
def test_files(tmp_path, pixels, pack):
    source = pack(tmp_path / "set", named(pixels))
    opened = open_image_set(source)
    check(opened, pixels)
    assert (opened.name, opened.notes) == (pathlib.Path(source).name, "")


def test_no_thread_is_started_for_a_batch(tmp_path, started):
    opened = open_image_set(folder(tmp_path / "set", named(GREYS)))
    for _ in range(os.cpu_count() + 1):
        opened.read(np.arange(4))
    assert 1 <= len(started) <= os.cpu_count()


@over_places
def test_folders_of_classes_are_labels(tmp_path, pack):
    classes = ("ant", "bee", "cow", "dog")
    files = {f"{classes[LABELS[i]]}/{i}.png": png(COLOURS[i]) for i in range(7)}
    order = np.argsort(LABELS, stable=True)
    opened = open_image_set(pack(tmp_path / "set", files))
    check(opened, COLOURS[order], LABELS[order])


def test_grey_files_among_colours_have_three_channels(tmp_path):
    pixels = [COLOURS[0], GREYS[0], COLOURS[1], GREYS[1]]
    files = {f"{i}.png": png(picture) for i, picture in enumerate(pixels)}
    opened = open_image_set(folder(tmp_path / "set", files))
    check(opened, np.stack([picture.repeat(3 // picture.shape[-1], axis=-1) for picture in pixels]))


def test_files_of_black_and_white_are_grey(tmp_path):
    image = Image.fromarray(GREYS[0, ..., 0]).convert("1")
    source = folder(tmp_path / "set", {"0.png": image_set.saved(image, "png")})
    opened = open_image_set(source)
    expected = np.asarray(image)[None, ..., None] * np.uint8(255)
    np.testing.assert_array_equal(opened.read(np.arange(1)), expected)


@pytest.mark.parametrize("first", ["colour", "grey"])
@pytest.mark.parametrize("side", [1, 8, 24])
def test_squares_are_cut_as_for_training(tmp_path, side, first):
    sizes = [(40, 23), (20, 64), (9, 9), (24, 24), (50, 49)]
    pixels = [image_set.colours(RANDOM, width, height) for width, height in sizes]
    grey = slice(1, 3) if first == "colour" else slice(0, 2)
    pixels[grey] = [picture[..., :1] for picture in pixels[grey]]
    files = {f"{i}.png": png(picture) for i, picture in enumerate(pixels)}
    expected = np.stack([center_crop(Image.open(io.BytesIO(f)), side) for f in files.values()])
    opened = open_image_set(folder(tmp_path / "set", files), side=side)
    assert opened.shape == (side, side, 3)
    check(opened, expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [0, 4])
def test_photographs_are_turned_upright(tmp_path, side, channels):
    stored = image_set.colours(RANDOM, 9, 6, channels)
    upright = image_set.turned(stored, 8)
    files = {
        "turned": {"0.png": png(stored, exif=ORIENTATION)},
        "upright": {"0.png": png(upright)},
    }
    turned, expected = (
        open_image_set(folder(tmp_path / name, files[name]), side=side).read(np.arange(1))
        for name in files
    )
    np.testing.assert_array_equal(turned, expected)


@over_places
def test_files_that_are_no_images_are_noted(tmp_path, pack):
    others = {"notes.txt": b"", "b.md": b"", "c.json": b"", "a.csv": b"", ".hidden": b""}
    labels = b'{"labels": [["0.png", 0], ["1.png", 1], ["2.png", 0], ["3.png", 1]]}'
    files = named(GREYS) | {"dataset.json": labels}
    assert open_image_set(pack(tmp_path / "plain", files)).notes == ""
    few = files | {"notes.txt": b"Moo."}
    opened = open_image_set(pack(tmp_path / "few", few))
    assert opened.notes == "left out 1 files that are no images: notes.txt"
    opened = open_image_set(pack(tmp_path / "many", files | others))
    expected = "left out 4 files that are no images: a.csv, b.md, c.json, ..."
    assert opened.notes == expected
    check(opened, GREYS, np.array([0, 1, 0, 1]))


# Datasets.


def test_digits_by_name():
    from sklearn.datasets import load_digits

    opened = open_image_set("digits")
    assert (opened.name, opened.shape, len(opened)) == ("digits", (8, 8, 1), 1797)
    digits = load_digits()
    levels = np.rint(digits.images * (255 / 16)).astype(np.uint8).reshape(1797, 64)

    def rows(pixels: np.ndarray, labels: np.ndarray) -> list[bytes]:
        return sorted(bytes([*row, label]) for row, label in zip(pixels, labels, strict=True))

    pixels = opened.read(np.arange(1797)).reshape(1797, 64)
    assert rows(pixels, opened.labels()) == rows(levels, digits.target)
    check(opened, pixels.reshape(1797, 8, 8, 1), opened.labels())


# What is refused.


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


HARMFUL = np.array([Harmful(), None], object)
WORDS = {
    "another name": ({"images": COLOURS, "labels": LABELS}, "it has images, labels; give"),
    "nothing": ({}, "it has nothing; give an .npz with arr_0, uint8 [n, h, w, c]"),
    "floats": ({"arr_0": COLOURS / 255}, "arr_0 is float64 (7, 6, 5, 3); give"),
    "no channels": ({"arr_0": COLOURS[..., 0]}, "arr_0 is uint8 (7, 6, 5); give"),
    "one image": ({"arr_0": COLOURS[0]}, "arr_0 is uint8 (6, 5, 3); give"),
    "four channels": ({"arr_0": COLOURS.repeat(2, 3)[..., :4]}, "uint8 (7, 6, 5, 4); give"),
    "no images": ({"arr_0": COLOURS[:0]}, "(0, 6, 5, 3)"),
    "too few labels": ({"arr_0": COLOURS, "labels": LABELS[1:]}, "int64 (6,); give 7 whole"),
    "labels in rows": ({"arr_0": COLOURS, "labels": LABELS[:, None]}, "int64 (7, 1); give 7 whole"),
    "labels in words": ({"arr_0": COLOURS, "labels": np.array(list("abcdefg"))}, "labels"),
    "objects": ({"arr_0": HARMFUL}, "Object arrays cannot be loaded"),
    "labels of objects": ({"arr_0": COLOURS[:2], "labels": HARMFUL}, "Object arrays cannot"),
}  # fmt: skip


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", WORDS)
def test_arrays_that_are_no_images(tmp_path, monkeypatch, name, save):
    monkeypatch.chdir(tmp_path)
    arrays, words = WORDS[name]
    source = written(tmp_path, save, **arrays)
    refused(source, f"images={source}: ", words)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_cut_short(tmp_path, save):
    source = written(tmp_path, save, arr_0=COLOURS, labels=LABELS)
    data = pathlib.Path(source).read_bytes()
    for length in (0, 1, 30, len(data) // 3, len(data) * 9 // 10, len(data) - 1):
        pathlib.Path(source).write_bytes(data[:length])
        refused(source, f"images={source}: no .npz, or a damaged one")


def test_an_archive_whose_bytes_were_changed(tmp_path):
    source = written(tmp_path, np.savez_compressed, arr_0=COLOURS, labels=LABELS)
    data = pathlib.Path(source).read_bytes()
    for place in range(60, 160, 7):
        pathlib.Path(source).write_bytes(
            data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]
        )
        refused(source, f"images={source}: no .npz, or a damaged one")


def test_an_archive_of_what_is_no_array(tmp_path):
    source = zipped(tmp_path / "set", {"arr_0": COLOURS.tobytes()})
    os.rename(source, tmp_path / "set.npz")
    refused(str(tmp_path / "set.npz"), f"images={tmp_path}/set.npz: ", "arr_0")


def test_text_is_no_array(tmp_path):
    (tmp_path / "set.npz").write_text("hello")
    refused(str(tmp_path / "set.npz"), f"images={tmp_path}/set.npz: no .npz")


def test_arrays_are_not_cut(tmp_path):
    source = written(tmp_path, arr_0=COLOURS)
    message = refused(source, f"resolution=4: the images of {source}", side=4)
    assert message.endswith("are taken as they are; leave it out")


@over_places
def test_images_of_two_sizes_are_refused(tmp_path, pack):
    files = named(COLOURS) | {"4.png": png(COLOURS[4, 1:])}
    source = pack(tmp_path / "set", files)
    refused(source, f"images={source}: 4.png", "(5, 5, 3)", "0.png", "(6, 5, 3)", "--resolution=")
    assert open_image_set(source, side=5).read(np.arange(7)).shape == (7, 5, 5, 3)


def test_colours_among_grey_files_are_refused(tmp_path):
    files = named(GREYS) | {"3.png": png(COLOURS[3])}
    source = folder(tmp_path / "set", files)
    refused(source, f"images={source}: 3.png", "(6, 5, 3)", "0.png", "(6, 5, 1)", "--resolution=")
    assert open_image_set(source, side=5).read(np.arange(4)).shape == (4, 5, 5, 3)


@over_places
@pytest.mark.parametrize("name", ["0.png", "5.png"])
@pytest.mark.parametrize("side", [0, 4])
def test_an_image_that_cannot_be_read_is_named(tmp_path, side, name, pack):
    source = pack(tmp_path / "set", named(COLOURS) | {name: BAD})
    refused(source, "images=", "set", f": {name}: ", "is no BMP", "; take it out", side=side)


def test_an_image_that_is_too_thin_is_named(tmp_path):
    thin = np.zeros((1, 20000, 3), np.uint8)
    source = folder(tmp_path / "set", named(COLOURS) | {"5.png": png(thin)})
    refused(source, "5.png", "20000 x 1", side=256)


def test_where_no_images_are(tmp_path):
    refused(folder(tmp_path / "empty", {}), f"images={tmp_path}/empty: no images in it")
    refused(folder(tmp_path / "text", {"a.txt": b""}), "text: no images in it")
    for name in ("nothing", "nothing.zip", "nothing.tar"):
        refused(f"{tmp_path}/{name}", f"images={tmp_path}/{name}: there is no such folder")
    refused(f"{tmp_path}/nothing.npz", f"images={tmp_path}/nothing.npz: there is no such file")
    refused("nothing_like_it", "images=nothing_like_it: no such dataset")


SHORT = png(COLOURS[6, 1:])
SOURCES = {
    "the first file": lambda path: folder(path / "set", named(COLOURS) | {"0.png": BAD}),
    "a later file": lambda path: folder(path / "set", named(COLOURS) | {"6.png": BAD}),
    "another size": lambda path: folder(path / "set", named(COLOURS) | {"6.png": SHORT}),
    "an array": lambda path: written(path, arr_0=COLOURS / 255),
    "a folder without images": lambda path: folder(path / "set", {}),
    "no folder": lambda path: f"{path}/set",
    "no dataset": lambda path: "nothing_like_it",
}


@pytest.mark.parametrize("name", SOURCES)
def test_messages_begin_with_the_field(tmp_path, name):
    source = SOURCES[name](tmp_path)
    message = refused(source, "reference=", pathlib.Path(source).name, ": ", field="reference")
    assert message.startswith("reference=")
