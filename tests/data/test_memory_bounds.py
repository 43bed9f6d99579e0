"""Small files that claim to be large: little memory is taken, by all threads together."""

import concurrent.futures
import io
import struct
import threading
import time
import tracemalloc
import zipfile

import image_set
import numpy as np
import pytest
from PIL import Image

from dmf.data import archives, npy_files, raw_images
from dmf.data.image_files import UnreadableImage, open_images
from dmf.data.image_transforms import upright_rgb
from dmf.errors import InputError
from dmf.runtime.memory_budget import MemoryBudget

PNG = image_set.saved(Image.fromarray(np.zeros((9, 9, 3), np.uint8)), "png")


def test_a_budget_is_never_exceeded_and_what_is_larger_is_alone():
    budget, held, most, lock = MemoryBudget(10), [0], [], threading.Lock()

    def work(size):
        with budget.hold(size):
            with lock:
                held[0] += size
                most.append((held[0], size))
            time.sleep(0.002)
            with lock:
                held[0] -= size

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [4, 4, 25, 3, 3, 3, 10, 1, 9, 12, 0, 5] * 3))
    assert max(total for total, size in most if size <= 10) <= 10
    assert all(total == size for total, size in most if size > 10)
    assert any(total > size for total, size in most)  # Some at once.


def test_a_budget_is_given_back_after_an_error():
    budget = MemoryBudget(10)
    for _ in range(3):
        with pytest.raises(KeyError), budget.hold(10):
            raise KeyError


def test_images_are_decoded_within_the_budgets(tmp_path, monkeypatch):
    """Of images whose pixels fill the budget, one is decoded at a time."""
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(PNG)
    images, inside, most = open_images(str(tmp_path)), [0], []

    def crop(index):
        with raw_images.decoded(images, index):
            inside[0] += 1
            most.append(inside[0])
            time.sleep(0.005)
            inside[0] -= 1

    for name, size in (("_PIXEL_MEMORY", 16 * 81), ("_FILE_MEMORY", len(PNG))):
        with monkeypatch.context() as patch, concurrent.futures.ThreadPoolExecutor(3) as pool:
            patch.setattr(raw_images, name, MemoryBudget(size))
            list(pool.map(crop, range(6)))
            assert max(most) == 1
            most.clear()
            patch.setattr(raw_images, name, MemoryBudget(2 * size))
            list(pool.map(crop, range(6)))
            assert max(most) == 2
            most.clear()


def test_rounding_16_bits_to_8_takes_little_memory():
    """And every level is rounded as before."""
    levels = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(levels / 257).astype(np.uint8)
    rounded = np.asarray(upright_rgb(Image.fromarray(levels)))[..., 0]
    np.testing.assert_array_equal(rounded, expected)
    large = Image.fromarray(np.tile(levels, (8, 32)))
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(np.asarray(upright_rgb(large).getchannel(0))[-256:, :256],
                                      expected)
        # Two bytes of a pixel in the array, which Pillow joins of parts, and one of the result.
        assert tracemalloc.get_traced_memory()[1] < 8 * large.width * large.height
    finally:
        tracemalloc.stop()


def zip_claiming(path, *, size, stored_size, data=PNG):
    """An archive of one deflated image whose directory claims sizes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", data)
    written = bytearray(path.read_bytes())
    place = written.index(b"PK\1\2") + 20
    written[place : place + 8] = struct.pack("<2L", stored_size, size)
    path.write_bytes(written)
    return str(path)


def test_a_member_that_claims_more_than_it_holds_takes_no_more(tmp_path):
    images = open_images(zip_claiming(tmp_path / "1.zip", size=2**30 - 1, stored_size=85))
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableImage, match="is damaged in the archive"):
            images.image(0)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_member_may_not_end_behind_the_archive(tmp_path):
    path = zip_claiming(tmp_path / "1.zip", size=2**31, stored_size=2**31)
    with pytest.raises(InputError, match=r"1.png in it ends behind its end: it is damaged"):
        open_images(path)


@pytest.mark.parametrize("packed", [False, True])
def test_files_too_large_to_be_images_are_not_read(packed, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/1.png").write_bytes(PNG)
    path = tmp_path / "set"
    if packed:
        path = tmp_path / "1.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("1.png", PNG)
    images = open_images(str(path))
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", len(PNG) - 1)
    with pytest.raises(UnreadableImage, match=f"has {len(PNG)} bytes, and the most are"):
        images.image(0)


def test_an_npz_that_unfolds_to_more_than_latents_have_is_refused(monkeypatch):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, moments=np.zeros((8, 64, 64), np.float16))
    assert list(npy_files.npz_arrays(buffer.getvalue(), ["moments"])) == ["moments"]
    monkeypatch.setattr(npy_files, "MAX_NPZ_BYTES", 2**16)
    with pytest.raises(InputError, match="is no .npz, damaged or too large"):
        npy_files.npz_arrays(buffer.getvalue(), ["moments"])
