"""A TFDS dataset whose files are missing or damaged: one line says so."""

import os
import shutil

import numpy as np
import PIL.Image
import pytest

from dmf.data import datasets
from dmf.data.prepare import prepare
from dmf.data.raw_images import TfdsImages, open_raw_images
from dmf.data.shard_writer import PrepareSettings
from dmf.errors import InputError, RunError

SHARD = "latents-train.array_record-00001-of-00003"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A dataset of twelve images in three shards."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(6):
            image = PIL.Image.fromarray(np.full((9, 9, 3), 20 * i, np.uint8))
            image.save(folder / "images" / name / f"{i}.png")
    settings = PrepareSettings(resolution=8, shard_size=4, batch_size=4)
    prepare(open_raw_images(str(folder / "images")), folder / "out", settings)
    return folder / "out"


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def changed(path):
    data = bytearray(path.read_bytes())
    data[100:140] = bytes(40)
    path.write_bytes(data)


@pytest.mark.parametrize(("name", "damage", "what"), [
    (SHARD, lambda path: path.unlink(), f"{SHARD}: it is missing or empty"),
    (SHARD, lambda path: path.write_bytes(b""), f"{SHARD}: it is missing or empty"),
    (SHARD, cut, "out: a file of the dataset is missing or damaged"),
    (SHARD, changed, "out: a file of the dataset is missing or damaged .*hash mismatch"),
    ("dataset_info.json", lambda path: path.write_text("[]"), "damaged .*version"),
    ("features.json", lambda path: path.write_text("{}"), "damaged .*class name"),
])  # fmt: skip
@pytest.mark.parametrize("in_memory", [True, False])
def test_damage_is_said_in_one_line(prepared, tmp_path, monkeypatch, name, damage, what, in_memory):
    folder = shutil.copytree(prepared, tmp_path / "out")
    damage(folder / name)
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 2**26 if in_memory else 0)
    with pytest.raises(RunError, match=f"{what}.*; restore it, or prepare the dataset again$"):
        datasets.open_dataset("some", directory=str(folder)).read(range(12))


@pytest.mark.parametrize("content", [np.full(12, 7), np.full(11, 0), np.array("no")])
def test_labels_that_are_not_those_of_the_samples_are_not_taken(
    prepared, tmp_path, monkeypatch, content
):
    folder = shutil.copytree(prepared, tmp_path / "out")
    np.save(folder / "labels.npy", content)
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    labels = datasets.open_dataset("some", directory=str(folder)).labels()
    assert labels.tolist() == 6 * [0] + 6 * [1]


def test_labels_that_cannot_be_read_are_named(prepared, tmp_path, monkeypatch):
    folder = shutil.copytree(prepared, tmp_path / "out")
    (folder / "labels.npy").write_bytes(b"")
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    with pytest.raises(RunError, match="a file of the dataset is missing or damaged"):
        datasets.open_dataset("some", directory=str(folder)).labels()


def test_a_file_that_is_no_json_is_refused(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "out")
    (folder / "features.json").write_text("")
    with pytest.raises(InputError, match="is no JSON; prepare the dataset again"):
        datasets.open_dataset("some", directory=str(folder))


class Records(list):
    """Records of a file that is damaged after it was opened."""

    is_damaged = False

    def __getitem__(self, index):
        if self.is_damaged:
            raise RuntimeError("chunk header hash mismatch")
        return super().__getitem__(index)


def test_a_damaged_source_of_images_is_one_line(tmp_path):
    records = Records([{"image": np.zeros((9, 9, 3), np.uint8)}])
    images = TfdsImages(records=records, name="some/train", class_names=())
    records.is_damaged = True
    with pytest.raises(RunError, match="some/train: a file of the dataset is missing or damaged"):
        prepare(images, tmp_path / "again", PrepareSettings(resolution=4, batch_size=8))
