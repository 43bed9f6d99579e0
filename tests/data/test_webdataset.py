"""The tar shards of a WebDataset: samples and labels, patterns of shards, and bad files."""

import io
import json
import pathlib
import tarfile

import image_set
import numpy as np
import pytest
from PIL import Image

from dmf.data.archives import HIDDEN
from dmf.data.image_files import NO_IMAGES
from dmf.data.image_sets import open_image_set
from dmf.data.image_transforms import load_pixels
from dmf.data.raw_images import RawImages, open_raw_images
from dmf.data.webdataset import ShardedImages, find_shards
from dmf.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
FILES = [image_set.saved(Image.fromarray(pixels), "png") for pixels in PIXELS]


def shard(path: pathlib.Path, *members: tuple[str, bytes]) -> pathlib.Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def sample(i: int, label: int, key: str = "") -> list[tuple[str, bytes]]:
    """The files of a sample; the label of odd ones is in a .json."""
    key = key or f"{i:03}"
    stored = (".json", json.dumps({"label": label, "width": 4}).encode())
    return [(f"{key}.png", FILES[i]), (key + stored[0], stored[1]) if i % 2 else
            (f"{key}.cls", f"{label}\n".encode())]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Two shards of two and three samples, in which the order is not that of the names."""
    shard(tmp_path / "set-000.tar", *sample(1, 0), *sample(0, 2), ("000.txt", b"caption"),
          ("._000.png", b""))
    shard(tmp_path / "set-001.tar", *sample(2, 1, "deep.er/2"), *sample(3, 2), *sample(4, 0),
          ("alone.seg.png", b""))
    return tmp_path


def refused(message: str, source, **options) -> None:
    with pytest.raises(InputError, match=message) as error:
        open_raw_images(str(source), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["", "set-{000..001}.tar", "set-*.tar", "set-{000,001}.tar",
                                    "set-00{0..1}.tar", "set-00?.tar"])  # fmt: skip
def test_samples_come_in_the_order_of_the_shards(folder, source):
    images = open_raw_images(str(folder / source))
    assert isinstance(images, ShardedImages) and isinstance(images, RawImages)
    assert images.names == ["set-000.tar/001.png", "set-000.tar/000.png",
                            "set-001.tar/deep.er/2.png", "set-001.tar/003.png",
                            "set-001.tar/004.png"]
    assert images.labels.tolist() == [0, 2, 1, 2, 0]
    assert images.class_names == ("0", "1", "2")
    for i, original in enumerate([1, 0, 2, 3, 4]):
        np.testing.assert_array_equal(load_pixels(images.open(i)), PIXELS[original])
        assert images.file_size(i) == len(FILES[original])
    assert images.left_out == {
        HIDDEN: ["set-000.tar/._000.png"], f"{NO_IMAGES} (.txt)": ["set-000.tar/000.txt"],
        f"{NO_IMAGES} (.seg.png)": ["set-001.tar/alone.seg.png"],
    }  # fmt: skip


def test_a_set_of_images_may_lie_in_shards(folder):
    opened = open_image_set(str(folder / "set-{000..001}.tar"))
    np.testing.assert_array_equal(opened.read(np.array([4, 0])), PIXELS[[4, 1]])
    assert "2 files that are no images" in opened.notes


def test_a_single_tar_with_labels_beside_images_is_a_shard(folder, tmp_path):
    assert open_raw_images(str(folder / "set-001.tar")).labels.tolist() == [1, 2, 0]
    plain = shard(tmp_path / "plain.tar", ("a/1.png", FILES[0]), ("b/2.png", FILES[1]),
                  ("dataset.json", b'{"labels": null}'))
    assert find_shards(str(plain)) == ()
    shard(folder / "0.png", ("a", b""))
    assert find_shards(str(folder)) == (), "a folder of images with archives beside them"


def test_the_number_of_classes_and_the_field_are_given(folder):
    images = open_raw_images(str(folder), class_count=1000)
    assert len(images.class_names) == 1000
    assert open_raw_images(str(folder), label_column="none").labels is None
    other = shard(folder / "other.tar", ("1.png", FILES[1]), ("1.json", b'{"id": 0}'))
    images = open_raw_images(str(folder / "othe?.tar"))
    assert images.labels is None and images.class_names == ()
    assert images.left_out == {f"{NO_IMAGES} (.json)": ["other.tar/1.json"]}
    assert open_raw_images(str(other), label_column="id").labels.tolist() == [0]


BAD = {
    "two images": ([("1.png", FILES[0]), ("1.jpg", FILES[0])], "1.png and 1.jpg are of one sample"),
    "no number": ([("1.png", FILES[0]), ("1.cls", b"cat")], "1.cls holds 'cat': give a whole num"),
    "no object": ([("1.png", FILES[0]), ("1.json", b"[3]")], "1.json is no JSON object"),
    "broken": ([("1.png", FILES[0]), ("1.json", b"{")], "1.json is no JSON object"),
    "text": ([("1.png", FILES[0]), ("1.json", b'{"label": "cat", "id": 1}')],
             "1.json has label='cat': give a whole number from 0; its fields are label, id"),
    "truth": ([("1.png", FILES[0]), ("1.json", b'{"label": true}')], "has label=True: give a"),
    "below 0": ([("1.png", FILES[0]), ("1.cls", b"-1")], "the label -1: labels are whole numbers"),
    "huge": ([("1.png", FILES[0]), ("1.json", b'{"label": 1%s}' % (b"0" * 30))],
             "the label 1000000000000000000000000000000: labels are whole numbers from 0 to 2147"),
    "some": ([*sample(0, 0), ("1.png", FILES[0])], "a.tar/1.png has no label, as 1 of 2 images"),
    "gap": ([*sample(0, 0), *sample(2, 2)], "no image has the label 1, but one has 2: number the"),
    "none": ([("1.txt", b"")], "no images in it; it takes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_samples(case, tmp_path):
    members, message = BAD[case]
    refused(f"^source={tmp_path}/a\\*.tar: .*{message}", shard(tmp_path / "a.tar", *members)
            .with_name("a*.tar"))


def test_bad_shards(folder):
    whole = (folder / "set-001.tar").read_bytes()
    for end in (10, -512):  # Within an image, and before its header.
        (folder / "set-001.tar").write_bytes(whole[: whole.index(FILES[4]) + end])
        refused("^source=.*set-001.tar: cannot be read: it is damaged or cut short", folder)
    (folder / "set-001.tar").write_bytes(b"\x1f\x8b" + whole)
    refused("set-001.tar: is compressed as a whole", folder)
    refused("set-002.tar: there is no such file$", folder / "set-{000..002}.tar")
    refused("no file has such a name$", folder / "other-*.tar")
    (folder / "set-001.tar").unlink()
    refused("the label 2: labels are whole numbers from 0 to 1; correct it, or --num-classes$",
            folder, class_count=2)
    refused("^num-classes=-1: give a whole number >= 0$", folder, class_count=-1)
    refused("1.json has id=None: give a whole number from 0; its fields are label, width$",
            folder, label_column="id")


def test_options_of_labels_where_no_image_has_one(tmp_path):
    source = shard(tmp_path / "a.tar", *sample(0, 0), *sample(2, 1)).with_name("*.tar")
    refused("^label-column=label: no image has a .json, which would hold that field; leave it out "
            "for the labels of .cls files$", source, label_column="label")
    refused("^num-classes=2: the images have no labels; leave it out$", source,
            label_column="none", class_count=2)


@pytest.mark.parametrize("option", [{"split": "test"}, {"directory": "x"}, {"image_column": "x"}])
def test_options_without_an_effect(folder, option):
    refused("it has no effect on a WebDataset; leave it out$", folder, **option)


@pytest.mark.parametrize("option", [{"split": "test"}, {"label_column": "x"}, {"class_count": 3}])
def test_options_without_an_effect_on_files(tmp_path, option):
    (tmp_path / "1.png").write_bytes(FILES[0])
    refused("it has no effect on image files; leave it out$", tmp_path, **option)
