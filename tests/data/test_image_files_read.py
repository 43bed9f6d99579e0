"""Image files are read by any number of threads, and what cannot be decoded is named."""

import concurrent.futures
import os
import pathlib
import pickle
import sys
import tracemalloc

import image_set
import numpy as np
import pytest
from PIL import Image
from test_image_files import FILES, NAMES, RNG, deflated, folder, tarred, zipped
from test_image_files_refused import with_bytes

from dmf.data.image_files import ImageFiles, UnreadableImage, open_images
from dmf.data.image_transforms import center_crop

# Images that cannot be decoded.


def unreadable(images: ImageFiles, index: int = 0) -> UnreadableImage:
    with pytest.raises(UnreadableImage) as error:
        images.image(index)
    assert "\n" not in str(error.value)
    return error.value


def test_what_cannot_be_decoded_is_named(tmp_path):
    files = {"a/1.png": b"", "a/2.jpg": b"text", "a/3.png": FILES["cow/1.png"][:300]}
    images = open_images(folder(tmp_path / "set", files))
    errors = [unreadable(images, i) for i in range(3)]
    assert [error.name for error in errors] == list(files)
    assert str(errors[0]) == "a/1.png: is empty"
    assert str(errors[1]) == "a/2.jpg: is no BMP, GIF, JPEG, PNG or WebP file"
    assert "truncated" in errors[2].reason
    assert isinstance(errors[0], ValueError)
    copy = pickle.loads(pickle.dumps(errors[2]))
    assert (copy.name, copy.reason, str(copy)) == (errors[2].name, errors[2].reason, str(errors[2]))


@pytest.mark.filterwarnings("error")
def test_an_image_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    images = open_images(folder(tmp_path / "set", FILES))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert unreadable(images).name == "Bee/x.y.bmp"
    assert "pixels" in unreadable(images).reason


@pytest.mark.parametrize("pack", [zipped, deflated])
@pytest.mark.parametrize("place", [0, 500])
def test_bytes_that_the_archive_knows_to_be_wrong(pack, place, tmp_path):
    """A photograph can be decoded with many a bit wrong; the checksum tells."""
    photo = image_set.saved(Image.fromarray(image_set.colours(RNG, 60, 60)), "jpeg")
    path = pack(tmp_path / "packed", {"a/1.jpg": photo, "b/1.jpg": photo})

    def flipped(data):
        data[data.index(b"more") + len(b"more") + place] ^= 0b110
        return data

    images = open_images(with_bytes(path, flipped))
    assert str(unreadable(images)) == "a/1.jpg: is damaged in the archive"
    assert images.image(1).size == (60, 60)


def test_a_member_that_unfolds_to_more_than_it_claims(tmp_path):
    path = deflated(tmp_path / "packed", {"1.png": bytes(20_000_000)})

    def claim(data):
        place = data.index(b"PK\1\2") + 24
        data[place : place + 4] = (1000).to_bytes(4, "little")
        return data

    images = open_images(with_bytes(path, claim))
    tracemalloc.start()
    try:
        assert unreadable(images).reason == "is damaged in the archive"
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_file_that_is_gone_is_no_matter_of_the_image(tmp_path):
    images = open_images(folder(tmp_path / "set", FILES))
    (tmp_path / "set" / NAMES[0]).unlink()
    with pytest.raises(FileNotFoundError):
        images.image(0)


# Threads, and a set of real files.


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    path = tmp_path_factory.mktemp("photographs")
    return path, image_set.make(path / "set", 100)


def crops(images: ImageFiles, workers: int) -> list[bytes]:
    def crop(index: int) -> bytes:
        try:
            return center_crop(images.image(index), image_set.SIDE).tobytes()
        except UnreadableImage as error:
            return error.name.encode()

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(crop, range(len(images))))


@pytest.fixture(scope="module")
def one_by_one(photographs):
    return crops(open_images(str(photographs[0] / "set")), 1)


@pytest.mark.parametrize("pack", [folder, deflated, tarred])
def test_threads_do_not_mix_images_up(pack, photographs, one_by_one, tmp_path):
    path, written = photographs
    files = {name: (path / "set" / name).read_bytes() for name in written.names}
    images = open_images(pack(tmp_path / "packed", files, "" if pack is folder else "set/"))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        assert crops(images, 8) == one_by_one
    finally:
        sys.setswitchinterval(interval)


def test_a_set_of_real_files(photographs, one_by_one):
    path, written = photographs
    images = open_images(str(path / "set"))
    assert images.names == written.names
    assert images.class_names == image_set.CLASSES
    np.testing.assert_array_equal(images.labels, written.labels)
    whole = image_set.SIDE**2 * 3
    wrong = [name for name, crop in zip(images.names, one_by_one, strict=True)
             if len(crop) != whole]
    assert wrong == [written.broken]
    assert len(set(one_by_one)) == len(written.names)


def test_the_set_of_real_files_is_the_same_each_time_and_of_every_kind(photographs, tmp_path):
    path, written = photographs
    again = image_set.make(tmp_path / "again", 100)
    other = image_set.make(tmp_path / "other", 100, seed=1)
    assert again.names == written.names == other.names
    for name in written.names:
        data = (path / "set" / name).read_bytes()
        assert data == (tmp_path / "again" / name).read_bytes()
        assert data != (tmp_path / "other" / name).read_bytes()
    assert len(set(written.kinds.values())) == 18
    sizes = [Image.open(path / "set" / name).size for name in written.names]
    assert 1 < min(map(min, sizes)) / image_set.SIDE < 1.3
    assert 4.5 < max(map(max, sizes)) / image_set.SIDE <= 5
    assert {width > height for width, height in sizes} == {True, False}


def test_images_may_go_to_another_process(photographs, one_by_one):
    images = open_images(str(photographs[0] / "set"))
    copy = pickle.loads(pickle.dumps(images))
    assert crops(copy, 1) == one_by_one


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks Linux for open files")
@pytest.mark.parametrize("pack", [folder, deflated, tarred])
def test_no_file_stays_open(pack, tmp_path):
    images = open_images(pack(tmp_path / "packed", FILES))
    image = images.image(0)
    numbers = pathlib.Path("/proc/self/fd").iterdir()
    opened = [os.readlink(number) for number in numbers if number.is_symlink()]
    assert not [path for path in opened if path.startswith(str(tmp_path))]
    image.load()
