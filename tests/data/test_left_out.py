"""What a source holds besides images is counted by reason, and what would hang is not read."""

import os
import tarfile
import zipfile

import image_set
import numpy as np
import pytest
from PIL import Image

from dmf.data.archives import HIDDEN, LOOP, OUTSIDE, SPECIAL
from dmf.data.image_files import NO_IMAGES, open_images
from dmf.data.latent_caches import open_cache
from dmf.errors import InputError

PNG = image_set.saved(Image.fromarray(np.zeros((9, 9, 3), np.uint8)), "png")
JPEG = image_set.saved(Image.fromarray(np.zeros((9, 9, 3), np.uint8)), "jpeg")


def folder(path, files):
    """A folder of files, in which a name that ends in a slash is a folder."""
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def zipped(path, files):
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo("x")
            entry.filename = name  # The constructor would cut or replace what other programs write.
            archive.writestr(entry, data)
    return path.with_suffix(".zip")


def tarred(path, files):
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        archive.add(folder(path, files), ".")
    return path.with_suffix(".tar")


@pytest.mark.parametrize("pack", [folder, zipped, tarred])
def test_all_files_are_taken_or_counted_by_reason(pack, tmp_path):
    files = {
        "a/1.png": PNG, "a/2.jfif": JPEG, "b/3.jpe": JPEG, "b/4.JIF": JPEG,
        "a/5.tif": b"", "a/6.tif": b"", "a/1.cls": b"0", "metadata.csv": b"", "b/LICENSE": b"",
        "a/.DS_Store": b"", "b/._3.jpe": b"",
    }  # fmt: skip
    images = open_images(str(pack(tmp_path / "set", files)))
    assert images.names == ("a/1.png", "a/2.jfif", "b/3.jpe", "b/4.JIF")
    assert [images.image(i).size for i in range(4)] == 4 * [(9, 9)]
    assert images.left_out == {
        HIDDEN: ("a/.DS_Store", "b/._3.jpe"),
        f"{NO_IMAGES} (.cls)": ("a/1.cls",), f"{NO_IMAGES} (.csv)": ("metadata.csv",),
        f"{NO_IMAGES} (.tif)": ("a/5.tif", "a/6.tif"), f"{NO_IMAGES} (no suffix)": ("b/LICENSE",),
    }  # fmt: skip


@pytest.mark.parametrize("system", ["@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", ".@__thumb"])
@pytest.mark.parametrize("pack", [folder, zipped, tarred])
def test_thumbnails_of_systems_are_no_images(pack, system, tmp_path):
    files = {"a/1.png": PNG, "b/1.png": PNG, f"a/{system}/1.png/thumb.jpg": JPEG,
             f"{system}/b/1.png": PNG}  # fmt: skip
    images = open_images(str(pack(tmp_path / "set", files)))
    assert images.names == ("a/1.png", "b/1.png")
    assert images.class_names == ("a", "b")
    assert list(images.left_out) == [HIDDEN]


def test_labels_files_that_are_not_used_are_counted(tmp_path):
    files = {"1.png": PNG, "dataset.json": b'{"labels": [["1.png", 0]]}', "labels.csv": b"1.png,0"}
    images = open_images(str(folder(tmp_path / "set", files)))
    assert images.left_out == {"labels files that are not used": ("labels.csv",)}
    images = open_images(str(tmp_path / "set"), labels="labels.csv")
    assert images.left_out == {"labels files that are not used": ("dataset.json",)}


def test_files_beside_the_folder_of_an_archive_are_counted(tmp_path):
    files = {"set/a/1.png": PNG, "set/b/1.png": PNG, "README": b""}
    images = open_images(str(zipped(tmp_path / "set", files)))
    assert images.names == ("a/1.png", "b/1.png")
    assert images.left_out == {OUTSIDE: ("README",)}


def test_names_with_backslashes_are_those_of_folders(tmp_path):
    files = {"set\\a\\1.png": PNG, "set\\b\\": b"", "set\\b\\2.png": PNG}
    images = open_images(str(zipped(tmp_path / "set", files)))
    assert images.names == ("a/1.png", "b/2.png")
    assert images.class_names == ("a", "b")
    assert images.image(1).size == (9, 9)


def test_a_name_that_an_archive_has_twice_is_not_lost_in_silence(tmp_path):
    path = zipped(tmp_path / "set", {"a/1.png": PNG, "a\\1.png": PNG, "b/1.png": PNG})
    with pytest.raises(InputError, match=r"a\\1.png is in it twice: pack it again"):
        open_images(str(path))


def test_links_to_a_folder_above_end(tmp_path):
    source = folder(tmp_path / "set", {"a/1.png": PNG, "b/deep/1.png": PNG})
    (source / "a/again").symlink_to(source)
    (source / "b/deep/up").symlink_to("..")
    (source / "b/other").symlink_to(source / "a")  # To a folder beside it: taken.
    images = open_images(str(source))
    assert images.names == ("a/1.png", "b/deep/1.png", "b/other/1.png")
    assert images.left_out == {LOOP: ("a/again/", "b/deep/up/", "b/other/again/")}


def test_devices_and_pipes_are_not_read(tmp_path):
    source = folder(tmp_path / "set", {"a/1.png": PNG, "b/1.png": PNG})
    os.mkfifo(source / "a/2.png")
    (source / "a/3.png").symlink_to("/dev/zero")
    (source / "b/4.png").symlink_to(source / "b/1.png")
    (source / "b/5.png").symlink_to(source / "nothing")
    images = open_images(str(source))
    assert images.names == ("a/1.png", "b/1.png", "b/4.png", "b/5.png")
    assert images.left_out == {SPECIAL: ("a/2.png", "a/3.png")}
    with pytest.raises(FileNotFoundError):  # As where a disk is gone; not left out in silence.
        images.image(3)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(source / "a/2.png", "a/2.png")
        archive.add(source / "a/1.png", "a/1.png")
    images = open_images(str(tmp_path / "set.tar"))
    assert (images.names, list(images.left_out)) == (("1.png",), [SPECIAL])


@pytest.mark.parametrize("kind", ["zip", "csv"])
def test_a_pipe_as_a_source_or_labels_file_is_refused(kind, tmp_path):
    source = folder(tmp_path / "set", {"1.png": PNG})
    pipe = tmp_path / f"pipe.{kind}"
    os.mkfifo(pipe)
    arguments = (str(pipe),) if kind == "zip" else (str(source),)
    labels = "" if kind == "zip" else str(pipe)
    with pytest.raises(InputError, match="is no file|no such file"):
        open_images(*arguments, labels=labels)


def test_pipes_in_a_cache_are_not_read(tmp_path):
    (tmp_path / "cache").mkdir()
    np.save(tmp_path / "cache/1.npy", np.ones((8, 16, 16), np.float16))
    os.mkfifo(tmp_path / "cache/2.npy")
    assert len(open_cache(tmp_path / "cache")) == 1
